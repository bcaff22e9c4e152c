"""Names and regular expressions match by PEFT's rule, in time linear in their number and bounded overall."""

from __future__ import annotations

import re
import time
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from torch import nn

import lorakit
from lorakit.adapters.formats.peft.adapter_config import parse
from lorakit.errors import AdapterFileError, ConfigurationError, TargetError
from lorakit.models import patterns
from lorakit.models.patterns import Matcher, PatternTable, endings

LORA = {"peft_type": "LORA", "target_modules": ["q"]}

# Few characters, so that keys and paths meet often.
PARTS = st.text(alphabet="ab1_-", min_size=1, max_size=3)
PATHS = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
SPECIAL = st.sampled_from(
    [".", r"\.", "^", "$", r"\d", "+", "?", "*", "|", "[ab]", "(a)", r"\-", "a", "1"]
)
KEYS = (
    PATHS
    | PATHS.map(re.escape)
    | PATHS.map(lambda path: f"^{re.escape(path)}")
    | PATHS.map(lambda path: f"{path}$")
    | st.lists(SPECIAL | PARTS, max_size=5).map("".join)
)


def covers(key: str, path: str) -> bool:
    """Whether PEFT's rule matches."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def is_expression(key: str) -> bool:
    try:
        re.compile(key)
        re.compile(rf"(.*\.)?({key})$")
    except re.error:
        return False
    return True


@settings(max_examples=400)
@given(st.lists(KEYS.filter(is_expression), max_size=6, unique=True), st.lists(PATHS, min_size=1))
def test_a_table_gives_what_the_rule_gives(keys: list[str], paths: list[str]):
    table = PatternTable({key: i for i, key in enumerate(keys)}, Matcher())
    for path in paths:
        first = next((i for i, key in enumerate(keys) if covers(key, path)), -1)
        assert table.get(path, -1) == first
    assert table.unused(paths) == [k for k in keys if not any(covers(k, p) for p in paths)]


def test_a_dot_in_a_name_matches_any_character():
    table = PatternTable({"layer.1": "first", "q": "second"}, Matcher())
    assert table.get("model.layer.1", "none") == table.get("layer11", "none") == "first"
    assert table.get("layer.12", "none") == table.get("xlayer.1", "none") == "none"


def test_endings():
    assert list(endings("a.b.c")) == ["a.b.c", "b.c", "c"]


BLOCKS = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(140) for name in "qkvo"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "key", [str, re.escape, lambda path: f"^{re.escape(path)}"], ids=["name", "escaped", "anchored"]
)
def test_20000_names_for_560_layers_take_under_a_second(key):
    names = {key(path): i % 7 + 1 for i, path in enumerate(BLOCKS)}
    names |= {key(f"model.layers.{i}.mlp.up_proj"): 3 for i in range(20_000 - len(BLOCKS))}

    def read(build) -> None:
        settings = build()
        for i, path in enumerate(BLOCKS):
            assert settings.rank_of(path) == settings.alpha_of(path) == i % 7 + 1

    options: dict[str, Any] = {"rank_pattern": names, "alpha_pattern": names}
    for build in (lambda: parse({**LORA, **options}), lambda: lorakit.LoRA(**options)):
        start = time.thread_time()
        read(build)
        assert time.thread_time() - start < 1


HOSTILE, LONG = "(a|aa)+b", "a" * 70
"""A pattern and a path on which it needs exponential time."""


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {HOSTILE: 4}},
        {"alpha_pattern": {HOSTILE: 4}},
    ],
    ids=lambda options: next(reversed(options)),
)
def test_a_hostile_folder_stops_in_time(options: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    config = parse({**LORA, **options})

    def match() -> None:
        for i in range(20):  # the limit is that of all paths together
            config.scaling_of(f"{LONG}{i}.q")

    start = time.thread_time()
    with pytest.raises(AdapterFileError, match=f"{next(reversed(options))} has .* take too long"):
        match()
    assert time.thread_time() - start < 0.5


def test_patterns_of_a_file_share_their_time(monkeypatch: pytest.MonkeyPatch):
    # Each match alone is within the limit.
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    slow = {rf"(a?){{{n}}}(a+)+{'a' * n}b": 4 for n in range(18, 22)}
    config = parse({**LORA, "rank_pattern": slow})

    def match() -> None:
        for i in range(1000):
            config.rank_of(f"{'a' * 18}.{i}")

    start = time.thread_time()
    with pytest.raises(AdapterFileError, match=r"rank_pattern has .* take too long"):
        match()
    assert time.thread_time() - start < 1


def test_hostile_settings_stop_in_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    net = nn.ModuleDict({LONG: nn.Linear(2, 2)})
    with pytest.raises(TargetError, match="takes too long to match"):
        lorakit.attach(net, lorakit.LoRA(rank=1, targets=HOSTILE))
    with pytest.raises(ConfigurationError, match="rank_pattern has regular expressions that take"):
        lorakit.attach(net, lorakit.LoRA(rank=1, targets=LONG, rank_pattern={HOSTILE: 1}))


def test_a_time_limit_is_for_one_operation(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    method = lorakit.LoRA(rank_pattern={r"layer\d+": 2})
    start = time.thread_time()
    while time.thread_time() - start < 0.2:
        assert method.rank_of("layer1") == 2

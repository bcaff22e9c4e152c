"""YAML is untrusted input: whatever a file holds, it is read or rejected with its line, and soon."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lorakit.cli.config_files import read_options
from lorakit.cli.parsing import _read_text
from lorakit.errors import ConfigurationError, RunFolderError
from lorakit.storage.yaml_files import MAX_BYTES, MAX_NODES, dump_yaml, parse_yaml, read_yaml
from lorakit.training.config import TrainConfig
from lorakit.training.run_folder import read_settings

LAUGHS = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
INVALID = {
    "list as key": ("? [a, b]\n: c", "a key is a list or a mapping"),
    "mapping as key": ("{a: 1}: c", "a key is a list or a mapping"),
    "alias as key": ("a: &a [1]\n? *a\n: c", "a key is a list or a mapping"),
    "itself": ("a: &a [*a]", "inside the value that it repeats"),
    "merges itself": ("a: &a\n  <<: *a", "inside the value that it repeats"),
    "nested lists": ("a: " + "[" * 100_000, "more than 50 levels deep"),
    "nested mappings": ("{a: " * 100_000, "more than 50 levels deep"),
    "nested blocks": ("- " * 100_000, "more than 50 levels deep"),
    "aliases": (LAUGHS, "more than 20,000 values"),
    "merges": ("a: &a {x: 1}\nb: &b {<<: [" + "*a, " * 10**4 + "*a]}", "more than 20,000 values"),
    "many values": ("- a\n" * (MAX_NODES + 1), "more than 20,000 values"),
    "duplicate": ("a: 1\nb: 2\na: 3", "'a' occurs twice"),
    "duplicate below": ("a: {b: 1, b: 2}", "'b' occurs twice"),
    "duplicate in a list": ("a: [{b: 1, b: 2}]", "'b' occurs twice"),
    "not a number": ("a: !!int x", "'x' is not of type int"),
    "not a float": ("a: !!float x", "'x' is not of type float"),
    "not true or false": ("a: !!bool x", "'x' is not of type bool"),
    "not a date": ("a: !!timestamp x", "'x' is not of type timestamp"),
    "no mapping": ("a: !!map [x]", "expected a mapping node"),
    "no list": ("a: !!seq {x: 1}", "expected a sequence node"),
    "no pairs": ("a: !!omap [x]", "expected a mapping of length 1"),
    "python": ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "long number": ("a: " + "1" * 5000, "more than 400 characters"),
    "nul": ("a: b\0c", "special characters are not allowed"),
    "escape": ("a: b\x1bc", "special characters are not allowed"),
    "two documents": ("a: 1\n---\nb: 2", "expected a single document"),
    "merges a text": ("a: {<<: x}", "<< needs a mapping"),
    "merges texts": ("a: {<<: [{b: 1}, x]}", "<< needs a mapping"),
    "unknown alias": ("a: *b", "undefined alias"),
}


SLOW = ("many values", "merges", "nested lists")
"""Cases that take above 0.5 s."""


def cases(table):
    marks = {name: [pytest.mark.slow] if name in SLOW else [] for name in table}
    values = {name: c if isinstance(c, tuple) else (c,) for name, c in table.items()}
    return [pytest.param(*values[name], id=name, marks=marks[name]) for name in table]


@pytest.mark.parametrize(("text", "problem"), cases(INVALID))
def test_an_invalid_file_is_an_error_of_the_command_line_and_of_a_run(tmp_path, text, problem):
    began = time.monotonic()
    file = tmp_path / "config.yaml"
    file.write_text(text)
    message = rf"config\.yaml' is not valid YAML: .*{problem}.* Correct it, or restore"
    with pytest.raises(ConfigurationError, match=message):
        read_options(str(file), TrainConfig, "train")
    with pytest.raises(RunFolderError, match=message):
        read_settings(tmp_path)
    assert _read_text(text) == text
    assert time.monotonic() - began < 60  # usually below 1 s; without limits some would never end


def test_files_that_are_too_large_or_not_utf8_are_errors(tmp_path):
    file = tmp_path / "config.yaml"
    for content, problem in (
        (b"# " + b"x" * MAX_BYTES, "larger than 1 MiB"),
        ("a: é".encode("latin-1"), "not UTF-8"),
        ("a: é".encode("utf-16"), "not UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigurationError, match=problem):
            read_options(str(file), TrainConfig, "train")
        with pytest.raises(RunFolderError, match=problem):
            read_settings(tmp_path)


def test_anchors_merges_and_a_byte_order_mark_are_read():
    text = (
        "\ufeffone: {deep: {a: &a {<<: {x: 1, y: 1}, x: 2}}}\ntwo: {<<: *a, y: 3}\nthree: [*a, *a]"
    )
    a = {"x": 2, "y": 1}
    assert parse_yaml(text) == {"one": {"deep": {"a": a}}, "two": {"x": 2, "y": 3}, "three": [a, a]}
    first = "a: {<<: [{rank: 1}, {rank: 2, alpha: 2}], alpha: 3}"  # the first mapping wins
    assert parse_yaml(first) == {"a": {"rank": 1, "alpha": 3}}


def test_an_invalid_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("base:\n  name: chat\n  - x\n")
    with pytest.raises(ConfigurationError, match=rf'in "{path}", line 3, column 3'):
        read_yaml(path, ConfigurationError)


@given(st.text(alphabet="ab01:-[]{}&*!?|>'\"#%@,.~<\n \t\0\ufeff\ud800", max_size=40))
def test_any_text_is_read_or_is_a_yaml_error(text):
    with suppress(yaml.YAMLError):
        parse_yaml(text)


TEXT = st.text(st.characters(exclude_characters="\x85\u2028\u2029", codec="utf-8"), max_size=8)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXT,
    st.from_regex(r"[-+]?[0-9.]{1,3}(e[-+]?[0-9])?", fullmatch=True),
)  # fmt: skip


@given(st.dictionaries(TEXT, st.lists(SCALARS, max_size=3), max_size=4))
def test_written_values_are_read_back_with_their_types(value):
    back = parse_yaml(dump_yaml(value, sort_keys=False))
    assert back == value
    assert repr(back) == repr(value)

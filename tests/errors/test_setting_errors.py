"""Invalid targets, numbers and keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn
from user_mistakes import (
    Shell,
    nothing_left,
    refused,
)

import lorakit
from lorakit.errors import (
    ConfigurationError,
    LorakitError,
    TargetError,
)

# --- targets --------------------------------------------------------------------------------------

TARGETS = {
    "a misspelt name": ("q_prj", ["q_prj", "q_proj"]),
    "a misspelt role": ("attention.w", ["attention.w", "attention.q"]),
    "a pattern of nothing": (r"model\.layers\.9\..*", [r"layers\.9", "q_proj"]),
    "one of two": (("q_proj", "v_prj"), ["v_prj", "v_proj"]),
    "one of two roles": (("attention.q", "mlp.upp"), ["mlp.upp", "mlp.up"]),
    "a layer that takes none": ("input_layernorm", ["input_layernorm", "RMSNorm"]),
    "a pattern that takes in such a layer": (
        r".*\.(q_proj|input_layernorm)",
        ["input_layernorm", "RMSNorm"],
    ),
}


@pytest.mark.parametrize(("targets", "words"), TARGETS.values(), ids=TARGETS)
def test_target_that_matches_nothing_or_only_partly(
    targets: Any, words: list[str], model: nn.Module, tmp_path: Path
) -> None:
    with nothing_left(tmp_path, model), refused(TargetError, *words):
        lorakit.attach(model, lorakit.LoRA(targets=targets))


@pytest.mark.parametrize(
    "settings",
    [{"rank_pattern": {"q_prj": 4}}, {"alpha_pattern": {"q_prj": 4}}, {"train_modules": "q_prj"}],
    ids=lambda settings: next(iter(settings)),
)
def test_setting_for_a_layer_that_is_not_there(
    settings: dict[str, Any], model: nn.Module, tmp_path: Path
) -> None:
    with nothing_left(tmp_path, model), refused(LorakitError, "q_prj"):
        lorakit.attach(model, lorakit.LoRA(**settings))


@pytest.mark.parametrize("targets", ["q_prj", '["q_proj","q_prj"]'], ids=["nothing", "partly"])
def test_target_that_matches_nothing_in_a_run(
    targets: str, shell: Shell, base: str, data: str
) -> None:
    shell.refuses(
        f"train --base.name {base} --data.train {data} --output run --lora.targets {targets}",
        "q_prj",
        "Did you mean 'q_proj'?",
    )


# --- rank, alpha, configuration -------------------------------------------------------------------

NUMBERS = {
    "rank 0": ({"rank": 0}, ["rank is 0", "1 or more"]),
    "rank negative": ({"rank": -8}, ["rank is -8", "1 or more"]),
    "alpha 0": ({"alpha": 0.0}, ["alpha is 0", "no", "effect", "2 * rank"]),
    "rank 0 somewhere": ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern['q_proj'] is 0"]),
    "alpha 0 somewhere": ({"alpha_pattern": {"q_proj": 0}}, ["alpha_pattern['q_proj'] is 0"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "words"), NUMBERS.values(), ids=NUMBERS)
def test_rank_0_and_alpha_0(
    settings: dict[str, Any],
    words: list[str],
    model: nn.Module,
    shell: Shell,
    base: str,
    data: str,
) -> None:
    with nothing_left(shell.folder, model), refused(ConfigurationError, *words):
        lorakit.attach(model, lorakit.LoRA(**settings))
    Path("run.yaml").write_text(yaml.safe_dump({"lora": settings}))
    run = f"train --base.name {base} --data.train {data} --output run"
    shell.refuses(f"{run} --config run.yaml", *words)
    (name, value), *_ = settings.items()
    shell.refuses(f"{run} --lora.{name}={json.dumps(value).replace(' ', '')}", *words)


def test_rank_above_the_width(model: nn.Module, shell: Shell, base: str, data: str) -> None:
    """The layers have 32 features, and v_proj (two key-value heads) has 16 outputs."""
    with nothing_left(shell.folder, model):
        with refused(ConfigurationError, "rank 17", "v_proj", "16", "rank_pattern"):
            lorakit.attach(model, lorakit.LoRA(rank=17))
        with refused(ConfigurationError, "rank 33", "q_proj", "32", "rank_pattern"):
            lorakit.attach(model, lorakit.LoRA(rank_pattern={"q_proj": 33}))
    run = f"train --base.name {base} --data.train {data} --output run"
    shell.refuses(
        f"{run} --lora.rank 17", "rank 17", "v_proj", "16", "--lora.rank_pattern.v_proj 16"
    )
    # The bound is that of the narrowest layer, not of the first.
    shell.refuses(f"{run} --lora.rank 99", "rank 99", "v_proj", "a rank of at most 16")


UNKNOWN_KEYS = {
    "at the top": ("epoch: 2", ["epoch", "Did you mean 'epochs'?"]),
    "in a section": ("lora:\n  rnk: 4", ["rnk", "Did you mean 'lora.rank'?"]),
    "two sections deep": ("data:\n  colums:\n    prompt: a", ["colums", "'data.columns'"]),
    "of another section": ("optimizer:\n  rank: 4", ["optimizer", "rank"]),
    "an unknown section": ("lorra:\n  rank: 4", ["lorra", "Did you mean 'lora"]),
    "with a dash for a line": ("batch-size: 4", ["batch-size", "Did you mean 'batch_size'?"]),
}


@pytest.mark.parametrize(("text", "words"), UNKNOWN_KEYS.values(), ids=UNKNOWN_KEYS)
def test_unknown_yaml_key(text: str, words: list[str], shell: Shell, base: str, data: str) -> None:
    Path("run.yaml").write_text(text + "\n")
    run = f"train --base.name {base} --data.train {data} --output run"
    shell.refuses(f"{run} --config run.yaml", *words)

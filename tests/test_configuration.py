"""Configurations accept values of their annotated types and equivalent values."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from lorakit.configuration import conform
from lorakit.data import DataConfig
from lorakit.errors import ConfigurationError
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.evaluate_config import EvaluateConfig
from lorakit.evaluation.predict_config import PredictConfig
from lorakit.methods import (
    BitFit,
    BottleneckAdapter,
    Combined,
    FullFineTuning,
    LoRA,
    PrefixEmbedding,
    PrefixLayer,
)
from lorakit.models.base_config import BaseConfig
from lorakit.training.config import (
    CheckpointConfig,
    HeldOutConfig,
    OptimizerConfig,
    TrainConfig,
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    name: str = "a"


@dataclass(frozen=True, kw_only=True)
class Settings:
    rank: int = 8
    alpha: float = 16.0
    dora: bool = False
    bias: Literal["none", "all"] = "none"
    targets: tuple[str, ...] | list[str] | str = ("q",)
    sources: str | list[str] = "train.jsonl"
    betas: tuple[float, float] = (0.9, 0.999)
    ranks: dict[str, int] = field(default_factory=dict)
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        conform(self)


ACCEPTED = {
    "whole for a number": ("alpha", 16, 16.0),
    "numpy's whole number": ("rank", np.int64(4), 4),
    "numpy's number": ("alpha", np.float32(0.5), 0.5),
    "numpy's whole for a number": ("alpha", np.int32(2), 2.0),
    "a list for a tuple": ("targets", ["q", "v"], ("q", "v")),
    "a string instead of a list": ("targets", "q", "q"),
    "a tuple for a list": ("sources", ("a", "b"), ["a", "b"]),
    "a path for a string": ("sources", Path("a") / "b", str(Path("a") / "b")),
    "paths for strings": ("sources", [Path("a")], ["a"]),
    "numbers in a pair": ("betas", [0, 1], (0.0, 1.0)),
    "a mapping": ("ranks", {"q": np.int64(2)}, {"q": 2}),
    "nothing": ("limit", None, None),
    "something": ("limit", 3, 3),
    "none of many": ("loggers", [], ()),
}


@pytest.mark.parametrize(("name", "value", "expected"), ACCEPTED.values(), ids=ACCEPTED)
def test_equivalent_values_are_converted(name: str, value: Any, expected: Any) -> None:
    converted = getattr(Settings(**{name: value}), name)
    assert converted == expected
    assert type(converted) is type(expected)


def test_a_value_of_the_annotated_type_keeps_its_identity() -> None:
    inner = Inner()
    assert Settings(inner=inner).inner is inner


REJECTED = {
    "string for a whole number": ("rank", "8", "rank is '8'; it must be a whole number."),
    "number for a whole one": ("rank", 2.5, "rank is 2.5; it must be a whole number."),
    "True for a whole number": ("rank", True, "rank is True; it must be a whole number."),
    "None for a whole number": ("rank", None, "rank is None; it must be a whole number."),
    "string for a number": ("alpha", "16", "alpha is '16'; it must be a number."),
    "too large for a number": (
        "alpha",
        10**400,
        "it must be a finite number of at most 3.4e+38 in size.",
    ),
    "too large for float32": ("alpha", 1e308, "alpha is 1e+308; it must be a finite number"),
    "not finite": ("alpha", math.inf, "alpha is inf; it must be a finite number"),
    "not a number": ("alpha", math.nan, "alpha is nan; it must be a finite number"),
    "thousands of digits": ("alpha", 10**5000, "alpha is a number of thousands of digits; it"),
    "too large for a whole number": ("rank", 10**30, "it must be a whole number of at most 9,"),
    "too small for a whole number": ("rank", -(10**30), "it must be a whole number of at most 9,"),
    "too large in a union": ("limit", 10**30, "it must be a whole number of at most 9,"),
    "complex for a number": ("alpha", 1j, "alpha is 1j; it must be a number."),
    "string for a bool": ("dora", "no", "dora is 'no'; it must be True or False."),
    "1 for a bool": ("dora", 1, "dora is 1; it must be True or False."),
    "none of the choices": (
        "bias",
        "nome",
        "bias is 'nome'; it must be one of none, all. Did you mean 'none'?",
    ),
    "None for a choice": ("bias", None, "bias is None; it must be one of none, all."),
    "number for strings": ("targets", 5, "targets is 5; it must be a list of strings or a string."),
    "a number among strings": ("targets", ["q", 5], "targets[1] is 5; it must be a string."),
    "bytes for strings": (
        "targets",
        b"q",
        "targets is b'q'; it must be a list of strings or a string.",
    ),
    "a set for strings": (
        "targets",
        {"q"},
        "targets is {'q'}; it must be a list of strings or a string.",
    ),
    "three for two": (
        "betas",
        (0.1, 0.2, 0.3),
        "betas is (0.1, 0.2, 0.3); it must be a list of 2 numbers.",
    ),
    "a string in a pair": ("betas", (0.1, "b"), "betas[1] is 'b'; it must be a number."),
    "a list for a mapping": (
        "ranks",
        ["q"],
        "ranks is ['q']; it must be a mapping from strings to whole numbers.",
    ),
    "a string in a mapping": ("ranks", {"q": "2"}, "ranks['q'] is '2'; it must be a whole number."),
    "a number for a key": ("ranks", {5: 2}, "a key of ranks is 5; it must be a string."),
    "string or None": ("limit", "3", "limit is '3'; it must be a whole number or None."),
    "a string for a section": ("inner", "a", "inner is 'a'; it must be Inner(...)."),
    "the class for a section": ("inner", Inner, "it must be Inner(...)."),
    "a choice among many": (
        "loggers",
        ["wandbb"],
        "loggers[0] is 'wandbb'; it must be one of tensorboard, wandb. Did you mean 'wandb'?",
    ),
    "a string for many": (
        "loggers",
        "wandb",
        "loggers is 'wandb'; it must be a list of tensorboard, wandb.",
    ),
}


@pytest.mark.parametrize(("name", "value", "message"), REJECTED.values(), ids=REJECTED)
def test_other_values_are_rejected(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        Settings(**{name: value})
    assert message in str(raised.value)


def test_a_message_says_the_section_and_repeats_no_more_than_a_line() -> None:
    with pytest.raises(ConfigurationError) as raised:
        OptimizerConfig(eps="8" * 10_000)  # type: ignore[arg-type]
    assert re.fullmatch(r"optimizer\.eps is '8+\.\.\.; it must be a number\.", str(raised.value))
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("kind", [str, Path])
def test_sections_may_be_mappings_and_the_base_its_name(kind: Any) -> None:
    short = TrainConfig(
        base=kind("minilm-l6"),
        data={"train": "train.jsonl"},  # type: ignore[arg-type]
        lora={"rank": 4, "targets": "attention.qv"},  # type: ignore[arg-type]
        output="run",
    )
    assert short == TrainConfig(
        base=BaseConfig(name="minilm-l6"),
        data=DATA,
        lora=LoRA(rank=4, targets="attention.qv"),
        output="run",
    )


def test_a_method_is_the_key_of_a_result() -> None:
    patterns = LoRA(rank_pattern={"q_proj": 4})
    results = {LoRA(): 1, patterns: 2}
    assert results[LoRA(rank=8)] == 1
    assert results[dataclasses.replace(patterns)] == 2


UNKNOWN = {
    "PEFT's r": (lambda: LoRA(r=8), "LoRA has no setting 'r'. Its name in lorakit is 'rank'."),
    "PEFT's name in a section": (
        lambda: TrainConfig(base="b", data=DATA, output="o", lora={"lora_alpha": 8}),
        "lora has no setting 'lora_alpha'. Its name in lorakit is 'alpha'.",
    ),
    "a misspelt name": (lambda: LoRA(rnk=8), "LoRA has no setting 'rnk'. Did you mean 'rank'?"),
    "a name of a section": (
        lambda: TrainConfig(base="b", data=DATA, output="o", alpha=8),
        "TrainConfig has no setting 'alpha'. Its name in lorakit is lora.alpha: write lora=dict(alpha=...).",
    ),
    "another library's name of a section": (
        lambda: TrainConfig(base="b", data=DATA, output="o", lr=8),
        "write optimizer=dict(learning_rate=...).",
    ),
    "a required name": (lambda: TrainConfig(base="b", data=DATA), "TrainConfig needs output"),
    "a required name of a section": (
        lambda: TrainConfig(base={"dtype": "float32"}, data=DATA, output="o"),
        "base.name is not set",
    ),
}


@pytest.mark.parametrize(("make", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_or_missing_setting_names_what_to_write(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        make()
    assert message in str(raised.value)


# --- every configuration of the library -----------------------------------------------------------

DATA = DataConfig(train="train.jsonl")
CONFIGURATIONS: list[Any] = [
    BitFit(),
    BottleneckAdapter(),
    Combined(methods=(LoRA(), PrefixLayer())),
    FullFineTuning(),
    LoRA(),
    PrefixEmbedding(),
    PrefixLayer(),
    BaseConfig(name="base"),
    DATA,
    Decoding(),
    EvaluateConfig(data=DATA),
    PredictConfig(data=DataConfig(test="new.jsonl"), adapter="a", output="out.jsonl"),
    OptimizerConfig(),
    HeldOutConfig(),
    CheckpointConfig(),
    TrainConfig(base=BaseConfig(name="base"), data=DATA, output="run"),
]


class Stranger:
    """A type that no setting has."""


@pytest.mark.parametrize(
    ("config", "name"),
    [(config, f.name) for config in CONFIGURATIONS for f in dataclasses.fields(config)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_no_setting_takes_a_value_of_another_type(config: Any, name: str) -> None:
    for value in (Stranger(), Stranger, {"a": Stranger()}, [Stranger()]):
        with pytest.raises(ConfigurationError, match=name):
            dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda config: type(config).__name__)
def test_an_unknown_name_is_answered_with_the_nearest(config: Any) -> None:
    kind = type(config)
    nearest = dataclasses.fields(kind)[0].name
    with pytest.raises(ConfigurationError) as raised:
        kind(**{f"{nearest}x": 1})
    expected = f"{kind.__name__} has no setting '{nearest}x'. Did you mean '{nearest}'?"
    assert str(raised.value) == expected


def test_configuration_modules_import_no_torch() -> None:
    modules = (
        "lorakit.training.config, lorakit.evaluation.evaluate_config, lorakit.data.data_config, lorakit.methods, "
        "lorakit.models.base_config"
    )
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

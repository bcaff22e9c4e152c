"""Python, YAML and the command line set the same fields, with the same checks."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import tiny_runs
import yaml

from lorakit.cli.parsing import parse
from lorakit.data import DataConfig
from lorakit.errors import ConfigurationError
from lorakit.methods.bitfit import BitFit
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.method import LoRA
from lorakit.methods.registry import SECTIONS, unused_settings
from lorakit.models.base_config import BaseConfig
from lorakit.models.devices import pick_device
from lorakit.training.config import (
    CheckpointConfig,
    HeldOutConfig,
    OptimizerConfig,
    TrainConfig,
)
from lorakit.training.loop import train

BASE, DATA = BaseConfig(name="smollm2-135m"), DataConfig(train="train.jsonl")

RATES = {
    "lora": 5e-4,
    "full": 5e-5,
    "bitfit": 1e-3,
    "bottleneck": 3e-4,
    "prefix_embedding": 1e-3,
    "prefix_layer": 5e-4,
    "lora+prefix_layer": 5e-4,
    "lora+prefix_embedding": 5e-4,
    "lora+bottleneck": 3e-4,
}
"""Default peak learning rates; of several methods the lowest, which may be that of any part."""


def of(**settings) -> TrainConfig:
    return TrainConfig(**{"base": BASE, "data": DATA, "output": "out", **settings})


def parsed(command_line: str) -> TrainConfig:
    return parse(TrainConfig, "train", "Train.", shlex.split(command_line))


def test_every_method_of_lorakit_has_a_section() -> None:
    assert set(SECTIONS) < set(of().as_dict())
    assert set(unused_settings({"method": "lora"})) == {*SECTIONS, "method_settings"} - {"lora"}
    own = {"method": "lora+own.py:Mine"}
    assert set(unused_settings(own)) == {*SECTIONS} - {"lora"}
    start = {"from_adapter": "out/a"}
    assert set(unused_settings(start)) == {*SECTIONS, "method", "method_settings"}
    assert set(unused_settings({**own, **start})) == {*SECTIONS, "method_settings"}


def test_flags_and_python_say_the_same() -> None:
    flags = parsed(
        "--base.name smollm2-135m --data.train train.jsonl --output out --lora.rank 16 "
        "--lora.targets all-linear --optimizer.learning_rate 1e-3 --epochs 2 --accumulation 4"
    )
    python = of(
        lora=LoRA(rank=16, targets="all-linear"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        epochs=2.0,
        accumulation=4,
    )
    assert flags == python


def test_yaml_and_python_say_the_same_and_flags_win(tmp_path: Path) -> None:
    config = of(
        data=DataConfig(train="train.jsonl", validation="held.jsonl", columns={"prompt": "mr"}),
        lora=LoRA(targets=("attention.qv", "mlp"), rank_pattern={"mlp": 4}),
        optimizer=OptimizerConfig(betas=(0.9, 0.95), schedule="cosine", warmup=20),
        evaluation=HeldOutConfig(metric="bleu", samples=50, patience=3),
        checkpoints=CheckpointConfig(every=100, keep=1),
        loggers=("tensorboard",),
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.as_dict()))
    assert parsed(f"--config {path}") == config
    assert parsed(f"--config {path} --seed 7") == dataclasses.replace(config, seed=7)


@pytest.mark.slow
def test_the_recorded_configuration_repeats_and_resumes_the_run(tmp_path: Path, base: str) -> None:
    config = tiny_runs.config(tmp_path, base, max_steps=2)
    first = train(config)
    recorded = tmp_path / "run" / "config.yaml"
    assert train(parsed(f"--config {recorded} --resume true")) == first
    again = parsed(f"--config {recorded} --output {tmp_path / 'again'}")
    train(again)
    assert tiny_runs.adapter_bytes(tmp_path / "again") == tiny_runs.adapter_bytes(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        ("--optimizer.lerning_rate 1", "optimizer.learning_rate"),
        ("--lora.rnak 4", "lora.rank"),
        ("--epcohs 4", "epochs"),
    ],
)
def test_an_unknown_key_is_an_error_with_the_nearest_one(arguments: str, nearest: str) -> None:
    with pytest.raises(ConfigurationError, match=nearest):
        parsed(f"--base.name b --data.train t.jsonl --output out {arguments}")


@pytest.mark.parametrize(("method", "rate"), RATES.items())
def test_default_rates_follow_the_method(method: str, rate: float) -> None:
    assert of(method=method).peak_rate == rate
    assert of(method=method, optimizer=OptimizerConfig(learning_rate=1.0)).peak_rate == 1.0


def test_the_guide_has_the_default_rates() -> None:
    page = (Path(__file__).parents[2] / "docs/guides/training.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| .* \| (\S+) \|$", page, flags=re.MULTILINE))
    assert table.keys() == SECTIONS.keys()
    assert {name: float(rate) for name, rate in table.items()}.items() <= RATES.items()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": ""}, "output is empty"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 1e7}, "epochs is 10000000.0; it must be a number above 0, at most 1,000,000"),
        ({"epochs": 1e300}, "epochs is 1e\\+300; it must be a finite number"),
        ({"max_steps": 10**30}, "max_steps is 1000.*; it must be a whole number of at most"),
        ({"epochs": float("nan")}, "epochs is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"accumulation": -1}, "accumulation is -1"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"method": "lara"}, "method is 'lara'"),
        ({"base": BaseConfig(dtype="float32")}, "base.name is not set"),
        ({"loggers": ("mlflow",)}, "mlflow"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"method": "full", "lora": LoRA(rank=4)}, "section lora has settings"),
        ({"full": FullFineTuning(top_layers=2)}, "section full has settings"),
        ({"method": "full", "optimizer": OptimizerConfig(lr_ratio=4)}, "lr_ratio"),
        ({"method": "bottleneck", "bitfit": BitFit(train_modules="head")}, "section bitfit has"),
        ({"method": "bitfit", "optimizer": OptimizerConfig(lr_ratio=4)}, "lr_ratio"),
        ({"method": "bottelneck"}, "Did you mean 'bottleneck'"),
        ({"method": "lora+prefix_layr"}, "Did you mean 'prefix_layer'"),
        ({"method": "lora+lora"}, "names lora twice"),
        ({"method": "lora+"}, r"several joined by a plus"),
        ({"method": "prefix_embedding+prefix_layer"}, "both give vectors"),
        ({"method": "lora+bitfit", "full": FullFineTuning(top_layers=2)}, "section full has"),
        ({"from_adapter": "x", "lora": LoRA(rank=4)}, "brings its own method"),
        ({"from_adapter": "x", "method": "bitfit"}, "brings its own method"),
        ({"evaluation": HeldOutConfig(patience=2)}, r"patience needs validation data"),
        ({"evaluation": HeldOutConfig(samples=2)}, r"data\.validation_fraction"),
        (
            {"evaluation": HeldOutConfig(metric="perplexity", batch_size=3)},
            r"evaluation\.batch_size, evaluation\.metric needs validation data",
        ),
    ],
)
def test_settings_that_cannot_work_say_why(settings, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        of(**settings)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        (HeldOutConfig, {"every": 0}, "evaluation.every is 0"),
        (CheckpointConfig, {"keep": 0}, "checkpoints.keep is 0"),
        (BaseConfig, {"name": "x", "dtype": "int4"}, "base.dtype is 'int4'"),
        (BaseConfig, {"name": "x", "device": "gpu"}, "base.device is 'gpu'"),
        (BaseConfig, {"name": "x", "device": "meta"}, "base.device is 'meta'"),
        (BaseConfig, {"name": "x", "device": "vulkan"}, "base.device is 'vulkan'"),
    ],
)
def test_sections_check_themselves(section, settings, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        section(**settings)


@pytest.mark.parametrize("device", ["cpu:5", "cuda:99", "mps:7", "xpu:9"])
def test_a_numbered_device_that_is_not_there_is_an_error(device: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{device}.* sees no such device"):
        pick_device(device)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("bleu", "evaluation.samples is 0"),
        ("blue", "evaluation.metric is 'blue'.*Did you mean 'bleu'"),
    ],
)
def test_the_metric_is_checked_against_the_task(metric: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TrainConfig(
            base=BaseConfig(name="b"),
            data=DataConfig(train="t.jsonl"),
            output="out",
            evaluation=HeldOutConfig(metric=metric),
        )

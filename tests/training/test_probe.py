"""The probe trains for a few steps, measures them, and leaves the base and the random state alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_models import tensors_of

from lorakit.adapters import handle_of
from lorakit.compute.adapted import TEXT
from lorakit.compute.base import open_base
from lorakit.data import load_examples
from lorakit.methods.lora import LoRA
from lorakit.models.loading import Base
from lorakit.training import probe
from lorakit.training.step import optimizer_step


def state(base: Base) -> dict[str, object]:
    """Return everything of the base that a probe could change."""
    model = base.model
    return {
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attention": model.config._attn_implementation,
        "forwards": [name for name, m in model.named_modules() if "forward" in vars(m)],
        "modes": [m.training for m in model.modules()],
        "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        "compiled": [m._compiled_call_impl is not None for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "random": tiny_runs.random_states(),
    }


@pytest.fixture
def probed(tmp_path: Path, base: str):
    """Return a base and a call that probes it."""
    config = tiny_runs.config(tmp_path, base)
    opened = open_base(config.base, TEXT)
    train = load_examples(config.data, "train", opened.tokenizer)  # type: ignore[arg-type]
    return opened, lambda: probe.seconds_per_step(config, TEXT, opened, train)


def test_the_probe_is_undone(probed) -> None:
    base, run = probed
    weights = tensors_of(base.model)
    before = state(base)
    assert run() > 0
    assert state(base) == before
    after = base.model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    assert handle_of(base.model) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype", "settings"),
    [
        ("llama", "float32", {"gradient_checkpointing": True}),
        ("llama", "float32", {"compile": True}),
        ("gpt2", "bfloat16", {"method": "bitfit", "lora": LoRA()}),  # casts in its LayerNorms
    ],
    ids=["checkpointing", "compile", "bitfit"],
)
def test_settings_that_change_the_model_leave_the_base_alone(
    tmp_path: Path, arch: str, dtype: str, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_runs.save_base(tmp_path / "base", arch)
    config = tiny_runs.config(tmp_path, folder, **settings)
    config = dataclasses.replace(config, base=dataclasses.replace(config.base, dtype=dtype))
    opened = open_base(config.base, TEXT)
    train = load_examples(config.data, "train", opened.tokenizer)  # type: ignore[arg-type]
    before = state(opened)
    monkeypatch.setattr(probe, "optimizer_step", lambda *_: None)  # compiling is slow
    probe.seconds_per_step(config, TEXT, opened, train)
    assert state(opened) == before


def test_a_probe_that_fails_is_undone(probed, monkeypatch: pytest.MonkeyPatch) -> None:
    base, run = probed
    before = state(base)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(probe, "optimizer_step", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run()
    assert state(base) == before


def test_the_steps_train(probed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without its backward pass or its update would be measured too fast."""
    _, run = probed
    changed = []

    def step(job, *args):
        old = [p.detach().clone() for p in job.parameters.values()]
        result = optimizer_step(job, *args)
        pairs = zip(old, job.parameters.values(), strict=True)
        changed.append(any(not torch.equal(a, b) for a, b in pairs))
        return result

    monkeypatch.setattr(probe, "optimizer_step", step)
    run()
    assert changed == [True] * (1 + probe.STEPS)


def test_a_slow_machine_runs_one_step(probed, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = probed
    seen = []
    monkeypatch.setattr(probe, "SECONDS", 0.0)
    monkeypatch.setattr(probe, "optimizer_step", lambda job, examples, step: seen.append(step))
    run()
    assert seen == [0]

"""Training over a quantised base, also interrupted and resumed; the adapter records the quantisation."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny_runs
import torch
import yaml
from tiny_runs import Crash, adapter_bytes, crash_in_step

import lorakit
from lorakit.errors import ConfigurationError
from lorakit.methods.lora.method import LoRA
from lorakit.models.base_config import BaseConfig
from lorakit.models.loading import load_base
from lorakit.models.quantised import quantised_weights
from lorakit.training.config import HeldOutConfig
from lorakit.training.loop import train
from lorakit.training.progress import first_lines
from lorakit.training.setup import prepare


def settings(folder, base, kind, **overrides):
    return tiny_runs.config(
        folder,
        base,
        base=BaseConfig(name=base, dtype=kind, device="cpu"),
        lora=LoRA(targets="all-linear", dropout=0.1),
        evaluation=HeldOutConfig(every=4, samples=2, max_new_tokens=3),
        **overrides,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "checkpointing"), [("nf4", True), ("int8", False)], ids=["nf4-checkpointing", "int8"]
)
def test_a_killed_run_resumes_to_the_same_bytes(
    tmp_path, base, monkeypatch, kind, checkpointing
) -> None:
    config = settings(tmp_path, base, kind, gradient_checkpointing=checkpointing, max_steps=5)
    train(config)
    other = dataclasses.replace(config, output=str(tmp_path / "other"))
    with monkeypatch.context() as patch:
        crash_in_step(patch, 4)
        with pytest.raises(Crash):
            train(other)
    train(dataclasses.replace(other, resume=True))
    for which in ("adapter", "best"):
        assert adapter_bytes(tmp_path / "other", which) == adapter_bytes(tmp_path / "run", which)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_run_and_its_adapter_say_what_they_were_trained_over(tmp_path, base, kind) -> None:
    train(settings(tmp_path, base, kind, max_steps=1))
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert written["base"]["dtype"] == kind
    record = json.loads((tmp_path / "run/adapter/lorakit.json").read_text())["base"]
    assert record["dtype"] == kind


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_job_computes_over_quantised_projections(tmp_path, base, kind) -> None:
    job = prepare(settings(tmp_path, base, kind))
    assert len(dict(quantised_weights(job.model))) == 14
    assert all(p.dtype == torch.float32 for p in job.parameters.values())
    lines = "\n".join(first_lines(job))
    assert f"14 projections are quantised to {kind}" in lines
    assert f"computed in {str(job.model.dtype).removeprefix('torch.')} on cpu" in lines


@pytest.mark.slow
def test_every_step_trains_every_factor(tmp_path, base) -> None:
    """An evaluation during training keeps the gradients of the layers below."""
    before = prepare(settings(tmp_path, base, "nf4"))
    train(settings(tmp_path, base, "nf4"))
    after = load_base(base, dtype="nf4").model
    trained = lorakit.load(after, tmp_path / "run/adapter", name="default")
    for path, module in trained.modules().items():
        start = before.adapters.modules()[path]
        assert not module.lora_A.equal(start.lora_A)
        assert module.lora_B.count_nonzero() == module.lora_B.numel()


def test_full_fine_tuning_is_refused(tmp_path, base) -> None:
    config = dataclasses.replace(settings(tmp_path, base, "nf4"), method="full", lora=LoRA())
    with pytest.raises(
        ConfigurationError, match=r"quantised layer \(nf4\).*cannot be trained in full"
    ):
        train(config)
    assert not (tmp_path / "run").exists()

"""Runs whose weights are sharded over several processes, against runs of one process.

The runs are in `sharded_processes.py`; one process makes them all.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_runs
import torch
from safetensors.torch import load_file
from scenarios import (
    made_once,
    outcomes,
    require_close_weights,
    require_equality,
    require_success,
)
from several_processes import steps_of
from sharded_processes import COUNTS, ways_on
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from lorakit.adapters import attach
from lorakit.errors import ConfigurationError, LorakitError
from lorakit.methods.lora.method import LoRA
from lorakit.models.base_config import BaseConfig
from lorakit.models.loading import load_base
from lorakit.training.checkpoint import State
from lorakit.training.distributed import Processes
from lorakit.training.interruption import EXIT_TO_RESUME
from lorakit.training.setup import prepare
from lorakit.training.sharding import require_shardable, require_support


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once("sharded_processes.py", tmp_path_factory)


# --- the same result ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "count"), [(way, count) for count in COUNTS[1:] for way in ways_on(count)]
)
def test_gradients_and_weights_equal_those_of_one_process(root: Path, way: str, count: int) -> None:
    """In float64: the gradients of one step, and the weights after the last step.

    Ranks see different examples of a step, and a process without examples takes part. "late layer" has parameters
    without a gradient in the first step.
    """
    require_equality(root, way, count, steps_of(way))


@pytest.mark.slow
def test_a_layer_without_gradient_in_the_first_step(root: Path) -> None:
    tensors = load_file(root / "late layer 2 0.safetensors")
    assert not any("gradient" in name and "layers.1.mlp" in name for name in tensors)
    assert "weight model.layers.1.mlp.up_proj.weight" in tensors


@pytest.mark.slow
def test_gradient_checkpoints_are_never_reentrant(root: Path) -> None:
    """The scenario has broken `CheckpointFunction`, which reentrant checkpoints call."""
    require_success(outcomes(root, "equality")["2"])
    assert (root / "checkpointing 2 0.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full", "bitfit"])
def test_a_bfloat16_base_with_float32_copies_and_factors(root: Path, method: str) -> None:
    """bfloat16 has 8 bits: one gradient differs by up to 2%, and AdamW turns signs of the smallest ones."""
    for processes in outcomes(root, "mixed").values():
        require_success(processes)
    alone = load_file(root / f"mixed {method} 1 0.safetensors")
    sharded = load_file(root / f"mixed {method} 2 0.safetensors")
    assert sharded.keys() == alone.keys()
    for kind, bound in (("gradient", 0.02), ("weight", 0.02)):
        names = [name for name in alone if name.startswith(kind)]
        expected, found = (
            torch.cat([tensors[name].flatten() for name in names]) for tensors in (alone, sharded)
        )
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= bound * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_whole_run_has_the_numbers_of_one_process(root: Path, method: str) -> None:
    """In float32, whose rounding some steps of AdamW amplify: to 1e-5 of the numbers.

    The 13 validation examples are 3 batches. The second process of 2 computes one of them, and repeats another one so
    that both run as many passes; it would change the mean if it counted.
    """
    for processes in outcomes(root, "whole").values():
        require_success(processes)
    alone, sharded = root / f"whole-{method}-1", root / f"whole-{method}-2"
    (session,) = json.loads((sharded / "environment.json").read_text())["sessions"]
    assert session["sizes"]["held_bytes"] < 0.9 * session["sizes"]["base_bytes"]
    for kind in ("train", "validation"):
        expected, found = tiny_runs.metrics(alone, kind), tiny_runs.metrics(sharded, kind)
        assert [r["step"] for r in found] == [r["step"] for r in expected]
        for record, other in zip(found, expected, strict=True):
            for name in other.keys() - {"split", "seconds", "computed_tokens"}:
                assert record[name] == pytest.approx(other[name], rel=1e-5), name
    assert (sharded / "samples.jsonl").read_text() == (alone / "samples.jsonl").read_text()
    for which in ("adapter", "best"):
        require_close_weights(sharded / which, alone / which)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_the_saved_adapter_and_agrees(root: Path) -> None:
    peft = pytest.importorskip("peft")
    ids = torch.tensor([[3, 5, 7, 9, 11]])
    logits = [
        peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(root / "decoder"), root / f"whole-lora-{n}/adapter"
        )(ids).logits
        for n in (1, 2)
    ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


# --- what each process holds, and what it writes ---------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_each_process_holds_its_part_of_the_blocks(root: Path, method: str) -> None:
    """Nothing else keeps the whole weights: not the digests, nor the originals of trained copies."""
    processes = outcomes(root, "memory")
    require_success(processes)
    for process in processes:
        found = json.loads(process["output"])[method]
        expected = found["whole"] + found["sharded"] / 2
        assert found["sharded"] > 2 * found["whole"]
        assert found["held"] == pytest.approx(expected, abs=1000)
        assert "weights sharded over 2 processes: " in found["line"]


@pytest.mark.slow
def test_the_whole_gradient_of_one_block_is_kept_at_a_time(root: Path) -> None:
    processes = outcomes(root, "memory")
    require_success(processes)
    assert [json.loads(p["output"])["full"]["whole gradients"] for p in processes] == [1, 1]


@pytest.mark.slow
def test_processes_have_the_same_seed_and_different_data(root: Path) -> None:
    first, second = (json.loads(p["output"])["lora"] for p in outcomes(root, "memory"))
    assert first["seeded"] == second["seeded"]
    own, other = ([i for batch in found["share"] for i in batch] for found in (first, second))
    assert len({*own, *other}) == len(own) + len(other) == 8


@pytest.mark.slow
def test_saved_files_hold_the_part_of_every_process(root: Path) -> None:
    """Parts filled with the number of their process, saved, cleared and loaded (in the scenario)."""
    processes = outcomes(root, "parts")
    require_success(processes)
    for line in processes[0]["output"].splitlines():
        if not line.startswith("{"):
            continue
        found = json.loads(line)
        run = root / f"parts-{found['method']}"
        assert bool(found["sharded"]) == (found["method"] == "full")
        (file,) = (run / "adapter").glob("*.safetensors")
        weights = load_file(run / "checkpoints" / "step-000001" / "weights.safetensors")
        state = load_file(run / "checkpoints" / "step-000001" / "optimizer.safetensors")
        for name in found["sharded"]:
            kept = [
                load_file(file)[f"trained.{name}"],
                weights[name],
                *(state[f"{name}/{k}"] for k in MOMENTS),
            ]
            for tensor in kept:
                first, second = tensor.chunk(2)
                assert (first == 1).all()
                assert (second == 2).all()


MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.mark.slow
def test_a_checkpoint_has_only_trained_tensors(root: Path) -> None:
    for method in ("lora", "full"):
        weights = root / f"whole-{method}-2" / "checkpoints" / "step-000010" / "weights.safetensors"
        alone = root / f"whole-{method}-1" / "checkpoints" / "step-000010" / "weights.safetensors"
        assert load_file(weights).keys() == load_file(alone).keys()
        assert all("lora_" in name for name in load_file(weights)) == (method == "lora")


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_processes_sharded_or_not(root: Path) -> None:
    found = outcomes(root, "resumed")
    assert {process["status"] for process in found.pop("stopped")} == {EXIT_TO_RESUME}
    for name, processes in found.items():
        require_success(processes)
        require_close_weights(root / name / "adapter", root / "whole-full-1" / "adapter")


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_that_cannot_be_sharded_end_with_an_error(root: Path) -> None:
    ends = outcomes(root, "ends")
    (alone,) = ends["one process"]
    assert alone["status"] == 1
    assert alone["output"].startswith(
        "ConfigurationError: shard is true, but this run has one process. Start several with torchrun "
    )
    assert "alone" not in ends["folders"]
    alive, dead = ends["dead"]
    assert (alive["status"], dead["status"]) == (1, 9)
    assert "LorakitError: " in alive["output"]
    assert "Traceback" not in alive["output"]
    for process in ends["other base"]:
        assert process["status"] == 1
        assert "Process 1 of 2 differs from process 0: base configuration is" in process["output"]


def test_no_process_gathers_an_adapter_that_the_first_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(tiny_runs.config(tmp_path, tiny_runs.save_base(tmp_path / "base")))
    job.config = dataclasses.replace(job.config, shard=True)
    job.processes = Processes(rank=1, count=2)
    monkeypatch.setattr(Processes, "gather", lambda _, own: ["Cannot write", own])
    monkeypatch.setattr(type(job.adapters), "save", None)
    with pytest.raises(LorakitError, match="Process 0 of 2 failed: Cannot write"):
        job.save_adapter(tmp_path / "adapter", State())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile": True}, "shard is true and compile is true, but only plain weights"),
        ({"base": BaseConfig(name="x", dtype="nf4")}, "shard is true and base.dtype is nf4"),
    ],
)
def test_settings_that_exclude_shard(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tiny_runs.config(tmp_path, "base", shard=True, **settings)


def test_an_older_pytorch_that_cannot_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Processes(count=2)
    require_support(two)
    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params")
    with pytest.raises(ConfigurationError, match=r"PyTorch 2.* Install PyTorch 2\.13 or newer"):
        require_support(two)


def test_models_that_cannot_be_sharded(tmp_path: Path) -> None:
    class WithoutBlocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

    with pytest.raises(ConfigurationError, match="WithoutBlocks has no list of blocks to shard"):
        require_shardable(WithoutBlocks(), BaseConfig(name="x"))


def test_a_model_that_skips_blocks_at_random_cannot_be_sharded() -> None:
    """Each process would skip others, and compute a block with the weights of the next one."""
    model = tiny_models.build("bart", encoder_layerdrop=0.3)
    with pytest.raises(
        ConfigurationError, match=r"skips blocks at random \(encoder_layerdrop 0\.3"
    ):
        require_shardable(model, BaseConfig(name="x"))


@pytest.mark.slow
def test_a_quantised_base_cannot_be_sharded(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = tiny_runs.save_base(tmp_path / "base", hidden_size=64, intermediate_size=64)
    model = load_base(folder, dtype="nf4").model
    attach(model, LoRA(rank=2))
    with pytest.raises(ConfigurationError, match="is quantised to nf4, and quantised weights"):
        require_shardable(model, BaseConfig(name=folder))

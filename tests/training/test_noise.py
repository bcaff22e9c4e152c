"""Dropout in training depends on the seed, the step and the example alone."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from torch import Tensor, nn

from lorakit.data import DataConfig
from lorakit.errors import ConfigurationError, LorakitError
from lorakit.methods.lora.method import LoRA
from lorakit.models.faster import make_stock
from lorakit.ops.dropout import CPU
from lorakit.training import step as steps
from lorakit.training.config import HeldOutConfig
from lorakit.training.job import Job
from lorakit.training.loop import train
from lorakit.training.noise import own_generators, require_keyed_noise
from lorakit.training.setup import prepare

DROPOUT = LoRA(dropout=0.1, targets=("all-linear",))
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.1},
    "gpt2": {},
    "opt": {"attention_dropout": 0.1},
    "bloom": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "bert": {},
    "roberta": {},
    "mpnet": {},
    "deberta-v2": {},
    "t5": {},
    "bart": {"attention_dropout": 0.1, "encoder_layerdrop": 0.3},
}
ENCODERS = ("bert", "roberta", "mpnet", "deberta-v2")
DECODERS = ("llama", "gpt2", "opt")


def job_of(folder: Path, arch: str, **settings: Any) -> Job:
    """Return a job in float64, whose adapter is not zero."""
    base = tiny_runs.save_base(
        folder / arch, arch, "base" if arch in ENCODERS else None, **MODELS[arch]
    )
    if arch in ENCODERS:
        file = tiny_runs.write_rows(folder / "labels.jsonl", tiny_runs.labelled(30))
        settings |= {"data": DataConfig(train=file), "evaluation": HeldOutConfig()}
    settings.setdefault("lora", LoRA() if arch == "deberta-v2" else DROPOUT)
    job = prepare(tiny_runs.config(folder, base, **settings))
    job.model.double()
    generator = torch.Generator().manual_seed(1)
    for parameter in job.parameters.values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.add_(0.02 * noise)
    return job


def gradient(job: Job, batch_size: int = 12, step: int = 3) -> Tensor:
    """Return the gradient of the first 12 examples, computed in batches of `batch_size`."""
    for parameter in job.parameters.values():
        parameter.grad = None
    examples = job.train[:12]
    batches = [
        job.collate(examples[at : at + batch_size]) for at in range(0, len(examples), batch_size)
    ]
    steps._accumulate_gradients(job, batches, 7, step, lambda: None)
    # A block that BART skips has none.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in job.parameters.values()]
    return torch.cat([g.flatten() for g in gradients])


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("arch", MODELS)
def test_cuts_of_a_step_have_the_same_dropout(tmp_path: Path, arch: str) -> None:
    job = job_of(tmp_path, arch)
    expected = gradient(job)
    # BLOOM computes its distances in float32.
    limit = 1e-6 if arch == "bloom" else 1e-12
    assert distance(gradient(job, 5), expected) < limit
    assert distance(gradient(job, 1), expected) < limit
    assert distance(gradient(job, step=4), expected) > 0.05
    job.config = dataclasses.replace(job.config, seed=1)
    assert distance(gradient(job), expected) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("arch", DECODERS)
def test_packed_padded_and_recomputed_batches_have_the_same_dropout(
    tmp_path: Path, arch: str
) -> None:
    packed = job_of(tmp_path, arch)
    padded = job_of(tmp_path, arch, packing=False)
    recomputed = job_of(tmp_path, arch, gradient_checkpointing=True)
    assert (packed.computation.packed, padded.computation.packed) == (True, False)
    expected = gradient(packed)
    assert distance(gradient(padded), expected) < 1e-12
    assert distance(gradient(recomputed), expected) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gpt2", "bert", "t5", "bart"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_models_own_layers_have_the_same_dropout(
    tmp_path: Path, arch: str, attention: str
) -> None:
    job = job_of(tmp_path, arch)
    expected = gradient(job)
    make_stock(job.model)
    job.model.set_attn_implementation(attention)
    assert distance(gradient(job), expected) < 1e-12
    job.model.eval()
    assert distance(gradient(job), expected) > 0.05


@pytest.mark.slow
def test_a_head_with_an_adapter_sees_some_tokens_only(tmp_path: Path) -> None:
    job = job_of(tmp_path, "llama", lora=LoRA(dropout=0.1, targets=("attention", "head")))
    assert "own head" in job.computation.note
    assert distance(gradient(job, 5), gradient(job)) < 1e-12


def on_two_processes(job: Job) -> None:
    """Check the noise of `job` as one of two processes does."""
    job.processes = dataclasses.replace(job.processes, count=2)
    require_keyed_noise(job)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gpt2", "bert", "deberta-v2", "bart"])
def test_keyed_dropout_is_accepted(tmp_path: Path, arch: str) -> None:
    """BART also draws a number for each block, and DeBERTa a mask for a table; both are the same in every batch."""
    on_two_processes(job_of(tmp_path, arch))


def torchs_kernel(x: Tensor) -> Tensor:
    return torch.native_dropout(x, 0.2, True)[0]


def on_pairs_of_tokens(x: Tensor) -> Tensor:
    return nn.functional.dropout(x.flatten(0, 1).unflatten(0, (2, -1)), 0.2).view_as(x)


@pytest.mark.parametrize("noise", [torchs_kernel, on_pairs_of_tokens])
def test_other_noise_is_rejected(tmp_path: Path, noise: Callable[[Tensor], Tensor]) -> None:
    job = job_of(tmp_path, "llama", lora=LoRA())
    job.model.config.attention_dropout = 0.1
    block = job.model.get_submodule("model.layers.0.mlp")
    block.register_forward_hook(lambda module, args, output: noise(output))
    with pytest.raises(
        ConfigurationError, match=r"attention_dropout 0\.1.*here 2\. Set its rate to 0"
    ):
        on_two_processes(job)


def test_compiled_dropout_is_rejected(tmp_path: Path) -> None:
    job = job_of(tmp_path, "gpt2")
    job.config = dataclasses.replace(job.config, compile=True)
    with pytest.raises(ConfigurationError, match=r"compile is true and .* Set compile to false"):
        on_two_processes(job)
    quiet = job_of(tmp_path, "gpt2", lora=LoRA())
    quiet.config = job.config
    quiet.model.eval()
    on_two_processes(quiet)


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_the_global_generators(tmp_path, base, monkeypatch, fails: bool) -> None:
    """A loop that draws settings for several runs would draw the same ones for each."""
    before = tiny_runs.random_states()
    if fails:
        tiny_runs.crash_in_step(monkeypatch, 2)
    with pytest.raises(tiny_runs.Crash) if fails else nullcontext():
        train(tiny_runs.config(tmp_path, base, max_steps=2))
    assert tiny_runs.random_states() == before


@pytest.mark.slow
def test_the_import_of_train_leaves_the_generator_of_python() -> None:
    """A user's seed before the first run gives the same numbers after it as before later runs."""
    code = "import random, lorakit; s = random.getstate(); lorakit.train; assert random.getstate() == s"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_run_at_a_time(tmp_path, base) -> None:
    """Each of two runs would seed the generators of the other, such as Optuna's with `n_jobs=2`."""
    config = tiny_runs.config(tmp_path, base, max_steps=1)
    with ThreadPoolExecutor(1) as other:
        states = other.submit(tiny_runs.random_states).result()
        with own_generators(0, CPU), pytest.raises(LorakitError, match="Another thread of this"):
            other.submit(train, config).result()
        assert other.submit(tiny_runs.random_states).result() == states
    assert not (tmp_path / "run").exists()


def test_stock_functions_return_after_an_error(tmp_path: Path) -> None:
    functions = nn.functional.dropout, nn.functional.scaled_dot_product_attention
    job = job_of(tmp_path, "llama")
    job.model.get_input_embeddings().register_forward_hook(_fails)
    with pytest.raises(RuntimeError, match="no such table"):
        gradient(job)
    assert functions == (nn.functional.dropout, nn.functional.scaled_dot_product_attention)


def _fails(*args: Any) -> None:
    raise RuntimeError("no such table")

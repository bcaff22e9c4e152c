"""A process that runs out of memory halves its batches: without dropout the result stays the same."""

from __future__ import annotations

import dataclasses
import errno
import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch

from lorakit import cli
from lorakit.compute.batch_size import BatchSize
from lorakit.data import DataConfig
from lorakit.data.batches import cut
from lorakit.errors import (
    BaseModelError,
    LorakitError,
    is_out_of_memory,
    memory_errors,
    requested_memory,
)
from lorakit.reporting.run_record import read_run
from lorakit.reporting.run_summary import summary
from lorakit.training import loop
from lorakit.training.checkpoint import State
from lorakit.training.config import CheckpointConfig, HeldOutConfig, OptimizerConfig
from lorakit.training.events import adopt_batch_sizes
from lorakit.training.job import Job
from lorakit.training.loop import train
from lorakit.training.optimizer import build_optimizer
from lorakit.training.run_folder import OUT_OF_MEMORY
from lorakit.training.setup import prepare
from lorakit.training.step import optimizer_step

CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "17179869184 bytes. Error code 12 (Cannot allocate memory)"
)
GPU_MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"


class Limit:
    """Memory for a number of tokens in a batch: more raise PyTorch's error, after the model has computed some.

    Args:
        model: The model to limit.
        tokens: Most tokens of a batch, with padding.
        backward: Raise in the backward pass instead.
    """

    def __init__(self, model: Any, tokens: int, *, backward: bool = False) -> None:
        self.tokens, self.backward = tokens, backward
        self.sizes: list[int] = []
        self.failed: list[weakref.ref[torch.Tensor]] = []
        self.alive: list[int] = []
        """How many tensors of failed batches were alive when the next batch was computed."""
        model.get_input_embeddings().register_forward_hook(self._watch)
        model.get_decoder().layers[-1].register_forward_hook(self._compute)

    def _watch(self, module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.alive.append(sum(ref() is not None for ref in self.failed))
        self.sizes.append(args[0].numel())
        self._current = [weakref.ref(output), weakref.ref(args[0])]

    def _compute(self, module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if self.sizes[-1] <= self.tokens:
            return
        self.failed += [*self._current, weakref.ref(hidden)]
        if not (self.backward and hidden.requires_grad):
            raise RuntimeError(CPU_MESSAGE)
        hidden.register_hook(self._raise)

    def _raise(self, gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError(GPU_MESSAGE)


@pytest.fixture(scope="module")
def dropout_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base with dropout, whose masks a resumed run repeats."""
    return tiny_runs.save_base(tmp_path_factory.mktemp("dropout"), attention_dropout=0.1)


def steps(
    folder: Path, base: str, limit: Callable[[Any], Limit] | None, count: int, **overrides: Any
) -> tuple[dict[str, torch.Tensor], Job, Limit | None]:
    """Take some steps in float64, with batches of 8 examples.

    Returns:
        The gradients of the first step that halved its batches, or of all steps if none did; the losses; the weights.
    """
    settings = {"batch_size": 8, "accumulation": 1, **overrides}
    job = prepare(tiny_runs.config(folder, base, **settings))
    job.model.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # B is 0 at first, and so are then the gradients of A
        for parameter in job.parameters.values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.02 * noise)
    job.optimizer = build_optimizer(job.parameters, OptimizerConfig(), 1e-2)
    limited = None if limit is None else limit(job.model)
    found: dict[str, torch.Tensor] = {}
    halved = False

    def record(*_: Any) -> None:
        nonlocal halved
        if limit is None or (job.batch_size.size < 8 and not halved):
            for name, parameter in job.parameters.items():
                assert parameter.grad is not None
                found[f"gradient {number} {name}"] = parameter.grad.clone()
            halved = limit is not None

    handle = job.optimizer.register_step_pre_hook(record)
    for number, examples in zip(range(count), job.step_plan.steps(), strict=False):
        done = optimizer_step(job, examples, number)
        found[f"loss {number}"] = torch.tensor([done.loss, done.tokens], dtype=torch.float64)
    handle.remove()
    for name, parameter in job.parameters.items():
        found[f"weight {name}"] = parameter.detach().clone()
    return found, job, limited


def require_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    bounds = {"gradient": 1e-12, "weight": 1e-9, "loss": 1e-9}
    assert {name.split()[0] for name in found} == bounds.keys()
    for name in found:
        tensor = expected[name]
        assert tensor.dtype == torch.float64
        distance = (found[name] - tensor).norm() / tensor.norm()
        assert distance <= bounds[name.split()[0]], f"{name}: {distance:.1e}"


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("backward", [False, True])
def test_a_halved_batch_has_the_same_gradients(
    tmp_path: Path,
    packing: bool,
    backward: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = tiny_runs.save_base(tmp_path / "base")  # without dropout
    expected, _, _ = steps(tmp_path, base, None, 18, packing=packing)
    assert not caplog.records
    found, job, limit = steps(
        tmp_path,
        base,
        lambda model: Limit(model, 40, backward=backward),
        18,
        packing=packing,
    )
    require_close(found, expected)
    assert limit is not None
    assert limit.failed
    assert job.batch_size.size in (1, 2, 4)
    assert job.batch_size.configured == 8
    # Only batches that failed were computed again.
    assert len([size for size in limit.sizes if size > 40]) == len(caplog.records)
    first = caplog.records[0].getMessage()
    assert first.startswith("Out of memory during step ")
    assert first.endswith(
        ". This process now computes 4 instead of 8 examples at a time. Without dropout, "
        "this changes the result by rounding only."
    )


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
def test_a_retry_holds_nothing_of_the_failed_batch(
    tmp_path: Path, dropout_base: str, backward: bool
) -> None:
    gc.disable()
    try:
        *_, limit = steps(
            tmp_path, dropout_base, lambda model: Limit(model, 40, backward=backward), 2
        )
    finally:
        gc.enable()
    assert limit is not None
    assert len(limit.failed) >= 3
    assert set(limit.alive) == {0}


@pytest.mark.slow
def test_a_single_example_that_does_not_fit(tmp_path: Path, dropout_base: str) -> None:
    with pytest.raises(
        LorakitError,
        match=r"^Out of memory during step 1 \(tried to allocate 17.2 GB\), with one example at a time; the longest "
        r"has \d+ tokens\. Set gradient_checkpointing to true\. Lower data\.max_length",
    ) as caught:
        steps(tmp_path, dropout_base, lambda model: Limit(model, 0), 1)
    assert caught.value.__context__ is None  # nothing holds the tensors of the batch


def test_other_errors_are_raised() -> None:
    batch_size = BatchSize(4)

    def fail() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        batch_size.fit(fail, lengths=[1, 2], during="a test")
    assert batch_size.size == 4


def test_half_of_the_examples_that_did_not_fit() -> None:
    """A process that has 5 of 16 examples in a step computes 2 at a time, not 8."""
    batch_size, tried = BatchSize(16), []

    def compute() -> list[list[int]]:
        batches = cut([*range(5)], batch_size.size)
        tried.append(max(map(len, batches)))
        if tried[-1] > 1:
            raise MemoryError
        return batches

    assert batch_size.fit(compute, lengths=[7] * 5, during="a test") == [[0], [1], [2], [3], [4]]
    assert tried == [5, 2, 1]


def test_a_size_that_must_not_be_halved() -> None:
    batch_size = BatchSize(16, smaller="Set a smaller evaluation.batch_size.")

    def fail() -> None:
        raise MemoryError

    message = r"with 5 examples at a time\. Set a smaller evaluation\.batch_size\. Lower data"
    with pytest.raises(LorakitError, match=message):
        batch_size.fit(fail, lengths=[7] * 5, during="a test")
    assert batch_size.size == 16


# --- runs -----------------------------------------------------------------------------------------


def limit_runs(patch: pytest.MonkeyPatch, tokens: int) -> list[Limit]:
    limits: list[Limit] = []

    def limited(*args: Any, **settings: Any) -> Job:
        job = prepare(*args, **settings)
        limits.append(Limit(job.model, tokens))
        return job

    patch.setattr(loop, "prepare", limited)
    return limits


@pytest.fixture(scope="module")
def limited_run(tmp_path_factory: pytest.TempPathFactory, dropout_base: str) -> Path:
    """A run that halves its batches in training, in scoring, and while it generates, and stops at step 7."""
    folder = tmp_path_factory.mktemp("limited")
    with pytest.MonkeyPatch.context() as patch:
        limit_runs(patch, tokens=60)
        train(config(folder, dropout_base))
    return folder / "run"


def config(folder: Path, base: str, **overrides: Any) -> Any:
    evaluation = HeldOutConfig(every=3, samples=6, max_new_tokens=2, batch_size=12)
    settings = {"batch_size": 8, "accumulation": 1, "evaluation": evaluation, "packing": False}
    checkpoints = CheckpointConfig(every=3)
    return tiny_runs.config(
        folder, base, **{**settings, "max_steps": 8, "checkpoints": checkpoints, **overrides}
    )


@pytest.mark.slow
def test_a_run_records_its_smaller_batches(
    tmp_path: Path, dropout_base: str, limited_run: Path
) -> None:
    train(config(tmp_path, dropout_base))
    assert not (tmp_path / "run" / "events.json").exists()
    for split in ("train", "validation"):
        found, usual = (tiny_runs.metrics(run, split) for run in (limited_run, tmp_path / "run"))
        assert [r["step"] for r in found] == [r["step"] for r in usual]
    events = json.loads((limited_run / "events.json").read_text())["events"]
    assert {event["setting"] for event in events} == {"batch_size", "evaluation.batch_size"}
    assert {(event["event"], event["process"]) for event in events} == {("out of memory", 0)}
    before = next(e for e in events if e["setting"] == "evaluation.batch_size")
    assert (before["step"], before["before"]) == (0, 12)
    sentences = [s for s in summary(read_run(limited_run)) if "ran out of memory" in s]
    assert len(sentences) == len(events)
    assert "batch_size: 8\n" in (limited_run / "config.yaml").read_text()


@pytest.mark.slow
def test_a_resumed_run_starts_with_the_smaller_batches(
    tmp_path: Path, dropout_base: str, limited_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = config(tmp_path, dropout_base)
    original = loop.optimizer_step

    def crash(*args: Any) -> Any:
        if args[2] == 7:
            raise KeyboardInterrupt
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        limit_runs(patch, tokens=60)
        patch.setattr(loop, "optimizer_step", crash)
        with pytest.raises(KeyboardInterrupt):
            train(whole)
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        limits = limit_runs(patch, tokens=60)
        train(dataclasses.replace(whole, resume=True))
    assert not [r for r in caplog.records if "memory" in r.getMessage()]
    assert not limits[0].failed
    assert (tmp_path / "run" / "events.json").read_text() == (
        limited_run / "events.json"
    ).read_text()
    assert tiny_runs.adapter_bytes(tmp_path / "run") == tiny_runs.adapter_bytes(limited_run)


def test_an_example_that_does_not_fit_leaves_a_checkpoint(
    tmp_path: Path, dropout_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config(tmp_path, dropout_base, max_steps=3, evaluation=HeldOutConfig(every=100))
    original = loop.optimizer_step
    with monkeypatch.context() as patch:
        limits = limit_runs(patch, tokens=10**6)

        def step(*args: Any) -> Any:
            limits[0].tokens = 0 if args[2] == 2 else 10**6
            return original(*args)

        patch.setattr(loop, "optimizer_step", step)
        with pytest.raises(LorakitError, match=r"during step 3 .*, with one example at a time"):
            train(whole)
    train(dataclasses.replace(whole, resume=True, gradient_checkpointing=True))
    sessions = json.loads((tmp_path / "run" / "environment.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, 2]


@pytest.mark.slow
def test_labels_are_predicted_in_halved_batches(tmp_path: Path) -> None:
    base = tiny_runs.save_base(tmp_path / "base", "bert", "base")
    data = DataConfig(
        train=tiny_runs.write_rows(tmp_path / "labels.jsonl", tiny_runs.labelled(40)),
        validation_fraction=0.3,
    )
    scores = []
    for tokens in (10**6, 20):
        output = str(tmp_path / str(tokens))
        with pytest.MonkeyPatch.context() as patch:
            limits = limit_labels(patch, tokens)
            train(
                config(
                    tmp_path,
                    base,
                    data=data,
                    evaluation=HeldOutConfig(),
                    output=output,
                    max_steps=1,
                )
            )
        assert bool(limits) == (tokens == 20)
        scores.append(tiny_runs.metrics(Path(output), "validation")[0])
    assert scores[1]["loss"] == pytest.approx(scores[0]["loss"], rel=1e-5)
    assert scores[1]["accuracy"] == scores[0]["accuracy"]


def limit_labels(patch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    failed: list[int] = []

    def watch(module: Any, args: tuple[torch.Tensor, ...], output: Any) -> None:
        if args[0].numel() > tokens:
            failed.append(args[0].numel())
            raise MemoryError

    def limited(*args: Any, **settings: Any) -> Job:
        job = prepare(*args, **settings)
        job.model.get_input_embeddings().register_forward_hook(watch)
        return job

    patch.setattr(loop, "prepare", limited)
    return failed


CHILD = """
import logging, resource, sys
import tiny_runs, torch
from pathlib import Path
from lorakit.training.optimizer import build_optimizer
from lorakit.training.config import OptimizerConfig
from lorakit.training.setup import prepare
from lorakit.training.step import optimizer_step

folder = Path(sys.argv[1])
job = prepare(tiny_runs.config(folder, sys.argv[2], batch_size=8, packing=False))
# A layer that needs 512 MiB for each example.
def allocate(module, args, output):
    torch.empty(len(args[0]), 2**29, dtype=torch.uint8)

job.model.get_input_embeddings().register_forward_hook(allocate)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 5 * 2**29, -1))
job.optimizer = build_optimizer(job.parameters, OptimizerConfig(), 1e-2)
done = optimizer_step(job, next(iter(job.step_plan.steps())), 0)
print(job.batch_size.size, done.loss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of a process's memory")
def test_a_real_allocation_that_fails(tmp_path: Path, dropout_base: str) -> None:
    tiny_runs.config(tmp_path, dropout_base)
    script = (
        f"import sys; sys.path[:0] = {[str(Path(tiny_runs.__file__).parent), *sys.path]!r}{CHILD}"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), dropout_base],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "Out of memory during step 1 (tried to allocate 4.29 GB). This process now computes 4"
        in done.stderr
    )
    assert done.stdout.split()[0] == "4"


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "requested"),
    [
        (torch.OutOfMemoryError(GPU_MESSAGE), " (tried to allocate 2.00 GiB)"),
        (RuntimeError(CPU_MESSAGE), " (tried to allocate 17.2 GB)"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), ""),
        (RuntimeError("std::bad_alloc"), ""),
        (MemoryError("Unable to allocate 7.45 GiB for an array"), " (tried to allocate 7.45 GiB)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
        (OSError("[WinError 1455] The paging file is too small for this operation"), ""),
        (OSError("The paging file is too small for this operation (os error 1455)"), ""),
    ],
)
def test_errors_of_memory(error: Exception, requested: str) -> None:
    assert is_out_of_memory(error)
    assert requested_memory(error) == requested


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes cannot be multiplied"),
        OSError(errno.ENOSPC, "No space left on device"),
        BaseModelError("The file says: out of memory"),
        ValueError("out of memory"),
    ],
)
def test_other_errors(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), memory_errors():
        raise error


def test_a_command_reports_memory_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit.cli import recipes

    def fail(argv: list[str]) -> None:
        raise torch.OutOfMemoryError(GPU_MESSAGE)

    monkeypatch.setattr(recipes, "run", fail)
    assert cli.main(["recipes"]) == 1
    assert capsys.readouterr().err.startswith(
        "lorakit recipes: Out of memory (tried to allocate 2.00 GiB). Close other programs, or lower batch_size"
    )


def test_only_a_halved_size_is_kept_by_a_resumed_run(tmp_path: Path, dropout_base: str) -> None:
    """A run that is cut into larger batches when it resumes has their size, if memory never ran out."""
    job = prepare(tiny_runs.config(tmp_path, dropout_base, batch_size=8, accumulation=1))
    state = State(batch_sizes=[[4, 4]])
    adopt_batch_sizes(job, state)
    assert (job.batch_size.size, job.evaluation_batch_size.size) == (8, 8)
    event = {"event": OUT_OF_MEMORY, "process": 0, "setting": "batch_size"}
    state = State(batch_sizes=[[4, 4]], events=[event])
    adopt_batch_sizes(job, state)
    assert (job.batch_size.size, job.evaluation_batch_size.size) == (4, 8)
    assert state.batch_sizes == [[4, 8]]


def test_the_halved_size_of_another_process_is_kept_by_all_sessions(tmp_path, dropout_base) -> None:
    """Process 1 of two ran out of memory; the later sessions have one process."""
    event = {"event": OUT_OF_MEMORY, "process": 1, "setting": "batch_size"}
    state = State(batch_sizes=[[8, 8], [4, 8]], events=[event])
    job = prepare(tiny_runs.config(tmp_path, dropout_base, batch_size=8, accumulation=1))
    for _ in range(2):
        job.batch_size.size = job.batch_size.configured
        adopt_batch_sizes(job, state)
        assert (job.batch_size.size, job.evaluation_batch_size.size) == (4, 8)

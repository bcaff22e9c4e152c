"""Runs of which one process fails, ends or hangs, for `test_process_failures.py`.

By hand::

    python tests/training/failing_processes.py FOLDER [SCENARIO ...]

See `several_processes.py`, which starts the processes. Without torchrun, the first of them holds the store.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # before torch is imported; see `several_processes.py`

import killed_processes
import several_processes
import torch
from several_processes import Started, run_config

from lorakit.training import loop
from lorakit.training import step as steps
from lorakit.training.config import CheckpointConfig, HeldOutConfig
from lorakit.training.loop import train

COUNT = 3
FAILING = 1
"""The process that fails, unless a scenario says otherwise."""


def main() -> None:
    several_processes.run_scenarios(SCENARIOS)


def before_step(number: int, action: Callable[[], object]) -> None:
    """Call `action` in this process before it computes its share of a step."""
    original = loop.optimizer_step

    def acting(*args: Any) -> Any:
        if args[2] == number - 1:
            action()
        return original(*args)

    loop.optimizer_step = acting


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(error: Exception) -> Callable[[], object]:
    """Return a function that makes the accumulation of gradients raise `error`."""

    def raising(*_: Any) -> float:
        raise error

    return lambda: setattr(steps, "_accumulate_gradients", raising)


def failing(root: Path, name: str, break_it: Callable[[int], object], **settings: Any) -> Started:
    """Start a run that `break_it` prepares in each process by its rank."""

    def work(rank: int) -> None:
        break_it(rank)
        train(run_config(root, name, **settings))

    return Started(COUNT, work)


def in_one(prepare: Callable[[], object], rank: int = FAILING) -> Callable[[int], object]:
    """Return a function of a rank that calls `prepare` in one process."""
    return lambda other: prepare() if other == rank else None


def killed(root: Path) -> Any:
    """Kill a process while it computes, while it waits for another, and the one that holds the store."""

    def while_waiting(rank: int) -> None:
        if rank == FAILING:
            before_step(3, lambda: threading.Timer(0.5, kill).start())
        if rank == 2:
            before_step(3, lambda: time.sleep(1.5))

    started = {
        "computing": failing(root, "killed", in_one(lambda: before_step(3, kill))),
        "waiting": failing(root, "killed-waiting", while_waiting),
        "first": failing(root, "killed-first", in_one(lambda: before_step(3, kill), rank=0)),
    }
    return {name: run.outcomes() for name, run in started.items()}


def raised(root: Path) -> Any:
    """Raise an error in one process in step 3."""
    errors = {
        "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        "bug": ValueError("a bug\nin two lines"),
    }
    started = {
        name: failing(root, f"raised-{name}", in_one(lambda e=error: before_step(3, fail(e))))
        for name, error in errors.items()
    }
    return {name: run.outcomes() for name, run in started.items()}


def hung(root: Path) -> Any:
    """Let a process sleep or stop in step 3, with a limit of 3 seconds."""
    timeout = 3 / 60
    sleeping = failing(
        root,
        "hung-sleeping",
        in_one(lambda: before_step(3, lambda: time.sleep(5))),
        processes_timeout=timeout,
    )
    stopped = failing(
        root,
        "hung-stopped",
        in_one(lambda: before_step(3, lambda: os.kill(os.getpid(), signal.SIGSTOP))),
        processes_timeout=timeout,
    )
    return {"sleeping": sleeping.outcomes(), "stopped": stopped.outcomes(stopped=1)}


def undisturbed(root: Path) -> Any:
    """Train on two processes that shard the base; the test of restarts repeats this run with torchrun."""
    config = run_config(
        root,
        "undisturbed",
        epochs=4,
        evaluation=HeldOutConfig(every=20),
        checkpoints=CheckpointConfig(every=10, keep=1),
        shard=True,
    )
    return several_processes.run(2, lambda _: train(config))


def kills(root: Path) -> Any:
    """Kill runs under torchrun's agent, and resume them.

    The instants of this seed are 83 to 86 % into a run, most of which is its start.
    """
    trial = killed_processes.Trial(root / "kills", epochs=2)
    trial.run(kills=3, victims=("one", "restarted", "launcher"), seed=5926)


SCENARIOS: dict[str, Callable[[Path], Any]] = {
    "killed": killed,
    "raised": raised,
    "hung": hung,
    "undisturbed": undisturbed,
    "kills": kills,
}

if __name__ == "__main__":
    main()

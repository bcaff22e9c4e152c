"""Kill training with SIGKILL, resume it, and compare the weights with those of an undisturbed run.

By hand::

    python tests/training/kill_resume.py

kills once at each of 20 instants drawn uniformly over the run time (the seed is printed), then once before every write,
fsync, rename and removal that a run makes: between any two steps of every save. Each time a new process resumes the
run, which has to end with the same `adapter_model.safetensors`, in adapter/ and in best/, as an undisturbed one.

Runs are forked from one process that has imported everything, the modules that a run imports when it first needs
them too, so that a run takes a fraction of a second. That process computes nothing itself: PyTorch's thread pool does
not survive a fork.
"""

from __future__ import annotations

import argparse
import builtins
import dataclasses
import gc
import importlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import safetensors.torch
import tiny_runs

from lorakit.methods.lora.method import LoRA
from lorakit.storage import atomic, tensors
from lorakit.training.config import CheckpointConfig, HeldOutConfig, TrainConfig
from lorakit.training.loop import train

WRITES = "wax+"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--instants", type=int, default=20, help="kills at drawn instants")
    parser.add_argument("--every", type=int, default=1, help="try every n-th step of a save only")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--folder", type=Path, default=None, help="where runs are written")
    options = parser.parse_args()
    root = options.folder or Path(tempfile.mkdtemp(prefix="kill-resume-"))
    assert fork(lambda: tiny_runs.save_base(root / "base", attention_dropout=0.1)) == 0
    Trial(root, str(root / "base")).run(options.instants, options.every, options.seed)
    if options.folder is None:
        shutil.rmtree(root)
    return 0


class Trial:
    def __init__(self, root: Path, base: str) -> None:
        self.root, self.base = root, base
        self.reference = root / "undisturbed"

    def run(self, instants: int, every: int, seed: int) -> None:
        print(f"seed {seed}", flush=True)
        config = self.config("undisturbed")
        import_modules_of(lambda: train(config), self.root / "modules.txt")
        counted = self.config("counted")
        began = time.monotonic()
        total = count_steps(lambda: train(counted))
        duration = time.monotonic() - began
        tiny_runs.require_same_bytes(self.root / "counted", self.reference)
        print(f"a run takes {duration:.2f} s and {total} steps of saving", flush=True)

        draw = random.Random(seed)
        steps = range(1 + draw.randrange(min(every, total)), total + 1, every)
        killed = tries = 0
        while killed < instants:
            tries += 1
            after = draw.uniform(0, duration)
            if self.kill(f"instant-{tries}", after=after):
                killed += 1
            else:
                duration = after  # the run ended before the kill, so the machine is faster now
        print(f"killed {killed} runs at drawn instants; all resumed to the same bytes", flush=True)

        for step in steps:
            assert self.kill(f"save-{step}", at_step=step), f"step {step} of saving was not reached"
        print(f"killed at {len(steps)} of {total} steps of saving; all resumed to the same bytes")

    def kill(self, name: str, *, after: float | None = None, at_step: int | None = None) -> bool:
        """Kill one run, resume it and compare; return whether the run was still alive when killed."""
        config = self.config(name)

        def victim() -> None:
            if at_step is not None:
                instrument(
                    lambda number: number == at_step and os.kill(os.getpid(), signal.SIGKILL)
                )
            train(config)

        status = fork(victim, kill_after=after)
        resumed = dataclasses.replace(config, resume=True)
        assert fork(lambda: train(resumed)) == 0, f"{name} could not be resumed"
        tiny_runs.require_same_bytes(self.root / name, self.reference)
        shutil.rmtree(self.root / name)
        return status == -signal.SIGKILL

    def config(self, name: str) -> TrainConfig:
        return tiny_runs.config(
            self.root,
            self.base,
            output=str(self.root / name),
            lora=LoRA(dropout=0.2),
            epochs=1,
            evaluation=HeldOutConfig(every=3, samples=1, max_new_tokens=2),
            checkpoints=CheckpointConfig(every=2, keep=1),
        )


def fork(work: Callable[[], object], *, kill_after: float | None = None) -> int:
    """Run `work` in a child; return its exit status, negative for the signal that ended it."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                work()
                status = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)  # a zombie at worst: it has not been waited for
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status > 0:
            output.seek(0)
            print(output.read(), flush=True)
        return status


def import_modules_of(work: Callable[[], object], file: Path) -> None:
    """Import what `work` imports, which a child finds out: it takes longer than the run itself."""

    def listing() -> None:
        work()
        file.write_text("\n".join(sys.modules))

    assert fork(listing) == 0
    for name in file.read_text().split("\n"):
        with suppress(ImportError):  # names that a library gives to modules of its own making
            importlib.import_module(name)
    # Each child collects garbage in `train`, and would copy the pages of all that was imported.
    gc.collect()
    gc.freeze()


def count_steps(work: Callable[[], object]) -> int:
    """Return the number of steps of saving that `work` makes, counted in a child."""
    reader, writer = os.pipe()

    def counting() -> None:
        last = [0]
        instrument(lambda number: last.__setitem__(0, number))
        work()
        os.write(writer, str(last[0]).encode())

    assert fork(counting) == 0
    return int(os.read(reader, 100))


def instrument(reached: Callable[[int], object]) -> None:
    """Call `reached` with a running number before each change to the disk in this process."""
    number = iter(range(1, 10**9))

    def around(
        owner: object, name: str, applies: Callable[..., bool] = lambda *a, **k: True
    ) -> None:
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if not applies(*args, **kwargs):
                return original(*args, **kwargs)
            reached(next(number))
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    for name in ("fsync", "rename", "replace", "link", "mkdir", "rmdir", "unlink", "remove"):
        around(os, name)
    around(atomic, "_exchange")
    for owner in (safetensors.torch, tensors):
        around(owner, "save_file")

    def writes(file, mode="r", *args, **kwargs) -> bool:
        return any(letter in mode for letter in WRITES)

    around(builtins, "open", writes)
    around(io, "open", writes)  # what pathlib calls


if __name__ == "__main__":
    sys.exit(main())

"""Kill processes of runs under torchrun, resume them, and compare the weights with those of an undisturbed run.

By hand::

    python tests/training/killed_processes.py --kills 100

kills at instants drawn uniformly over the time of a run on two processes (the seed is printed): one process, both, the
launcher, or one process that the launcher starts again (`--max-restarts`), in turn. After each kill all processes have
to end by themselves. The resumed run has to end with the same `adapter_model.safetensors`, in adapter/ and in best/, as
an undisturbed one.

The launcher is the agent of torchrun, in a process forked as in `kill_resume.py`. It forks the processes of the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import kill_resume
import tiny_runs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing import (
    _prctl_pr_set_pdeathsig,  # pyright: ignore[reportAttributeAccessIssue]
)

from lorakit.errors import LorakitError
from lorakit.training.config import CheckpointConfig, HeldOutConfig, TrainConfig
from lorakit.training.loop import train

COUNT = 2
VICTIMS = ("one", "all", "launcher", "restarted")
LIMIT = 40.0
"""Seconds in which all processes of a run end after a kill."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill processes of runs and resume them.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=VICTIMS)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--folder", type=Path, default=None, help="where runs are written")
    options = parser.parse_args()
    root = options.folder or Path(tempfile.mkdtemp(prefix="killed-processes-"))
    trial = Trial(root)
    warm_up = trial.config("warm-up")
    kill_resume.import_modules_of(lambda: train(warm_up), root / "modules.txt")
    trial.run(options.kills, options.victims, options.seed)
    if options.folder is None:
        shutil.rmtree(root)
    return 0


class Trial:
    def __init__(self, root: Path, *, epochs: int = 4) -> None:
        self.root, self.epochs = root, epochs
        root.mkdir(exist_ok=True)
        self.base = str(root / "base")
        assert kill_resume.fork(lambda: tiny_runs.save_base(root / "base")) == 0

    def run(self, kills: int, victims: Sequence[str], seed: int) -> None:
        print(f"seed {seed}", flush=True)
        launched = Launched(self.config("undisturbed"), self.root / "pids")
        launched.wait()
        duration = time.monotonic() - launched.began
        assert launched.status == 0, launched.output()
        print(f"a run takes {duration:.2f} s", flush=True)

        draw = random.Random(seed)
        done: Counter[str] = Counter()
        found: Counter[str] = Counter()
        while done.total() < kills:
            victim = victims[done.total() % len(victims)]
            after = draw.uniform(0, duration)
            outcome = self.kill(f"run-{done.total()}", victim, after, draw)
            if outcome == "finished":
                duration = after  # the machine is faster now
            elif outcome != "not started":
                done[victim] += 1
                found[outcome] += 1
        print(f"killed {_listed(done)}; all {kills} runs resumed to the same bytes")
        print(f"at the kill they were {_listed(found)}")

    def kill(self, name: str, victim: str, after: float, draw: random.Random) -> str:
        """Kill a run, resume it and compare; return what it was doing."""
        config = self.config(name)
        restarts = 3 if victim == "restarted" else 0
        launched = Launched(
            dataclasses.replace(config, resume=restarts > 0), self.root / "pids", restarts=restarts
        )
        time.sleep(max(0, launched.began + after - time.monotonic()))
        processes = launched.processes()
        steps = lines(self.root / name / "metrics.jsonl")
        doing = "training" if steps else "starting" if processes else "not started"
        if launched.has_ended() or (steps and not processes):
            doing = "finished"
            launched.wait()
        elif victim == "launcher":
            os.kill(launched.pid, signal.SIGKILL)
        elif processes:
            for process in processes if victim == "all" else [draw.choice(processes)]:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            launched.wait()
        if restarts:
            launched.wait()
            assert launched.status == 0, launched.output()
        else:
            self.resume(config, launched)
            launched.wait()
        tiny_runs.require_same_bytes(self.root / name, self.root / "undisturbed")
        shutil.rmtree(self.root / name)
        return doing

    def resume(self, config: TrainConfig, before: Launched) -> None:
        """Resume at once: the lock of the run rejects this while a process of the killed run lives."""
        began = time.monotonic()
        resumed = dataclasses.replace(config, resume=True)
        while True:
            again = Launched(resumed, self.root / "pids-again")
            again.wait()
            if again.status == 0:
                return
            assert "is in use by another run" in again.output(), again.output() + before.output()
            assert time.monotonic() < began + LIMIT, before.output()

    def config(self, name: str) -> TrainConfig:
        return tiny_runs.config(
            self.root,
            self.base,
            output=str(self.root / name),
            epochs=self.epochs,
            evaluation=HeldOutConfig(every=6, samples=1, max_new_tokens=2),
            checkpoints=CheckpointConfig(every=2, keep=1),
        )


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{what} {count} times" for what, count in counts.items())


class Launched:
    """A run on two processes under torchrun's agent, which is a process of its own."""

    def __init__(self, config: TrainConfig, pids: Path, *, restarts: int = 0) -> None:
        self._pids = pids
        shutil.rmtree(pids, ignore_errors=True)
        pids.mkdir()
        self._output = pids.with_suffix(".txt")
        self.status: int | None = None
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            output = os.open(self._output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            _exit_after(lambda: _launch(config, pids, restarts))

    def processes(self) -> list[int]:
        """Return the processes of the run that have started and not finished."""
        return [int(path.name) for path in self._pids.iterdir()]

    def has_ended(self) -> bool:
        """Return whether the launcher has ended."""
        if self.status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if ended else None
        return self.status is not None

    def wait(self) -> None:
        """Wait for the launcher and for the processes of the run."""
        until = time.monotonic() + LIMIT
        while not self.has_ended() or any(map(is_alive, self.processes())):
            assert time.monotonic() < until, self.output()
            time.sleep(0.01)

    def output(self) -> str:
        return self._output.read_text()


def _launch(config: TrainConfig, pids: Path, restarts: int) -> None:
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=COUNT,
        run_id="run",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=restarts,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(settings, _train)(config, pids, os.getpid())


def _train(config: TrainConfig, pids: Path, launcher: int) -> None:
    # As in processes that torchrun starts with a command: they get no signal when it is killed, and do not inherit its
    # signal handlers.
    _prctl_pr_set_pdeathsig(0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (pids / str(os.getpid())).touch()
    try:
        train(config)
    except LorakitError as error:
        print(error, flush=True)
        sys.exit(1)
    # From here on the agent reads the result of this function, and a forked process waits until it has.
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    if os.getppid() != launcher:
        os._exit(0)
    # No victim any more: the agent hangs if a process is killed that waits for it.
    (pids / str(os.getpid())).unlink(missing_ok=True)


def _exit_after(work: Callable[[], object]) -> None:
    status = 1
    try:
        work()
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main())

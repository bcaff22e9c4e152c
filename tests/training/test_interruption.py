"""Signals that end a run with a checkpoint, and a terminal that is closed."""

from __future__ import annotations

import errno
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_runs
from rich.console import Console

from lorakit import storage
from lorakit.training.interruption import EXIT_TO_RESUME, Interruption
from lorakit.training.terminal import error_output


@contextmanager
def handled(number: int, handler: object) -> Iterator[None]:
    """Handle a signal like a shell that the tests were started from, with or without nohup."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_a_closed_terminal_acts_like_sigterm_however_often(capsys) -> None:
    """A shell and the system both send SIGHUP."""
    with handled(signal.SIGHUP, signal.SIG_DFL):
        with Interruption() as interruption:
            assert not interruption.requested
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
            assert interruption.requested
            assert interruption.received() == (0, 1)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    assert capsys.readouterr().err.count("SIGHUP: ending this step or evaluation") == 1
    with pytest.raises(SystemExit) as ended:
        interruption.exit("")
    assert ended.value.code == EXIT_TO_RESUME


def test_a_closed_terminal_after_ctrl_c_changes_nothing() -> None:
    with (
        handled(signal.SIGHUP, signal.SIG_DFL),
        handled(signal.SIGINT, signal.default_int_handler),
        Interruption() as interruption,
    ):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGHUP)
        assert interruption.received() == (1, 0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_nohup_keeps_a_run_going() -> None:
    with handled(signal.SIGHUP, signal.SIG_IGN), Interruption() as interruption:
        signal.raise_signal(signal.SIGHUP)
        assert not interruption.requested


def test_a_handler_of_c_code_is_left(monkeypatch) -> None:
    """Python returns None for it, and cannot restore it."""
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("replaced the handler"))
    with Interruption() as interruption:
        assert not interruption.requested


class Failing:
    """A stream of which every write fails."""

    def __init__(self, number: int, descriptor: int) -> None:
        self.number, self.descriptor = number, descriptor

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def fileno(self) -> int:
        return self.descriptor


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE])
def test_only_a_closed_terminal_or_pipe_drops_text(
    number: int, monkeypatch, tmp_path: Path
) -> None:
    with (tmp_path / "terminal").open("w") as file:
        monkeypatch.setattr(sys, "stderr", Failing(number, file.fileno()))
        print("text", file=error_output())
        file.write("later")
    assert not (tmp_path / "terminal").read_text()
    monkeypatch.setattr(sys, "stderr", Failing(errno.ENOSPC, -1))
    with pytest.raises(OSError, match="No space"):
        print("text", file=error_output())


def test_ctrl_c_that_has_ended_tee(monkeypatch) -> None:
    """As in `lorakit train 2>&1 | tee log`: the signal goes to both, and the pipe has no reader any more."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        with (
            handled(signal.SIGINT, signal.default_int_handler),
            Interruption() as interruption,
        ):
            signal.raise_signal(signal.SIGINT)
            assert interruption.requested
        Console(stderr=True, file=error_output()).print("a later line")
        with pytest.raises(KeyboardInterrupt):
            interruption.exit("the command that resumes the run")


def test_a_signal_while_a_message_is_printed(monkeypatch) -> None:
    """Python raises a RuntimeError for a print that interrupts a print to a full pipe."""

    def reentrant(*_: object) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=reentrant))
    with handled(signal.SIGTERM, signal.SIG_DFL), Interruption() as interruption:
        signal.raise_signal(signal.SIGTERM)
        assert interruption.requested


@pytest.mark.slow
def test_a_run_survives_its_terminal(tmp_path: Path, base: str) -> None:
    """The system sends SIGHUP, and every later write to the terminal fails."""
    config = tiny_runs.config(tmp_path, base, max_steps=100_000)
    (tmp_path / "run.yaml").write_text(storage.dump_yaml(config.as_dict()))
    outside, inside = pty.openpty()
    code = (
        "import fcntl, os, signal, sys, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from lorakit.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "train", "--config", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(
        command, stdin=inside, stdout=inside, stderr=inside, start_new_session=True
    )
    os.close(inside)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.stat().st_size > 2000, process, outside)
    finally:
        os.close(outside)
    assert process.wait(60) == EXIT_TO_RESUME
    last = tiny_runs.metrics(tmp_path / "run", "train")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{last:06d}").is_dir()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, terminal: int) -> None:
    """Read from the terminal until a condition holds, so that the process can write to it."""
    os.set_blocking(terminal, False)
    deadline, shown = time.monotonic() + 120, b""
    while not condition():
        assert process.poll() is None, shown
        assert time.monotonic() < deadline, shown
        time.sleep(0.05)
        try:
            shown += os.read(terminal, 1 << 16)
        except BlockingIOError:
            continue

"""`lorakit serve` as a process, for the serving benchmark and the soak test."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil

COMMAND = ("lorakit",)
ROOT = Path(__file__).parents[1]
START = 180.0
"""Seconds until a server must answer /health."""


class ServerProcess:
    """A running server.

    Args:
        base: Base model.
        adapters: Folder of adapter folders.
        log: File for what the server prints.
        options: Further options of `lorakit serve`.
        command: The module to run, and arguments before `serve`.
        threads: Threads of torch.

    Raises:
        RuntimeError: The server ended or did not answer in time. The message has the end of its log.
    """

    def __init__(
        self,
        base: Path | str,
        adapters: Path,
        log: Path,
        *,
        options: Sequence[str] = (),
        command: Sequence[str] = COMMAND,
        threads: int | None = None,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        variables = dict(os.environ)
        if threads is not None:
            variables["OMP_NUM_THREADS"] = str(threads)
        fixed = ["--base.name", str(base), "--adapters", str(adapters), "--port", str(port)]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command, "serve", *fixed, *options],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=variables,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        until = time.monotonic() + START
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise RuntimeError(f"The server ended: {self.last_lines()}")
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"The server did not answer within {START:.0f} s: {self.last_lines()}")

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    @property
    def memory(self) -> int:
        """Resident bytes of the process and its children."""
        process = psutil.Process(self._process.pid)
        family = [process, *process.children(recursive=True)]
        return sum(member.memory_info().rss for member in family)

    @property
    def base_name(self) -> str:
        """The base's name in the field `model`: the first of /v1/models."""
        return httpx.get(f"{self.url}/v1/models", timeout=30).json()["data"][0]["id"]

    def metrics(self) -> str:
        """Return the text of /metrics."""
        return httpx.get(f"{self.url}/metrics", timeout=30).text

    def last_lines(self) -> str:
        """Return the end of the log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-2000:]

    def stop(self) -> int | None:
        """Ask the server to end, and return its exit status; None if it had to be killed."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                return None
        return self._process.returncode

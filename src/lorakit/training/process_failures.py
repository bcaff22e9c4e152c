"""Name the process of a run that has failed, ended or hangs, so that the error of every other process can name it.

The processes have a store: `torchrun` keeps it in the launcher, else it is in process 0. Each process writes there how
often it has communicated, and its error if it fails. It also connects to each of the others. The system closes these
connections when a process ends, also if it is killed, but not while it computes or is stopped.
"""

from __future__ import annotations

import datetime
import ipaddress
import itertools
import os
import re
import socket
import time
from contextlib import suppress
from functools import cache

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lorakit.errors import LorakitError

CHECKED_FOR = 2.0
"""Seconds in which the system closes all connections of a process that ends."""
STORE_KEPT_FOR = 5.0
"""Longest wait of process 0 for the others to read the error of a process from its store, in seconds. On a busy machine
they need more than a moment. One that hangs never reads it."""
CONNECTION_TIMEOUT = 30.0
"""Longest wait for a connection to another process, in seconds."""
START_TIMEOUT = datetime.timedelta(minutes=30)
"""Longest wait for the other processes at the start of a run: they import and reach each other at different times."""
STORE_TIMEOUT = datetime.timedelta(seconds=30)
"""Longest wait for an answer of the store."""

RESUME = "Start all processes again with resume (--resume)."

_RUNS = itertools.count()
"""Counts the runs of this process: a script can train several times."""


def shared_store() -> Store:
    """Connect to the store of the processes, with keys of their own for each run and each restart by torchrun.

    torchrun keeps its store over restarts. With the same keys, processes would find the addresses of killed ones.
    """
    store = _store(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"lorakit/{restart}/{next(_RUNS)}", store)


@cache
def _store(address: str, port: str) -> Store:
    """Return the store of all processes.

    Without `torchrun`, process 0 holds the store, and its end would break the connections of the next run.
    """
    return next(rendezvous("env://", timeout=START_TIMEOUT))[0]


class Peers:
    """The processes of a run as process `rank` sees them. The `timeout` is for messages only."""

    def __init__(self, store: Store, rank: int, count: int, timeout: datetime.timedelta) -> None:
        self.stage = "the start of the run"
        """The stage of the run, for messages."""
        self._rank, self._count = rank, count
        self._minutes = timeout.total_seconds() / 60
        self._others = [other for other in range(count) if other != rank]
        self._reached = 0
        self._noticed = False
        self._store = PrefixStore("peers", store)
        self._store.set_timeout(STORE_TIMEOUT)
        master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        with socket.create_connection(master, CONNECTION_TIMEOUT) as connection:
            host, family = connection.getsockname()[0], connection.family
        # A machine can resolve its own name to ::1, and the others resolve it to an IPv4 address.
        dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        # Nobody accepts the connections: that they exist is enough.
        self._listener = socket.create_server(
            ("", 0), family=family, backlog=count, dualstack_ipv6=dual
        )
        if ipaddress.ip_address(host).is_loopback:
            host = master[0]  # other machines resolve it to another address of this one
        self._store.set(f"address/{rank}", f"{host} {self._listener.getsockname()[1]}")
        self._connections = {other: self._connected(other) for other in self._others}

    def _connected(self, other: int) -> socket.socket:
        host, port = self._store.get(f"address/{other}").decode().split()
        connection = socket.create_connection((host, int(port)), CONNECTION_TIMEOUT)
        connection.setblocking(False)
        return connection

    def close(self) -> None:
        """Close the connections. After a failure, keep the store until the other processes have read it."""
        until = time.monotonic() + STORE_KEPT_FOR
        if self._noticed and self._rank == 0 and not _launcher_has_store():
            while time.monotonic() < until and not all(map(self._is_done, self._others)):
                time.sleep(0.05)
        for connection in (self._listener, *self._connections.values()):
            connection.close()

    def _is_done(self, other: int) -> bool:
        """Return whether another process needs the store no more: it has its error, or has ended."""
        keys = f"told/{other}", f"failed/{other}"
        return any(self._store.check([key]) for key in keys) or self._is_closed(other)

    def reach(self) -> None:
        """Record that this process is about to communicate.

        Raises:
            LorakitError: The store is gone, so the launcher or process 0 has ended.
        """
        try:
            self._reached = self._store.add(f"reached/{self._rank}", 1)
        except RuntimeError as error:
            raise self._without_store() from error

    def record(self, error: BaseException) -> None:
        """Tell the other processes why this one ends, unless it ends because of them."""
        if self._noticed:
            return
        message = str(error)
        if not isinstance(error, LorakitError):
            message = f"{type(error).__name__}: {message}".splitlines()[0]
        with suppress(RuntimeError):  # the store is gone
            self._store.set(f"failed/{self._rank}", f"{self.stage}: {message}")
            self._store.check([f"failed/{self._rank}"])  # waits until the store has it

    def error(self, raised: Exception) -> LorakitError:
        """Return an error that names the process because of which this one cannot communicate."""
        try:
            error = self._error(first_sentence(raised))
        except RuntimeError:
            return self._without_store()
        with suppress(RuntimeError):  # the store is gone
            self._store.set(f"told/{self._rank}", "")
        return error

    def _error(self, reason: str) -> LorakitError:
        self._noticed = True
        self._store.set(f"noticed/{self._rank}", "")
        # The first process that waits too long ends, which breaks its connections: the others must not name it.
        reason = self._store.compare_set("reason", "", reason).decode()
        timed_out = re.search("time(d )?out", reason, re.IGNORECASE) is not None
        until = time.monotonic() + (0 if timed_out else CHECKED_FOR)
        while True:
            for other in self._others:
                if (failure := self._failure(other)) is not None:
                    return failure
            if ended := [other for other in self._others if self._has_ended(other)]:
                return LorakitError(
                    f"{self._named(ended)} ended in {self.stage} ({reason}). Killed processes leave no message. "
                    f"{RESUME}"
                )
            if time.monotonic() >= until:
                break
            time.sleep(0.05)
        if timed_out:
            late = [other for other in self._others if self._is_late(other)] or [self._rank]
            return LorakitError(
                f"{self._named(late)} did not reach the end of {self.stage} within {self._minutes:g} minutes "
                f"(processes_timeout). If it only needs longer, raise that setting. {RESUME}"
            )
        return LorakitError(
            f"The connection to another process broke in {self.stage} ({reason}). {RESUME}"
        )

    def _failure(self, other: int) -> LorakitError | None:
        key = f"failed/{other}"
        if not self._store.check([key]):
            return None
        stage, message = self._store.get(key).decode().split(": ", 1)
        first, *lines = message.splitlines()
        return LorakitError(f"{self._named([other])} failed in {stage}: {first}", *lines)

    def _has_ended(self, other: int) -> bool:
        """Return whether another process has ended without noticing that a third one has."""
        return self._is_closed(other) and not self._store.check([f"noticed/{other}"])

    def _is_closed(self, other: int) -> bool:
        try:
            return self._connections[other].recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _is_late(self, other: int) -> bool:
        return self._store.add(f"reached/{other}", 0) < self._reached

    def _named(self, ranks: list[int]) -> str:
        plural = "" if len(ranks) == 1 else "es"
        return f"Process{plural} {' and '.join(map(str, ranks))} of {self._count}"

    def _without_store(self) -> LorakitError:
        self._noticed = True
        holder = "torchrun, which started this run," if _launcher_has_store() else self._named([0])
        return LorakitError(f"{holder} has ended or does not answer in {self.stage}. {RESUME}")


def _launcher_has_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error of torch, without the line of its source."""
    text = re.sub(r"^\[\S+\] ", "", str(error))
    return re.split(r"\.\s|\.?\n|\.?$", text, maxsplit=1)[0] or type(error).__name__

"""Send requests to a serving system at given times, and compute the measures of a trial.

The load is open: a request is sent when it is due, however many are unanswered. Times count from the moment a request
was due, not from the moment it was sent, so that a slow system cannot hide its queue. A saturated run is closed: it
keeps a fixed number of requests in flight.
"""

from __future__ import annotations

import functools
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lorakit.models.processor import in_own_thread

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Request:
    """A prompt to continue greedily."""

    prompt: tuple[int, ...]
    adapter: str | None
    """None is the base."""
    tokens: int
    """Length of the answer. End tokens do not end it."""


@dataclass
class Answer:
    """What a system reports about one request. Its methods may be called from any thread."""

    request: Request
    due: float
    """When the request was to be sent, in seconds of `time.perf_counter`."""
    sent: float = math.nan
    times: list[float] = field(default_factory=list)
    """When each token arrived."""
    ended: float | None = None
    error: str | None = None
    on_end: Any = field(default=None, repr=False)

    def token(self) -> None:
        """Record a token that has arrived."""
        self.times.append(time.perf_counter())

    def end(self, error: str | None = None) -> None:
        """Record the end of the answer, or the kind of its error. Later calls do nothing."""
        if self.ended is not None:
            return
        self.error = error
        self.ended = time.perf_counter()
        if self.on_end:
            self.on_end(self)


class System(Protocol):
    """A serving system."""

    name: str

    def prepare(self, adapters: Sequence[str]) -> None:
        """Load these adapters before the clock starts, as far as the system can hold them."""
        ...

    def submit(self, request: Request, answer: Answer) -> None:
        """Start a request and return at once. Report it to `answer`."""
        ...

    def drain(self) -> None:
        """Give up all unfinished requests, and wait until nothing is computed."""
        ...

    def stop(self) -> None:
        """End all threads and processes."""
        ...


@dataclass(frozen=True)
class Trial:
    """The answers of one run."""

    answers: Sequence[Answer]
    began: float
    finished: float
    """When the last answer ended, or when the run gave up."""


def open_loop(
    system: System, requests: Sequence[Request], times: Sequence[float], *, patience: float
) -> Trial:
    """Send each request at its time.

    Args:
        system: The system, prepared.
        requests: In the order of `times`.
        times: Seconds after the start.
        patience: Seconds after the last request was due until unfinished answers are given up.
    """
    ended: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    began = time.perf_counter()
    answers = []
    for request, at in zip(requests, times, strict=True):
        if (wait := began + at - time.perf_counter()) > 0:
            time.sleep(wait)
        answers.append(_send(system, request, began + at, ended))
    _collect(ended, len(answers), began + (times[-1] if times else 0) + patience)
    return Trial(answers, began, time.perf_counter())


def closed_loop(
    system: System, requests: Sequence[Request], in_flight: int, *, patience: float
) -> Trial:
    """Keep `in_flight` requests unanswered until all are sent.

    Args:
        system: The system, prepared.
        requests: All requests, in order.
        in_flight: Most requests at a time.
        patience: Seconds from the start until unfinished answers are given up.
    """
    ended: queue.SimpleQueue[Answer] = queue.SimpleQueue()
    began = time.perf_counter()
    answers = [_send(system, request, began, ended) for request in requests[:in_flight]]
    finished = 0
    for request in requests[in_flight:]:
        if not _collect(ended, 1, began + patience):
            break
        finished += 1
        answers.append(_send(system, request, time.perf_counter(), ended))
    _collect(ended, len(answers) - finished, began + patience)
    return Trial(answers, began, time.perf_counter())


def _send(system: System, request: Request, due: float, ended: queue.SimpleQueue[Answer]) -> Answer:
    answer = Answer(request, due, sent=time.perf_counter(), on_end=ended.put)
    try:
        system.submit(request, answer)
    except Exception as error:
        answer.end(type(error).__name__)
    return answer


def _collect(ended: queue.SimpleQueue[Answer], count: int, until: float) -> bool:
    """Wait for `count` answers to end; return whether they did in time."""
    for _ in range(count):
        try:
            ended.get(timeout=max(until - time.perf_counter(), 0.001))
        except queue.Empty:
            return False
    return True


# --- measures ----------------------------------------------------------------------------------------


def figures(trial: Trial) -> dict[str, Any]:
    """Return the measures of a trial, for JSON.

    `chosen` counts the adapters that the requests name, the base too. `lost` counts answers without an end, `short`
    those with fewer tokens than requested and no error. Latencies are of complete answers, in seconds; a lost answer
    counts with the time until the run gave up, because leaving it out would flatter a system that never answers.
    """
    answers = trial.answers
    lost = [a for a in answers if a.ended is None]
    errors = Counter(a.error for a in answers if a.error is not None)
    whole = [a for a in answers if a.ended is not None and a.error is None]
    seconds = trial.finished - trial.began
    first = [a.times[0] - a.due for a in whole if a.times]
    first += [(a.times[0] if a.times else trial.finished) - a.due for a in lost]
    gaps = [
        after - before for a in whole for before, after in zip(a.times, a.times[1:], strict=False)
    ]
    tokens = sum(len(a.times) for a in answers)
    return {
        "requests": len(answers),
        "chosen": len({a.request.adapter for a in answers}),
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "requests_per_second": len(whole) / seconds,
        "first_token": percentiles(first),
        "between_tokens": percentiles(gaps),
        "whole_answer": percentiles([a.ended - a.due for a in whole if a.ended is not None]),
        "errors": dict(errors),
        "lost": len(lost),
        "short": sum(len(a.times) < a.request.tokens for a in whole),
        "late": max((a.sent - a.due for a in answers), default=0.0),
    }


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """Return the percentiles of some values by name, or nothing for no values."""
    found = np.fromiter(values, float)
    if not len(found):
        return {}
    return {f"p{p}": float(np.percentile(found, p)) for p in PERCENTILES}


class Batches:
    """A queue and a thread for a system that computes whole batches.

    A subclass implements `compute`, which gets the waiting requests and reports each answer.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Request, Answer]] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._is_computing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request, answer: Answer) -> None:
        """Queue a request."""
        with self._changed:
            self._waiting.append((request, answer))
            self._changed.notify()

    def stop(self) -> None:
        """End the thread after the current batch."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join(timeout=60)

    def drain(self) -> None:
        """Forget the waiting requests, and wait for the current batch."""
        with self._changed:
            waiting, self._waiting = self._waiting, []
        for _, answer in waiting:
            answer.end("Cancelled")
        wait_until(lambda: not self._is_computing)

    def take(self, waiting: list[tuple[Request, Answer]]) -> list[tuple[Request, Answer]]:
        """Remove and return the next batch from the waiting requests, of which there is at least one."""
        raise NotImplementedError

    def compute(self, batch: list[tuple[Request, Answer]]) -> None:
        """Compute a batch and end its answers."""
        raise NotImplementedError

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return
                batch = self.take(self._waiting)
                self._is_computing = True
            try:
                # Else the OpenMP threads of two systems in a process would slow each other.
                in_own_thread(functools.partial(self.compute, batch))
                error = "NoAnswer"
            except Exception as failure:
                error = type(failure).__name__
            for _, answer in batch:
                answer.end(error)  # does nothing for those that compute has ended
            self._is_computing = False


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    """Wait for a condition that another thread changes.

    Raises:
        TimeoutError: It did not become true.
    """
    until = time.perf_counter() + seconds
    while not condition():
        if time.perf_counter() > until:
            raise TimeoutError(f"A system did not come to rest within {seconds:.0f} s.")
        time.sleep(0.01)

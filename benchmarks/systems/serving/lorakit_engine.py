"""lorakit's engine and store in this process, without HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.serving_load import Answer, Request, wait_until
from benchmarks.systems.serving import Setup
from lorakit.models.loading import load_base
from lorakit.models.processor import in_own_thread
from lorakit.serving.answer import Answer as Ticket
from lorakit.serving.choosing import engine_for
from lorakit.serving.engine import End, Event, GenerationRequest, Sampling
from lorakit.serving.store import AdapterStore
from lorakit.serving.threaded_engine import ThreadedEngine

NAME = "lorakit, engine alone"
BUDGET = 8 << 30
"""Bytes for loaded adapters: all of them."""


def start(setup: Setup, *, budget: int = BUDGET) -> LorakitEngine:
    """Load the base, and start the engine's thread."""
    return LorakitEngine(setup, budget)


class LorakitEngine:
    """Requests take their adapters from the store in threads, as the HTTP layer does."""

    name = NAME

    engine: ThreadedEngine

    def __init__(self, setup: Setup, budget: int) -> None:
        base = in_own_thread(lambda: load_base(setup.base, dtype=setup.dtype))  # type: ignore[arg-type]
        base.model.requires_grad_(False)
        self._base = base
        self.store = in_own_thread(
            lambda: AdapterStore(
                base,
                setup.adapters,
                budget=budget,
                between_steps=lambda action: self.engine.between_steps(action).result(),
            )
        )
        self.wake()
        self._threads = ThreadPoolExecutor(8)
        self._tickets: dict[int, Ticket | None] = {}
        self._is_draining = False

    def wake(self) -> None:
        """Start an engine, after `rest`."""
        model, tokenizer = self._base.model, self._base.tokenizer
        assert tokenizer is not None
        self.engine = in_own_thread(lambda: engine_for(model, tokenizer, running=64))
        if self.engine.name != "continuous":
            raise RuntimeError(
                f"The base does not run by continuous batching: {self.engine.notice}."
            )
        self.engine.start()

    def rest(self) -> None:
        """End the engine's thread, so that its OpenMP threads do not slow another system (`in_own_thread`)."""
        self.engine.close(60)

    def prepare(self, adapters: Sequence[str]) -> None:
        """Load each adapter."""
        for name in adapters:
            self.store.acquire(name).release()

    def submit(self, request: Request, answer: Answer) -> None:
        """Acquire the adapter in a thread, and submit the request."""
        self._tickets[id(answer)] = None
        self._threads.submit(self._start, request, answer)

    def drain(self) -> None:
        """Cancel all unfinished requests."""
        self._is_draining = True

        def is_idle() -> bool:
            for ticket in list(self._tickets.values()):
                if ticket is not None:
                    ticket.cancel()
            return not self._tickets

        wait_until(is_idle)
        self._is_draining = False

    def stop(self) -> None:
        """End the engine's thread."""
        self._threads.shutdown()
        self.engine.close(60)

    def _start(self, request: Request, answer: Answer) -> None:
        if self._is_draining:
            self._end(answer, "Cancelled")
            return
        try:
            lease = self.store.acquire(request.adapter)
        except Exception as error:
            self._end(answer, type(error).__name__)
            return

        def deliver(event: Event) -> None:
            if isinstance(event, End):
                lease.release()
                failed = event.reason in ("error", "cancelled")
                error = type(event.error).__name__ if event.error else event.reason
                self._end(answer, error if failed else None)
            else:
                for _ in event.tokens:
                    answer.token()

        job = GenerationRequest(
            prompt=request.prompt,
            lease=lease,
            max_tokens=request.tokens,
            sampling=Sampling(temperature=0),
        )
        try:
            ticket = self.engine.submit(job, deliver)
        except Exception as error:
            lease.release()
            self._end(answer, type(error).__name__)
            return
        if id(answer) in self._tickets:  # unless it has ended meanwhile
            self._tickets[id(answer)] = ticket

    def _end(self, answer: Answer, error: str | None) -> None:
        answer.end(error)
        self._tickets.pop(id(answer), None)

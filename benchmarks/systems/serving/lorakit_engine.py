"""lorakit's engine and store in this process, without HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.serving_load import Answer, Request, wait_until
from benchmarks.systems.serving import Setup
from lorakit.models.loading import load_base
from lorakit.serving.choosing import engine_for
from lorakit.serving.engine import End, Event, GenerationRequest, Sampling, Ticket
from lorakit.serving.store import AdapterStore
from lorakit.serving.worker import Worker

NAME = "lorakit, engine alone"
BUDGET = 8 << 30
"""Bytes for loaded adapters: all of them."""


def start(setup: Setup, *, budget: int = BUDGET) -> LorakitEngine:
    """Load the base, and start the engine's thread."""
    return LorakitEngine(setup, budget)


def open_engine(setup: Setup, budget: int) -> tuple[AdapterStore, Worker]:
    """Return a store of adapters and a started engine on one base."""
    base = load_base(setup.base, dtype=setup.dtype)  # type: ignore[arg-type]
    assert base.tokenizer is not None
    base.model.requires_grad_(False)
    engine = engine_for(base.model, base.tokenizer)
    if engine.name != "continuous":
        raise RuntimeError(f"The base does not run by continuous batching: {engine.notice}.")
    store = AdapterStore(
        base,
        setup.adapters,
        budget=budget,
        between_steps=lambda action: engine.between_steps(action).result(),
    )
    engine.start()
    return store, engine


class LorakitEngine:
    """Requests take their adapters from the store in threads, as the HTTP layer does."""

    name = NAME

    def __init__(self, setup: Setup, budget: int) -> None:
        self.store, self.engine = open_engine(setup, budget)
        self._threads = ThreadPoolExecutor(8)
        self._tickets: dict[int, Ticket | None] = {}
        self._is_draining = False

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
                for token in event.tokens:
                    answer.token(token.id)

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

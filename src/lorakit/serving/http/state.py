"""The objects that all routes of a server use, and the record of one request."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from lorakit.adapters.choice import AdapterChoice
from lorakit.serving.adapter_memory_queue import AdapterMemoryQueue
from lorakit.serving.answer import Answer
from lorakit.serving.engine import Event, GenerationRequest, Lease, QueueFullError
from lorakit.serving.errors import EngineStoppedError, UnknownAdapterError
from lorakit.serving.http.errors import (
    RETRY_SECONDS,
    ApiError,
    ClientGone,
    invalid_value,
    unknown_model,
)
from lorakit.serving.http.keys import OPEN, Key, KeyRing
from lorakit.serving.http.metrics import Metrics, model_label
from lorakit.serving.serve_config import ServeConfig
from lorakit.serving.store import AdapterStore
from lorakit.serving.threaded_engine import ThreadedEngine
from lorakit.serving.verification import Verifier

T = TypeVar("T")

THREADS = 8
"""Threads of each pool."""


@dataclass
class RequestRecord:
    """The record of one request."""

    id: str
    began: float
    key: Key = OPEN
    model: str | None = None
    """Name of the model for the metrics, once it is known to exist."""
    status: int = 0
    """HTTP status of the answer, for the metrics."""


@dataclass(eq=False)
class Serving:
    """The objects that all routes of a server use."""

    engine: ThreadedEngine
    store: AdapterStore
    config: ServeConfig
    base_name: str
    """Name of the base in the field `model`."""
    keys: KeyRing | None
    verifier: Verifier | None
    began: float = field(default_factory=time.time)
    in_flight: int = 0
    """Requests that are not answered yet, and that arrived before the signal to end: shutdown waits for these only."""
    computing: int = 0
    """Requests for tokens or classes that are not answered yet."""
    is_draining: bool = False
    """Whether new requests are refused, by `problem`. Requests that were accepted before are finished."""
    workers: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(THREADS, thread_name_prefix="lorakit-http")
    )
    loaders: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(THREADS, thread_name_prefix="lorakit-load")
    )
    """Read adapters, and prepare the requests for them: render chat templates and tokenise. To install an adapter, a
    thread waits for a step of the engine, on the batched engine for a batch."""
    preparers: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(THREADS, thread_name_prefix="lorakit-prepare")
    )
    """Prepare the requests for the base and pinned adapters, which wait for no other adapter."""

    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine.status, self.store.stats)
        self.memory_queue = AdapterMemoryQueue()
        self.store.freed = self.memory_queue.freed

    def problem(self) -> str | None:
        """Return why no request can be answered; None if the server is well."""
        status = self.engine.status()
        if not status.is_alive:
            return "The engine has stopped. Restart the server; its log has the reason."
        if self.is_draining:
            return "The server is shutting down."
        return None

    def models(self, key: Key) -> list[str]:
        """Return the names of the models that a key may use: the base, then the adapters."""
        # A folder that has got the base's name since the start cannot be requested.
        names = dict.fromkeys([self.base_name, *self.store.names()])
        return [name for name in names if key.allows(name)]

    def require_model(self, key: Key, name: str) -> None:
        """Raise unless a key may use a model.

        Raises:
            ApiError: 404, which lists the models that it may use.
        """
        known = self.models(key)
        if name not in known:
            raise unknown_model(name, known)

    def _choice(self, model: str, lora: Mapping[str, float] | None) -> AdapterChoice:
        """Return the adapters that a request names.

        Raises:
            ApiError: 400 for a blend on an adapter, or of too many.
        """
        if lora is None:
            return None if model == self.base_name else model
        if model != self.base_name:
            raise invalid_value(
                f"'lora' blends adapters on the base, but 'model' is the adapter {model!r:.200}. Set it to "
                f"{self.base_name!r}.",
                "lora",
            )
        most = self.config.max_blend
        if not lora or len(lora) > most or model in lora:
            raise invalid_value(
                f"'lora' has {len(lora)} adapters; it must be a mapping from names of adapters to weights, with 1 to "
                f"{most} entries (max_blend).",
                "lora",
            )
        return dict(lora)

    def _acquire(
        self, record: RequestRecord, model: str, lora: Mapping[str, float] | None
    ) -> Lease:
        """Acquire the adapters that a request names.

        A model that the key may not use is answered as one that does not exist: the answer says nothing of others'.
        """
        named = {"model": model, **{f"lora.{name}": name for name in lora or ()}}
        try:
            if not all(map(record.key.allows, named.values())):
                raise UnknownAdapterError
            lease = self.store.acquire(self._choice(model, lora))
        except UnknownAdapterError:
            known = self.models(record.key)
            param = next((p for p, name in named.items() if name not in known), "model")
            raise unknown_model(named[param], known, param) from None
        record.model = model_label(lease.receipt, self.base_name)
        return lease

    async def in_worker(self, work: Callable[[], T]) -> T:
        """Run a function in a worker thread."""
        return await asyncio.wrap_future(self.workers.submit(work))

    async def acquire_and_prepare(
        self,
        record: RequestRecord,
        prepare: Callable[[Lease], T],
        model: str,
        lora: Mapping[str, float] | None = None,
    ) -> tuple[Lease, T]:
        """Acquire a request's adapters and prepare the request, in another thread. Count it in `computing`.

        Waits until there is memory for the adapters; the base and pinned ones do not wait for others. After an error or
        a cancellation, the lease is released and the request no longer counts. Otherwise the caller calls `release`.

        Raises:
            ApiError: 404 for an unknown model, 400 for an invalid blend.
        """

        def work() -> tuple[Lease, T]:
            lease = self._acquire(record, model, lora)
            try:
                return lease, prepare(lease)
            except BaseException:
                lease.release()
                raise

        def abandon(future: Future[tuple[Lease, T]]) -> None:
            if future.cancelled() or future.exception() is not None:
                self._count(-1)
                self.memory_queue.freed()  # it may have held some adapters of a blend
            else:
                self.release(future.result()[0])

        async def attempt() -> tuple[Lease, T]:
            future = pool.submit(work)
            try:
                return await asyncio.wrap_future(future)
            except asyncio.CancelledError:
                self._count(1)  # until the thread has ended
                future.add_done_callback(abandon)
                raise

        self._count(1)
        try:
            names = {*(lora or [model])} - {self.base_name}
            are_pinned = self.store.are_pinned(names)
            pool = self.preparers if are_pinned else self.loaders
            return await self.memory_queue.acquire(attempt, overtakes=are_pinned)
        except BaseException:
            self._count(-1)
            raise

    def submit(self, request: GenerationRequest, deliver: Callable[[Event], Any]) -> Answer:
        """Queue a request for text (`ThreadedEngine.submit`). The verifier, if there is one, may replay its answer."""
        if self.verifier is not None:
            request, deliver = self.verifier.watch(request, deliver)
        return self.engine.submit(request, deliver)

    def submit_leased(self, lease: Lease, submit: Callable[[], Future[T]]) -> Future[T]:
        """Queue a leased request with `submit`, and return its future.

        Calls `release` when the future is done, also if nobody waits for it any more, or at once if `submit` fails.

        Raises:
            ApiError: 429 for a full queue.
        """
        try:
            future = submit()
        except BaseException as error:
            self.release(lease)
            if isinstance(error, QueueFullError):
                raise busy(self) from None
            raise
        future.add_done_callback(lambda _: self.release(lease))
        return future

    def release(self, lease: Lease) -> None:
        """End a leased request, from any thread."""
        self._count(-1)
        lease.release()

    def _count(self, change: int) -> None:
        with self._lock:
            self.computing += change
            self.metrics.open_requests.set(self.computing)


def serving_of(request: Request) -> Serving:
    """Return the objects that all routes use."""
    return request.app.state.serving


def record_of(request: Request) -> RequestRecord:
    """Return the record of a request."""
    return request.scope["lorakit.record"]


async def guarded(request: Request, work: Awaitable[T]) -> T:
    """Return the result of some work on a request, unless its client goes or its time ends; then cancel the work.

    Raises:
        ClientGone: The client closed the connection.
        ApiError: 408, after `max_seconds` from the start of the request.
    """
    most = serving_of(request).config.max_seconds
    left = record_of(request).began + most - time.monotonic()
    task: asyncio.Future[T] = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGone
        raise ApiError(
            408,
            f"The request took longer than {most:g} seconds, the limit max_seconds of this server, and was cancelled.",
            code="max_seconds",
            final=True,
        )
    finally:
        for future in (task, gone):
            if not future.done():
                future.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await future


async def _until_gone(request: Request) -> None:
    """Return when the client has closed the connection. The body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def require_capacity(serving: Serving) -> None:
    """Reject a request for tokens or classes that the server cannot accept now.

    Raises:
        EngineStoppedError: The server is not well.
        ApiError: 429 if its queue is full.
    """
    if problem := serving.problem():
        raise EngineStoppedError(problem)
    limits = serving.engine.limits
    if serving.computing >= (serving.config.max_requests or limits.running + limits.queue):
        raise busy(serving)


def busy(serving: Serving) -> ApiError:
    """Return the 429 for a full queue."""
    return ApiError(
        429,
        f"The server already works on {serving.computing:,} requests, and its queue is full (max_queue, max_requests). "
        "Try again later.",
        code="queue_full",
        retry=RETRY_SECONDS,
    )

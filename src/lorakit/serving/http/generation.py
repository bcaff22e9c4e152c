"""The answers of one request while the engine computes them."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from starlette.requests import Request

from lorakit.serving.answer import Answer
from lorakit.serving.engine import (
    End,
    Event,
    GenerationRequest,
    Holders,
    Lease,
    Piece,
    QueueFullError,
    Sampling,
    Token,
    factor,
)
from lorakit.serving.errors import EngineStoppedError
from lorakit.serving.http.answers import FinishReason, PromptTokens, Usage
from lorakit.serving.http.errors import ApiError, api_error, require_at_most, unknown_model
from lorakit.serving.http.keys import Key
from lorakit.serving.http.logprobs import finite
from lorakit.serving.http.prompts import special_stops
from lorakit.serving.http.schemas import ChatRequest, CompletionRequest
from lorakit.serving.http.state import (
    RequestRecord,
    Serving,
    busy,
    guarded,
    record_of,
    require_capacity,
    serving_of,
)
from lorakit.serving.serve_config import ServeConfig

T = TypeVar("T")

Prompts = tuple[list[list[int]], frozenset[int]]
"""Token ids of each prompt, and the tokens that end an answer."""


def _require_limits(config: ServeConfig, body: CompletionRequest | ChatRequest) -> None:
    """Reject a request with a field above one of the server's limits.

    Raises:
        ApiError: A field exceeds a limit.
    """
    tokens_field, max_tokens = body.max_tokens_field
    logprobs_field, top_logprobs = body.top_logprobs_field
    prompts, n = (1 if isinstance(body, ChatRequest) else len(body.prompts)), body.n or 1
    require_at_most(tokens_field, max_tokens or 0, config.max_tokens, "max_tokens")
    field, unit = ("prompt", "prompts") if n == 1 else ("n", "answers (prompts times n)")
    require_at_most(field, prompts * n, config.max_choices, "max_choices", unit)
    require_at_most("stop", len(body.stops), config.max_stops, "max_stops", "stop texts")
    for text in body.stops:
        require_at_most(
            "stop", len(text), config.max_stop_length, "max_stop_length", "characters in a text"
        )
    require_at_most(logprobs_field, top_logprobs or 0, config.max_top_logprobs, "max_top_logprobs")


def _sampling(body: CompletionRequest | ChatRequest) -> Sampling:
    return Sampling(
        temperature=1.0 if body.temperature is None else float(body.temperature),
        top_p=1.0 if body.top_p is None else float(body.top_p),
        top_k=body.top_k or 0,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
    )


def derived_seed(seed: int, index: int) -> int:
    """Return the seed of an answer; the first has the request's own."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


async def begin(
    request: Request, body: CompletionRequest | ChatRequest, encode: Callable[[Lease], Prompts]
) -> Generation:
    """Acquire the adapters, encode the prompts, and submit an engine request for each answer.

    Raises:
        ApiError: The request cannot be answered. Then nothing is leased.
    """
    serving, record = serving_of(request), record_of(request)
    _require_limits(serving.config, body)
    require_capacity(serving)
    answers, sampling = body.n or 1, _sampling(body)
    is_chat = isinstance(body, ChatRequest)
    continues = not is_chat and not serving.engine.limits.is_encoder_decoder

    def prepare(lease: Lease) -> list[GenerationRequest]:
        if body.base_logprobs:
            _require_base(serving, record.key)
        prompts, stop_ids = encode(lease)
        field = "messages" if is_chat else "prompt"
        stop_ids |= special_stops(lease.tokenizer, body.stops)
        return [
            GenerationRequest(
                prompt=ids,
                lease=lease,
                max_tokens=_room(serving, ids, body.max_tokens_field[1], field),
                sampling=replace(sampling, seed=derived_seed(sampling.seed, p * answers + k)),
                stop=body.stops,
                stop_ids=stop_ids,
                top_logprobs=body.top_logprobs_field[1],
                text_before=ids if continues else (),
            )
            for p, ids in enumerate(prompts)
            for k in range(answers)
        ]

    async def work() -> Generation:
        _, requests = await serving.acquire_and_prepare(record, prepare, body.model, body.lora)
        generation = Generation(serving, record, requests, answers)
        generation.start()
        return generation

    return await guarded(request, work())


def _require_base(serving: Serving, key: Key) -> None:
    """Reject a request for the base's log-probabilities before its answer is computed. Runs in a worker thread.

    Raises:
        ApiError: The key may not use the base.
        AdapterStateError: The base cannot compute alone, because its head is not trained.
    """
    name = serving.base_name
    if not key.allows(name):
        raise unknown_model(name, serving.models(key), "base_logprobs")
    serving.store.acquire(None).release()


def _room(serving: Serving, ids: Sequence[int], wanted: int | None, field: str) -> int:
    """Return the most new tokens after a prompt, which the request has in `field`; None wants all that have room.

    Raises:
        ApiError: The prompt is too long.
    """
    config, engine = serving.config, serving.engine.limits
    most, room = config.max_prompt_tokens, engine.room_after(len(ids))
    if most is not None:
        require_at_most(field, len(ids), most, "max_prompt_tokens", "tokens")
    if room < 1:
        raise ApiError(
            400,
            f"The prompt of {len(ids):,} tokens fills the context of {engine.context:,}. Shorten the prompt.",
            param=field,
            code="context_length_exceeded",
        )
    if (wanted or 0) > room:
        raise ApiError(
            400,
            f"The prompt has {len(ids):,} tokens, and with {wanted:,} new ones that exceeds the context of "
            f"{engine.context:,}. Shorten the prompt, or set a lower max_tokens.",
            param=field,
            code="context_length_exceeded",
        )
    return wanted or min(room, config.max_tokens)


class Generation:
    """The answers of one request while the engine computes them.

    The lease is released exactly once, after the last answer's End, whatever happens to the HTTP request.

    The engine requests have a common lease. Those of one prompt, `answers` of them, follow one another.
    """

    def __init__(
        self,
        serving: Serving,
        record: RequestRecord,
        requests: list[GenerationRequest],
        answers: int,
    ) -> None:
        self.requests, self.lease = requests, requests[0].lease
        self.prompt_tokens = sum(len(request.prompt) for request in requests[::answers])
        self._serving, self._record, self._answers = serving, record, answers
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, float, Event]] = asyncio.Queue()
        self._submitted: list[Answer] = []
        self._ends: dict[int, End] = {}
        self._ids: list[list[int]] = [[] for _ in requests]
        """Tokens of each answer so far."""
        self._reserved = 0
        """Tokens that the key has reserved, less those of the answers that have ended."""

    def start(self) -> None:
        """Submit an engine request for each answer.

        Raises:
            ApiError: The queue is full, the engine accepts no requests, or one exceeds a limit.
        """
        holders = Holders(self._finish)
        ended = submitted = holders.add()
        try:
            most = self.prompt_tokens + sum(r.max_tokens for r in self.requests)
            self._record.key.reserve_tokens(most)
            self._reserved = most
            for index, request in enumerate(self.requests):
                ended = holders.add()
                deliver = partial(self._deliver, index, ended)
                self._submitted.append(self._serving.submit(request, deliver))
        except BaseException as error:
            ended()  # of the request that the engine has not accepted
            self.cancel()
            if isinstance(error, QueueFullError):
                raise busy(self._serving) from None
            raise
        finally:
            submitted()

    async def in_worker(self, work: Callable[[], T]) -> T:
        """Run a function in a worker thread, such as one that decodes thousands of tokens, if a token is reported."""
        reports = self.requests[0].top_logprobs is not None
        return await self._serving.in_worker(work) if reports else work()

    async def base_logprobs(self, index: int) -> list[float]:
        """Return the log-probabilities of the tokens of an answer that has ended, by one pass of the base alone.

        The lease of the base is released after the pass, also if nobody waits for it any more.

        Raises:
            LorakitError: The engine has ended.
        """
        serving, record, prompt = self._serving, self._record, self.requests[index].prompt
        tokens = [*prompt, *self._ids[index]]
        # A record of its own: the metrics count the request under its adapters.
        own = RequestRecord(record.id, record.began, record.key)
        lease, _ = await serving.acquire_and_prepare(own, lambda lease: None, serving.base_name)
        future = serving.submit_leased(
            lease, lambda: serving.engine.score(tokens, lease, start=len(prompt))
        )
        return [finite(value) for value in await asyncio.wrap_future(future)]

    def cancel(self) -> None:
        """Stop computing. The Ends follow, and with the last the lease is released."""
        for answer in self._submitted:
            answer.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield the events of all answers with the answer's index, until all have ended.

        Raises:
            ApiError: An answer ended with an error.
            EngineStoppedError: An answer was cancelled, because the server ends.
        """
        metrics, last = self._serving.metrics, dict[int, float]()
        while len(self._ends) < len(self.requests):
            index, at, event = await self._events.get()
            if isinstance(event, Piece) and event.tokens:
                if index in last:
                    metrics.between_tokens(at - last[index], len(event.tokens))
                else:
                    metrics.first_token.observe(at - self._record.began)
                last[index] = at
                self._ids[index] += [token.id for token in event.tokens]
            if isinstance(event, End):
                self._ends[index] = event
                if event.reason == "error":
                    failure = event.error or RuntimeError("the engine gave no reason")
                    raise api_error(failure, self._record.id)
                if event.reason == "cancelled":
                    raise EngineStoppedError("The server ended the request.")
            yield index, event

    @property
    def usage(self) -> Usage:
        """The number of tokens of the answers that have ended."""
        generated = sum(end.completion_tokens for end in self._ends.values())
        cached = sum(end.cached_tokens for i, end in self._ends.items() if i % self._answers == 0)
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=generated,
            total_tokens=self.prompt_tokens + generated,
            prompt_tokens_details=PromptTokens(cached_tokens=cached),
        )

    def _deliver(self, index: int, ended: Callable[[], None], event: Event) -> None:
        """Take an event, in the engine's thread. Call `ended` after the last one."""
        with suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(
                self._events.put_nowait, (index, time.monotonic(), event)
            )
        if isinstance(event, End):
            # The answers of a prompt share it, so it counts once, as in `usage`.
            cached = 0 if index % self._answers else event.cached_tokens
            self._serving.metrics.tokens(
                self._record.model, generated=event.completion_tokens, cached=cached
            )
            self._reserved -= event.completion_tokens
            ended()

    def _finish(self) -> None:
        """Give back the tokens that were not used, and release the lease."""
        if self._submitted:
            self._serving.metrics.tokens(self._record.model, prompt=self.prompt_tokens)
            self._reserved -= self.prompt_tokens
        self._record.key.give_back_tokens(max(self._reserved, 0))
        self._serving.release(self.lease)


@dataclass
class Whole:
    """An answer that has ended."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    reason: FinishReason = "stop"


async def collect(generation: Generation) -> list[Whole]:
    """Return all answers when they have ended. Whatever happens, nothing goes on behind the caller's back.

    Raises:
        ApiError: An answer ended with an error.
    """
    answers = [Whole() for _ in generation.requests]
    texts: list[list[str]] = [[] for _ in answers]
    try:
        async for index, event in generation.events():
            if isinstance(event, Piece):
                texts[index].append(event.text)
                answers[index].tokens += event.tokens
            elif event.reason in ("stop", "length"):  # `events` raises for others
                answers[index].reason = event.reason
    finally:
        generation.cancel()
    for answer, parts in zip(answers, texts, strict=True):
        answer.text = "".join(parts)
    return answers


def receipt_headers(lease: Lease) -> dict[str, str]:
    """Return the headers with the full digests of what computes an answer."""
    receipt = lease.receipt
    adapters = [f"{digest}{factor(weight)}" for _, digest, weight in receipt.adapters]
    return {"x-lorakit-base": receipt.base, "x-lorakit-adapter": ", ".join(adapters) or "none"}

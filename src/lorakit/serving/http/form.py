"""What the forms of completions and chats have in common."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from lorakit.serving.engine import Token
from lorakit.serving.http.generation import Generation, Whole, collect, receipt_headers
from lorakit.serving.http.logprobs import TokenTexts
from lorakit.serving.http.schemas import Generating
from lorakit.serving.http.state import guarded
from lorakit.serving.http.streaming import started

Body = TypeVar("Body", bound=Generating)
Logprobs = TypeVar("Logprobs", bound=BaseModel)

_NOT_OPENAIS: Any = {"choices": {"__all__": {"base_logprobs"}}}
"""Fields that an answer has only if the client wants them."""


class Form(ABC, Generic[Body, Logprobs]):
    """Puts the events of a generation into a form of OpenAI's API."""

    def __init__(self, generation: Generation, body: Body, identity: str) -> None:
        self.generation, self.body = generation, body
        self.common: dict[str, Any] = {
            "id": identity,
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": generation.lease.receipt.fingerprint,
        }
        tokenizer = generation.lease.tokenizer
        self.texts = [TokenTexts(tokenizer, r.text_before) for r in generation.requests]

    @abstractmethod
    def logprobs(self, index: int, tokens: Sequence[Token]) -> Logprobs | None:
        """Return the log-probabilities of an answer's next tokens; None if the client does not want them."""

    @abstractmethod
    async def whole(self) -> BaseModel:
        """Return the answers when all have ended."""

    @abstractmethod
    def stream(self) -> AsyncIterator[str]:
        """Yield the events of a stream."""

    @property
    def extra(self) -> dict[str, Any]:
        """The field usage of every chunk, as in OpenAI's API, if the client wants it in the last one."""
        options = self.body.stream_options
        return {"usage": None} if options and options.include_usage else {}

    async def base_fields(self, index: int) -> dict[str, list[float]]:
        """Return the field base_logprobs of an answer that has ended, if the client wants it."""
        if not self.body.base_logprobs:
            return {}
        return {"base_logprobs": await self.generation.base_logprobs(index)}

    async def ended(self) -> list[tuple[Whole, Logprobs | None]]:
        """Return each answer with its log-probabilities, when all have ended."""
        answers = await collect(self.generation)
        logprobs = await self.generation.in_worker(
            lambda: [self.logprobs(i, answer.tokens) for i, answer in enumerate(answers)]
        )
        return [*zip(answers, logprobs, strict=True)]

    async def answer(self, request: Request) -> Response:
        """Return the HTTP answer: a stream, or one body."""
        headers = receipt_headers(self.generation.lease)
        if self.body.stream:
            return await started(request, self.generation, self.stream(), headers)
        content = await guarded(request, self.whole())
        # Ten times as fast as `model_dump` and `JSONResponse`, which stop the event loop for seconds.
        text = content.model_dump_json(exclude=None if self.body.base_logprobs else _NOT_OPENAIS)
        return Response(text, headers=headers, media_type="application/json")

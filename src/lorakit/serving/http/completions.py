"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lorakit.serving.engine import End, Lease, Piece
from lorakit.serving.http.answers import Completion, CompletionChoice, CompletionLogprobs
from lorakit.serving.http.body import StrictRoute
from lorakit.serving.http.generation import (
    Generation,
    Prompts,
    begin,
    checked_settings,
    collect,
    receipt_headers,
)
from lorakit.serving.http.logprobs import TokenTexts, completion_logprobs
from lorakit.serving.http.prompts import encode_prompt
from lorakit.serving.http.schemas import CompletionRequest
from lorakit.serving.http.state import guarded, record_of, serving_of
from lorakit.serving.http.streaming import STREAM, event, started

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/completions", response_model=Completion, responses=STREAM)
async def complete(request: Request, body: CompletionRequest) -> Response:
    """Continue texts with the base, an adapter, or a blend of adapters."""
    serving, record = serving_of(request), record_of(request)
    prompts = body.prompts
    settings = checked_settings(
        serving,
        body,
        max_tokens=body.max_tokens or 16,
        max_tokens_name="max_tokens",
        top_logprobs=body.logprobs,
        top_logprobs_name="logprobs",
        prompts=len(prompts),
    )

    def encode(lease: Lease) -> Prompts:
        context = serving.engine.limits.context
        return [encode_prompt(lease.tokenizer, prompt, context) for prompt in prompts], frozenset()

    generation = await begin(request, serving, record, body, settings, encode)
    headers = receipt_headers(generation.lease)
    form = _Form(generation, body, f"cmpl-{record.id}")
    if body.stream:
        return await started(request, generation, form.stream(), headers)
    content = await guarded(request, form.whole())
    return JSONResponse(content.model_dump(), headers=headers)


class _Form:
    """Puts events into OpenAI's form of completions."""

    def __init__(self, generation: Generation, body: CompletionRequest, identity: str) -> None:
        self._generation, self._body = generation, body
        self._common: dict[str, Any] = {
            "id": identity,
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": generation.lease.receipt.fingerprint,
        }
        self._texts = [TokenTexts(generation.lease.tokenizer) for _ in generation.requests]

    async def whole(self) -> Completion:
        """Return the answers when all have ended."""
        answers = await collect(self._generation)
        logprobs = await self._generation.in_worker(
            lambda: [self._logprobs(i, Piece("", a.tokens)) for i, a in enumerate(answers)]
        )
        choices = [
            CompletionChoice(
                index=index,
                text=answer.text,
                logprobs=logprobs[index],
                finish_reason=answer.reason,
            )
            for index, answer in enumerate(answers)
        ]
        return Completion(**self._common, choices=choices, usage=self._generation.usage)

    async def stream(self) -> AsyncIterator[str]:
        """Yield the events of a stream."""
        options = self._body.stream_options
        extra: dict[str, Any] = {"usage": None} if options and options.include_usage else {}
        async for index, part in self._generation.events():
            if isinstance(part, End):
                # `events` raises for other reasons.
                choice = CompletionChoice(
                    index=index,
                    text="",
                    logprobs=None,
                    finish_reason=part.reason,  # type: ignore[arg-type]
                )
            elif part.text or self._body.logprobs is not None:
                choice = CompletionChoice(
                    index=index,
                    text=part.text,
                    logprobs=self._logprobs(index, part),
                    finish_reason=None,
                )
            else:
                continue
            yield event(Completion(**self._common, choices=[choice], **extra))
        if extra:
            usage = self._generation.usage
            yield event(Completion(**self._common, choices=[], usage=usage))

    def _logprobs(self, index: int, piece: Piece) -> CompletionLogprobs | None:
        top = self._body.logprobs
        return None if top is None else completion_logprobs(piece.tokens, self._texts[index], top)

"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lorakit.serving.engine import End, Lease, Piece
from lorakit.serving.http.answers import (
    Chat,
    ChatChoice,
    ChatChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatPart,
)
from lorakit.serving.http.body import StrictRoute
from lorakit.serving.http.errors import ApiError
from lorakit.serving.http.generation import (
    Generation,
    Prompts,
    begin,
    checked_settings,
    collect,
    receipt_headers,
)
from lorakit.serving.http.logprobs import TokenTexts, chat_logprobs
from lorakit.serving.http.prompts import encode_chat
from lorakit.serving.http.schemas import ChatRequest
from lorakit.serving.http.state import guarded, record_of, serving_of
from lorakit.serving.http.streaming import STREAM, event, started

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/chat/completions", response_model=Chat, responses=STREAM)
async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation with the base, an adapter, or a blend of adapters."""
    serving, record = serving_of(request), record_of(request)
    most = serving.settings.limits.max_messages
    if len(body.messages) > most:
        raise ApiError(
            400,
            f"'messages' has {len(body.messages):,} messages; this server allows at most {most:,} (max_messages).",
            param="messages",
            code="max_messages",
        )
    is_new_name = body.max_completion_tokens is not None
    settings = checked_settings(
        serving,
        body,
        max_tokens=body.most_tokens,
        max_tokens_name="max_completion_tokens" if is_new_name else "max_tokens",
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        top_logprobs_name="top_logprobs",
    )

    def encode(lease: Lease) -> Prompts:
        ids, stop_ids = encode_chat(lease.tokenizer, body.messages, serving.engine.limits.context)
        return [ids], stop_ids

    generation = await begin(request, serving, record, body, settings, encode)
    headers = receipt_headers(generation.lease)
    form = _Form(generation, body, f"chatcmpl-{record.id}")
    if body.stream:
        return await started(request, generation, form.stream(), headers)
    content = await guarded(request, form.whole())
    return JSONResponse(content.model_dump(), headers=headers)


class _Form:
    """Puts events into OpenAI's form of chats."""

    def __init__(self, generation: Generation, body: ChatRequest, identity: str) -> None:
        self._generation, self._body = generation, body
        self._common: dict[str, Any] = {
            "id": identity,
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": generation.lease.receipt.fingerprint,
        }
        self._texts = [TokenTexts(generation.lease.tokenizer) for _ in generation.requests]

    async def whole(self) -> Chat:
        """Return the answers when all have ended."""
        answers = await collect(self._generation)
        logprobs = await self._generation.in_worker(
            lambda: [self._logprobs(i, Piece("", a.tokens)) for i, a in enumerate(answers)]
        )
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(content=answer.text),
                logprobs=logprobs[index],
                finish_reason=answer.reason,
            )
            for index, answer in enumerate(answers)
        ]
        return Chat(**self._common, choices=choices, usage=self._generation.usage)

    async def stream(self) -> AsyncIterator[str]:
        """Yield the events of a stream: for each answer its role, its text in parts, its end."""
        begun: set[int] = set()
        async for index, part in self._generation.events():
            if index not in begun:
                begun.add(index)
                yield self._chunk(index, ChatDelta(role="assistant", content=""))
            if isinstance(part, End):
                yield self._chunk(index, ChatDelta(), finish_reason=part.reason)
            elif part.text or (self._body.logprobs and part.tokens):
                delta = ChatDelta(content=part.text)
                yield self._chunk(index, delta, logprobs=self._logprobs(index, part))
        if self._extra:
            usage = self._generation.usage
            common = {**self._common, "object": "chat.completion.chunk"}
            yield event(ChatChunk(**common, choices=[], usage=usage))

    def _chunk(self, index: int, delta: ChatDelta, **settings: Any) -> str:
        settings = {"logprobs": None, "finish_reason": None, **settings}
        choices = [ChatPart(index=index, delta=delta, **settings)]
        common = {**self._common, "object": "chat.completion.chunk", **self._extra}
        return event(ChatChunk(**common, choices=choices))

    @property
    def _extra(self) -> dict[str, Any]:
        """As in OpenAI's API, every chunk has the field usage if the client wants the last one."""
        options = self._body.stream_options
        return {"usage": None} if options and options.include_usage else {}

    def _logprobs(self, index: int, piece: Piece) -> ChatLogprobs | None:
        return chat_logprobs(piece.tokens, self._texts[index]) if self._body.logprobs else None

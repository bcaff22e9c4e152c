"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorakit.serving.engine import End, Lease, Token
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
from lorakit.serving.http.errors import require_at_most
from lorakit.serving.http.form import Form
from lorakit.serving.http.generation import Prompts, begin
from lorakit.serving.http.logprobs import chat_logprobs
from lorakit.serving.http.prompts import encode_chat
from lorakit.serving.http.schemas import ChatRequest
from lorakit.serving.http.state import record_of, serving_of
from lorakit.serving.http.streaming import STREAM, event

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/chat/completions", response_model=Chat, responses=STREAM)
async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation with the base, an adapter, or a blend of adapters."""
    serving = serving_of(request)
    most = serving.config.max_messages
    require_at_most("messages", len(body.messages), most, "max_messages", "messages")

    def encode(lease: Lease) -> Prompts:
        context, variables = serving.engine.limits.context, body.chat_template_kwargs
        ids, stop_ids = encode_chat(lease.tokenizer, body.messages, context, variables)
        return [ids], stop_ids

    generation = await begin(request, body, encode)
    return await _Form(generation, body, f"chatcmpl-{record_of(request).id}").answer(request)


class _Form(Form[ChatRequest, ChatLogprobs]):
    """Puts events into OpenAI's form of chats."""

    def logprobs(self, index: int, tokens: Sequence[Token]) -> ChatLogprobs | None:
        return chat_logprobs(tokens, self.texts[index]) if self.body.logprobs else None

    async def whole(self) -> Chat:
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(content=answer.text),
                logprobs=logprobs,
                finish_reason=answer.reason,
                **await self.base_fields(index),
            )
            for index, (answer, logprobs) in enumerate(await self.ended())
        ]
        return Chat(**self.common, choices=choices, usage=self.generation.usage)

    async def stream(self) -> AsyncIterator[str]:
        """Yield the events of a stream: for each answer its role, its text in parts, its end."""
        begun: set[int] = set()
        async for index, part in self.generation.events():
            if index not in begun:
                begun.add(index)
                yield self._part(index, ChatDelta(role="assistant", content=""))
            if isinstance(part, End):
                fields = await self.base_fields(index)
                yield self._part(index, ChatDelta(), finish_reason=part.reason, **fields)
            elif part.text or (self.body.logprobs and part.tokens):
                delta = ChatDelta(content=part.text)
                yield self._part(index, delta, logprobs=self.logprobs(index, part.tokens))
        if self.extra:
            yield self._chunk([], usage=self.generation.usage)

    def _part(self, index: int, delta: ChatDelta, **settings: Any) -> str:
        settings = {"logprobs": None, "finish_reason": None, **settings}
        return self._chunk([ChatPart(index=index, delta=delta, **settings)], **self.extra)

    def _chunk(self, choices: list[ChatPart], **fields: Any) -> str:
        chunk = ChatChunk(**self.common, object="chat.completion.chunk", choices=choices, **fields)
        return event(chunk)

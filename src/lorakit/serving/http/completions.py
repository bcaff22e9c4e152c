"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorakit.serving.engine import End, Lease, Token
from lorakit.serving.http.answers import Completion, CompletionChoice, CompletionLogprobs
from lorakit.serving.http.body import StrictRoute
from lorakit.serving.http.form import Form
from lorakit.serving.http.generation import Prompts, begin
from lorakit.serving.http.logprobs import completion_logprobs
from lorakit.serving.http.prompts import encode_prompt
from lorakit.serving.http.schemas import CompletionRequest
from lorakit.serving.http.state import record_of, serving_of
from lorakit.serving.http.streaming import STREAM, event

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/completions", response_model=Completion, responses=STREAM)
async def complete(request: Request, body: CompletionRequest) -> Response:
    """Continue texts with the base, an adapter, or a blend of adapters."""
    prompts, context = body.prompts, serving_of(request).engine.limits.context

    def encode(lease: Lease) -> Prompts:
        ids = [encode_prompt(lease.tokenizer, prompt, context) for prompt in prompts]
        return ids, frozenset()

    generation = await begin(request, body, encode)
    return await _Form(generation, body, f"cmpl-{record_of(request).id}").answer(request)


class _Form(Form[CompletionRequest, CompletionLogprobs]):
    """Puts events into OpenAI's form of completions."""

    def logprobs(self, index: int, tokens: Sequence[Token]) -> CompletionLogprobs | None:
        top = self.body.logprobs
        return None if top is None else completion_logprobs(tokens, self.texts[index], top)

    async def whole(self) -> Completion:
        choices = [
            CompletionChoice(
                index=index,
                text=answer.text,
                logprobs=logprobs,
                finish_reason=answer.reason,
                **await self.base_fields(index),
            )
            for index, (answer, logprobs) in enumerate(await self.ended())
        ]
        return self._completion(choices, usage=self.generation.usage)

    async def stream(self) -> AsyncIterator[str]:
        async for index, part in self.generation.events():
            if isinstance(part, End):
                # `events` raises for other reasons.
                choice = CompletionChoice(
                    index=index,
                    text="",
                    logprobs=None,
                    finish_reason=part.reason,  # type: ignore[arg-type]
                    **await self.base_fields(index),
                )
            elif part.text or self.body.logprobs is not None:
                choice = CompletionChoice(
                    index=index,
                    text=part.text,
                    logprobs=self.logprobs(index, part.tokens),
                    finish_reason=None,
                )
            else:
                continue
            yield event(self._completion([choice], **self.extra))
        if self.extra:
            yield event(self._completion([], usage=self.generation.usage))

    def _completion(self, choices: list[CompletionChoice], **fields: Any) -> Completion:
        return Completion(**self.common, object="text_completion", choices=choices, **fields)

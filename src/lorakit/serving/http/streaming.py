"""Answers as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lorakit.serving.http.errors import ClientGone, api_error
from lorakit.serving.http.generation import Generation
from lorakit.serving.http.state import guarded, record_of

DONE = "data: [DONE]\n\n"
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The whole answer; with stream: true, server-sent events that end in [DONE]",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
"""Documents that an answer may be a stream."""


def event(content: BaseModel) -> str:
    """Return a server-sent event. Unset fields are left out, as in OpenAI's API.

    In ASCII, because some clients (httpx) also end a line at U+0085 or U+2028, which a text may contain.
    """
    return f"data: {content.model_dump_json(exclude_unset=True, ensure_ascii=True)}\n\n"


class EventStream(Response):
    """Sends events until [DONE]. An error is the last event; the client's disconnect cancels the generation."""

    media_type = "text/event-stream"

    def __init__(
        self, generation: Generation, events: AsyncIterator[str], headers: dict[str, str]
    ) -> None:
        super().__init__(
            headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._generation, self._events = generation, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""

        async def write(text: str, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        async def write_all() -> None:
            async for text in self._events:
                await write(text)

        record = record_of(Request(scope))
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await guarded(Request(scope, receive), write_all())
        except ClientGone as gone:
            record.status = gone.status_code
        except Exception as error:
            self._generation.cancel()  # before the write, which waits for a client that reads slowly
            wrong = api_error(error, record.id)
            record.status = wrong.status_code
            await write(f"data: {json.dumps(wrong.content)}\n\n", more=False)
        else:
            await write(DONE, more=False)
        finally:
            self._generation.cancel()


async def started(
    request: Request, generation: Generation, events: AsyncIterator[str], headers: dict[str, str]
) -> EventStream:
    """Return a stream whose first event has been computed, so that an error before it has a status of its own."""
    try:
        first = await guarded(request, anext(events))
    except BaseException:
        generation.cancel()
        raise

    async def all_events() -> AsyncIterator[str]:
        yield first
        async for text in events:
            yield text

    return EventStream(generation, all_events(), headers)

"""Read bodies: within a number of bytes and seconds, as strict JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from lorakit import storage
from lorakit.formatting import size
from lorakit.serving.http.errors import ApiError, ClientGone
from lorakit.serving.http.state import record_of, serving_of

LARGE = 65_536
"""Bytes of a body that a worker thread parses: it takes longer than other requests should wait."""


class StrictRequest(Request):
    """A request whose body is read within the limits, also one without a content-length."""

    async def body(self) -> bytes:
        """Return the body, and count the request, also if it is invalid.

        Raises:
            ApiError: It is too large, too slow, or not JSON by its content-type; or the key has sent too many.
            ClientGone: The client closed the connection.
        """
        if not hasattr(self, "_body"):
            record_of(self).key.take_request()
            config = serving_of(self).config
            try:
                self._body = await asyncio.wait_for(
                    self._read(config.max_body), config.max_body_seconds
                )
            except asyncio.TimeoutError:
                raise ApiError(
                    408,
                    f"The body did not arrive within {config.max_body_seconds:g} seconds, the limit "
                    "max_body_seconds of this server.",
                    code="max_body_seconds",
                    close=True,
                ) from None
        return self._body

    async def json(self) -> Any:
        """Return the value of the body."""
        if not hasattr(self, "_json"):
            body = await self.body()
            parse = partial(_parsed, body)
            is_large = len(body) > LARGE
            self._json = await serving_of(self).in_worker(parse) if is_large else parse()
        return self._json

    async def _read(self, most: int) -> bytes:
        self._check_type()
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > most:
            raise _too_large(most)
        chunks, length = [], 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunks.append(message.get("body", b""))
            length += len(chunks[-1])
            if length > most:
                raise _too_large(most)
            if not message.get("more_body"):
                return b"".join(chunks)

    def _check_type(self) -> None:
        """Reject other types. A page of another site can send JSON only if we allow it by CORS, and we never do."""
        content_type = self.headers.get("content-type", "")
        kind = content_type.split(";")[0].strip().lower()
        if kind != "application/json" and not (
            kind.startswith("application/") and kind.endswith("+json")
        ):
            raise ApiError(
                415,
                f"The content-type is {content_type!r:.100}; it must be application/json.",
                code="unsupported_media_type",
                close=True,
            )


class StrictRoute(APIRoute):
    """A route whose body is a `StrictRequest`'s."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler for a strict request."""
        original = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await original(StrictRequest(request.scope, request.receive))

        return handler


def _parsed(body: bytes) -> Any:
    """Return the value of JSON text.

    Raises:
        ApiError: It is no JSON, or not everyone reads it alike.
    """
    try:
        value = json.loads(body.decode("utf-8"), **storage.STRICT_JSON)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    except UnicodeEncodeError:  # a client has cut a text inside an emoji
        reason = "a text has half of a surrogate pair"
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno}, column {error.colno}: {error.msg}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise ApiError(400, f"The body is not JSON: {reason}.", code="invalid_json")


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"The body is larger than {size(most)}, the limit max_body of this server.",
        code="max_body",
        close=True,
    )

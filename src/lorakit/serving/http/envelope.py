"""What surrounds every route: request id, host, key, metrics, and an answer for every exception."""

from __future__ import annotations

import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.serving.http.errors import LOG, ApiError, api_error, error_answer
from lorakit.serving.http.playground import PUBLIC
from lorakit.serving.http.state import RequestRecord, Serving

HEALTH = "/health"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Envelope:
    """Surrounds every route. Pure ASGI, so that it sees routes that do not exist, and streams pass unchanged."""

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self.app, self.serving = app, serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            # In a copy: by its own scope, uvicorn leaves out the body.
            scope = {**scope, "method": "GET"}
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        record = RequestRecord(
            id=given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex, began=time.monotonic()
        )
        scope["lorakit.record"] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        counts = not self.serving.is_draining
        self.serving.in_flight += counts
        try:
            self._check(scope, headers, record)
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if record.status:  # it is sent; a cut answer shows the client that it is not whole
                LOG.error("request %s failed within its answer", record.id, exc_info=error)
            else:
                await error_answer(api_error(error, record.id))(scope, receive, send_with_id)
        finally:
            self.serving.in_flight -= counts
            seconds = time.monotonic() - record.began
            # The route's pattern: paths of clients must not become labels.
            route = getattr(scope.get("route"), "path", "(none)")
            self.serving.metrics.request(record.model, route, record.status, seconds)

    def _check(self, scope: Scope, headers: Headers, record: RequestRecord) -> None:
        """Reject a request to another host, or without a valid key. Covers every route but the page's files."""
        hosts, host = self.serving.config.allowed_hosts, headers.get("host", "")
        if hosts and re.sub(r":\d*$", "", host) not in hosts:  # without the port
            raise ApiError(
                403,
                f"The Host header is {host!r:.100}. This server answers to {', '.join(hosts)} only, "
                "since it has no keys. Add --keys FILE, or let the proxy send 'Host: 127.0.0.1'.",
                code="host_not_allowed",
            )
        if self.serving.keys is not None and not self._is_public(scope["method"], scope["path"]):
            record.key = self.serving.keys.find(headers.get("authorization"))

    def _is_public(self, method: str, path: str) -> bool:
        """Return whether a request needs no key."""
        if path == HEALTH:
            return self.serving.config.health_without_key
        return method == "GET" and path in PUBLIC

"""Several processes of `lorakit serve` behind one address, as replicas under Ray Serve.

    pip install "lorakit[serve]" "ray[serve]"
    PYTHONPATH=$PWD/examples serve run ray_serve:build replicas=2 base.name=MODEL adapters=$PWD/out/adapters
    curl http://127.0.0.1:8000/v1/models

`replicas` and `cpus` (the cores of a replica) are options of this file. All others are those of `lorakit serve`. Ray
has the address: `serve start --http-port 9000` before `serve run` sets another one. Routes, fields, errors and keys are
those of `lorakit serve`, and each answer names its replica in `x-lorakit-replica`.

A request passes two processes: the ingress, which picks a replica by the adapter that the request names, and the
replica, which computes. When a replica dies, the ingress sends its requests to another one. Answers depend on the
seed alone, so the ingress sets a seed where a request has none. The other replica then repeats the answer, also one
whose first half the client already has. Meanwhile Ray starts a new replica.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from lorakit.cli.parsing import parse
from lorakit.cli.serve import app_of
from lorakit.errors import ConfigurationError
from lorakit.models.processor import in_own_thread
from lorakit.serving.http.errors import ApiError, error_answer
from lorakit.serving.http.keys import read_keys
from lorakit.serving.opening import open_all
from lorakit.serving.serve_config import ServeConfig

ATTEMPTS = 3
"""Replicas that may die of one request. It may be the reason, so it does not get them all."""
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
"""Sends requests with the same session_id to the same replica, and to the next one while that one is full."""
_OF_ONE_PROCESS = ("port", "open", "prompt", "access_log", "allow_loading", "verify_stops")
_SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string")
_GENERATING = ("/v1/completions", "/v1/chat/completions")
_CREATED = re.compile(rb'"created":\d+')
_LOG = logging.getLogger("ray.serve")

Headers = list[tuple[bytes, bytes]]


@dataclass
class Part:
    """A piece of an answer: one event of a stream, or all of another answer."""

    status: int
    headers: Headers
    body: bytes

    @property
    def receipt(self) -> Headers:
        """The digests of the base and the adapters."""
        return sorted(h for h in self.headers if h[0] in (b"x-lorakit-base", b"x-lorakit-adapter"))

    @property
    def replica(self) -> bytes:
        """The name of the replica that sends it."""
        return dict(self.headers)[b"x-lorakit-replica"]


class Replica:
    """One server of lorakit, without a socket."""

    def __init__(self, config: ServeConfig) -> None:
        opened = in_own_thread(lambda: open_all(config, lambda receipt, verdict: None))
        keys = None if config.keys is None else read_keys(config.keys)
        self.app = app_of(config, opened, keys)
        self.name = serve.get_replica_context().replica_id.unique_id.encode()
        opened.engine.start()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Part]:
        """Yield the parts of an answer. A caller that stops reading cancels the request."""
        messages: asyncio.Queue[Any] = asyncio.Queue()
        unread, gone = [body], asyncio.Event()

        async def receive() -> dict[str, Any]:
            if unread:
                return {"type": "http.request", "body": unread.pop()}
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self.app(scope, receive, messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            start = await messages.get()
            # Ray adds x-request-id, the same one for all attempts.
            headers = [h for h in start["headers"] if h[0] != b"x-request-id"]
            headers.append((b"x-lorakit-replica", self.name))
            while message := await messages.get():
                yield Part(start["status"], headers, message["body"])
        finally:
            gone.set()
            await task

    def check_health(self) -> None:
        """Raise an error once the engine has died. Ray then replaces this replica."""
        if problem := self.app.state.serving.problem():
            raise RuntimeError(problem)


@dataclass
class Sent:
    """The events that the client has, by answer: the answers of a request take turns in another order each time."""

    receipt: Headers | None = None
    created: bytes = b""
    events: defaultdict[int, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    repeated: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))

    def next(self, part: Part) -> Part | None:
        """Return the part as the client's next one, or None if the client has it.

        Raises:
            ApiError: It differs from what the client has.
        """
        if self.receipt is None:
            self.receipt = part.receipt
            self.created = (_CREATED.search(part.body) or [b""])[0]
        body = _CREATED.sub(self.created, part.body, count=1)
        events = self.events[index := _index(body)]
        position = self.repeated[index]
        self.repeated[index] += 1
        if part.receipt == self.receipt and position == len(events):
            events.append(body)
            return Part(part.status, part.headers, body)
        if part.receipt == self.receipt and body == events[position]:
            return None
        raise ApiError(
            503, "The replica has died, and another one answers differently.", code="replica_died"
        )


class Ingress:
    """Sends each request to the replica of its adapter, and to another one when that one dies."""

    def __init__(self, replicas: DeploymentHandle[Any], config: ServeConfig) -> None:
        self.replicas = replicas.options(method_name="answer", stream=True)
        self.limits = config

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        try:
            reading = _read(request, self.limits.max_body)
            body = await asyncio.wait_for(reading, self.limits.max_body_seconds)
            adapter, body = _prepared(request.url.path, body)
            scope = {name: request.scope[name] for name in _SCOPE if name in request.scope}
            scope["headers"] = request.headers.raw
            parts = self._parts(adapter, scope, body)
            first = await anext(parts)
        except asyncio.TimeoutError:
            return error_answer(ApiError(408, "The body took too long.", code="max_body_seconds"))
        except ApiError as error:
            return error_answer(error)
        answer = StreamingResponse(_bodies(first, parts), first.status)
        answer.raw_headers = first.headers
        return answer

    async def _parts(self, adapter: str, scope: dict[str, Any], body: bytes) -> AsyncIterator[Part]:
        sent = Sent()
        for attempt in range(1, ATTEMPTS + 1):
            sent.repeated.clear()
            answer = self.replicas.options(session_id=adapter).remote(scope, body)
            try:
                async for part in answer:
                    if new := sent.next(part):
                        new.headers = [*new.headers, (b"x-lorakit-attempts", b"%d" % attempt)]
                        yield new
                return
            except BackPressureError:
                raise ApiError(
                    429, "All replicas are busy. Try again later.", code="queue_full", retry=1
                ) from None
            except RayActorError as error:  # the router already skips this replica
                _LOG.warning("A request for %.100r goes to another replica: %s", adapter, error)
            finally:
                answer.cancel()  # if the client has gone
        raise ApiError(
            503, f"{ATTEMPTS} replicas died during this request.", code="replica_died", retry=1
        )


async def _bodies(first: Part, parts: AsyncIterator[Part]) -> AsyncIterator[bytes]:
    yield first.body
    replica = first.replica
    try:
        async for part in parts:
            if part.replica != replica:  # a comment, which clients of event streams skip
                replica = part.replica
                yield b": continued by replica %s\n\n" % replica
            yield part.body
    except ApiError as error:
        yield b"data: %s\n\n" % json.dumps(error.content).encode()


async def _read(request: Request, most: int) -> bytes:
    """Return the body. One that is too large is cut one byte after the limit: the replica rejects it."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            break
    return body[: most + 1]


def _prepared(path: str, body: bytes) -> tuple[str, bytes]:
    """Return the adapter that a body names, and the body with a seed. The replica rejects an invalid one."""
    try:
        content = json.loads(body.decode())
    except ValueError:
        return "", body
    if not isinstance(content, dict):
        return "", body
    blend = content.get("lora")
    name = min(blend) if isinstance(blend, dict) and blend else content.get("model")
    if path in _GENERATING and content.get("seed") is None:
        content["seed"] = secrets.randbits(63)
        # ASCII and spaces would make the body longer, and the replica reject it by max_body.
        body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    return name if isinstance(name, str) else "", body


def _index(event: bytes) -> int:
    """Return the answer that an event belongs to; -1 for the last events, which belong to all."""
    try:
        return json.loads(event.removeprefix(b"data: "))["choices"][0]["index"]
    except (ValueError, LookupError, TypeError):
        return -1


def build(options: dict[str, str]) -> serve.Application:
    """Return the application for `serve run`."""
    options = dict(options)
    replicas, cpus = int(options.pop("replicas", 2)), float(options.pop("cpus", 1))
    config = parse(ServeConfig, "serve", "", [f"--{name}={options[name]}" for name in options])
    for name in _OF_ONE_PROCESS:
        if getattr(config, name) != getattr(ServeConfig(), name):
            raise ConfigurationError(f"{name} is an option of lorakit serve alone. Leave it out.")
    computing = serve.deployment(
        Replica,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus},  # Ray sets OMP_NUM_THREADS to it
        max_ongoing_requests=config.max_running,
        max_queued_requests=config.max_queue,
        health_check_period_s=2,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
    )
    entrance = serve.deployment(
        Ingress,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=replicas * (config.max_running + config.max_queue),
    )
    return entrance.bind(computing.bind(config), config)

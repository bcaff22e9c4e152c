"""The clients of the soak test, what they keep of every answer, and which adapters existed when.

Times are in seconds of `time.monotonic`. What a name meant changes at some moment between the request that changes it
and the reply, so each change has an earliest and a latest time.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

TIME_LIMIT = 300.0
"""Seconds after which a request without an end counts as lost."""
NAN, TRUNCATED = "not-a-number", "truncated"
"""Adapters that must be answered with an error."""


# --- names and contents ------------------------------------------------------------------------------


@dataclass
class Span:
    """A time in which a name stood for a content (or existed at all)."""

    content: str
    maybe_from: float
    """Earliest time at which it may have begun."""
    sure_from: float
    sure_until: float = math.inf
    maybe_until: float = math.inf

    def may_overlap(self, start: float, end: float) -> bool:
        """Whether it may have held at some moment between two times."""
        return self.maybe_from <= end and start <= self.maybe_until

    def covers(self, start: float, end: float) -> bool:
        """Whether it surely held all the time between two times."""
        return self.sure_from <= start and end <= self.sure_until


@dataclass
class Timeline:
    """What each name stood for, and when it existed."""

    contents: dict[str, list[Span]] = field(default_factory=dict)
    existence: dict[str, list[Span]] = field(default_factory=dict)

    def loaded(self, name: str, content: str, before: float, after: float) -> None:
        """Record that a name stands for a content from some moment between `before` and `after`."""
        if not self.exists(name):
            self.existence.setdefault(name, []).append(Span("", before, after))
        else:
            _close(self.contents[name][-1], before, after)
        self.contents.setdefault(name, []).append(Span(content, before, after))

    def unloaded(self, name: str, before: float, after: float) -> None:
        """Record that a name ends."""
        _close(self.contents[name][-1], before, after)
        _close(self.existence[name][-1], before, after)

    def exists(self, name: str) -> bool:
        """Whether a name exists now."""
        spans = self.existence.get(name)
        return bool(spans) and math.isinf(spans[-1].sure_until)

    def may_be(self, name: str, content: str, start: float, end: float) -> bool:
        """Whether a name may have stood for a content at some moment between two times."""
        spans = self.contents.get(name, ())
        return any(s.content == content and s.may_overlap(start, end) for s in spans)

    def may_be_missing(self, name: str, start: float, end: float) -> bool:
        """Whether a name may have been unknown at some moment between two times."""
        return not any(span.covers(start, end) for span in self.existence.get(name, ()))


def _close(span: Span, before: float, after: float) -> None:
    span.sure_until, span.maybe_until = before, after


# --- answers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A request for tokens."""

    prompt: tuple[int, ...]
    adapters: tuple[tuple[str, float], ...]
    """Names and weights; empty is the base."""
    max_tokens: int
    temperature: float
    seed: int
    stream: bool

    def body(self, base: str) -> dict[str, Any]:
        """Return the body of the request."""
        body: dict[str, Any] = {
            "model": base,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "logprobs": 0,
            "stream": self.stream,
        }
        if len(self.adapters) == 1 and self.adapters[0][1] == 1:
            body["model"] = self.adapters[0][0]
        elif self.adapters:
            body["lora"] = dict(self.adapters)
        return body


@dataclass
class Kept:
    """An answer as the client received it."""

    question: Question
    sent: float
    headers: float = math.nan
    """When the status arrived. The adapters are chosen before."""
    fingerprint: str = ""
    """Receipt in the body, ``base=DIGEST;name=DIGEST*weight``."""
    receipt: dict[str, str] = field(default_factory=dict)
    """The headers x-lorakit-base and x-lorakit-adapter."""
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None

    def add(self, body: Mapping[str, Any]) -> None:
        """Record a body, or a chunk of a stream."""
        self.fingerprint = body.get("system_fingerprint") or self.fingerprint
        for choice in body.get("choices", ()):
            self.finish = choice.get("finish_reason") or self.finish
            found = choice.get("logprobs") or {}
            self.tokens += found.get("tokens", ())
            self.logprobs += found.get("token_logprobs", ())


@dataclass
class Outcome:
    """Everything that the clients saw."""

    kept: list[Kept] = field(default_factory=list)
    lost: int = 0
    disconnected: int = 0
    expected: Counter[str] = field(default_factory=Counter)
    """Errors that had to come, by kind."""
    unexpected: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    """Loads, unloads and reloads."""


# --- the clients -------------------------------------------------------------------------------------


@dataclass
class Site:
    """The server and its adapters, as the clients know them."""

    url: str
    base: str
    names: Sequence[str]
    """Names that requests choose from, present or not."""
    versions: Mapping[str, Path]
    """Folders of contents that a name can stand for, by content."""
    prefixes: Sequence[tuple[int, ...]]
    """Beginnings that prompts share, each longer than a page of the cache."""
    vocabulary: int
    answer: tuple[int, int]
    """Fewest and most tokens of an answer."""
    timeline: Timeline
    outside: Path
    """An adapter that is not in the server's folder."""
    bad: Sequence[str] = (NAN, TRUNCATED)
    time_limit: float = TIME_LIMIT


async def soak(
    site: Site,
    clients: int,
    seconds: float,
    outcome: Outcome,
    *,
    seed: int = 0,
    transport: httpx.AsyncBaseTransport | None = None,
) -> None:
    """Run the clients, and change adapters meanwhile, for some time.

    Args:
        site: The server.
        clients: How many ask at the same time.
        seconds: Time after which no new request begins.
        outcome: Records what happens.
        seed: Two runs with the same seed ask the same questions, until their times differ.
        transport: For tests.
    """
    until = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(
        base_url=site.url, timeout=None, limits=limits, transport=transport
    ) as http:
        tasks = [
            _client(http, site, random.Random(f"{seed} {number}"), until, outcome)
            for number in range(clients)
        ]
        await asyncio.gather(*tasks, _operator(http, site, random.Random(seed), until, outcome))


async def _client(
    http: httpx.AsyncClient, site: Site, rng: random.Random, until: float, outcome: Outcome
) -> None:
    await asyncio.sleep(rng.uniform(0, 1))
    while time.monotonic() < until:
        kind = rng.choices(("ask", "leave", "malformed", "bad"), (86, 5, 5, 4))[0]
        if kind == "malformed":
            work = send_malformed(http, site, rng, outcome)
        elif kind == "bad":
            work = ask_bad(http, site, rng, outcome)
        else:
            work = ask(http, site, question(site, rng), outcome, leave=kind == "leave")
        try:
            await asyncio.wait_for(work, site.time_limit)
        except asyncio.TimeoutError:
            outcome.lost += 1
        except httpx.HTTPError as error:
            outcome.unexpected[f"{kind}: {type(error).__name__}"] += 1
            await asyncio.sleep(0.2)


def question(site: Site, rng: random.Random) -> Question:
    """Return a random request for tokens."""
    tail = [rng.randrange(site.vocabulary) for _ in range(rng.randint(1, 12))]
    kind = rng.choices(("base", "one", "blend"), (1, 8, 1))[0]
    adapters: tuple[tuple[str, float], ...] = ()
    if kind == "one":
        adapters = ((rng.choice(site.names), 1.0),)
    elif kind == "blend":
        first, second = rng.sample(list(site.names), 2)
        adapters = ((first, 0.75), (second, 0.5))
    return Question(
        prompt=(*rng.choice(site.prefixes), *tail),
        adapters=adapters,
        max_tokens=rng.randint(*site.answer),
        temperature=rng.choice((0.0, 0.0, 1.0)),
        seed=rng.randrange(2**31),
        stream=rng.random() < 0.5,
    )


async def ask(
    http: httpx.AsyncClient,
    site: Site,
    asked: Question,
    outcome: Outcome,
    *,
    leave: bool = False,
) -> None:
    """Send a request for tokens, and keep the answer.

    Args:
        http: The client.
        site: The server.
        asked: The request.
        outcome: Records what happened.
        leave: Whether to disconnect after the first chunk.
    """
    body = asked.body(site.base) | ({"stream": True} if leave else {})
    kept = Kept(asked, time.monotonic())
    async with http.stream("POST", "/v1/completions", json=body) as response:
        kept.headers = time.monotonic()
        if response.status_code != 200:
            await response.aread()
            _count_error(site, kept, response, outcome)
            if response.status_code in (429, 503):
                await asyncio.sleep(0.5)
            return
        kept.receipt = {k: v for k, v in response.headers.items() if k.startswith("x-lorakit-")}
        if not body["stream"]:
            kept.add(json.loads(await response.aread()))
            outcome.kept.append(kept)
            return
        is_done = False
        async for line in response.aiter_lines():
            if leave:
                outcome.disconnected += 1
                return
            if line == "data: [DONE]":
                is_done = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    outcome.unexpected[f"stream: {_kind(chunk)}"] += 1
                    return
                kept.add(chunk)
        if is_done:
            outcome.kept.append(kept)
        else:
            outcome.unexpected["stream without an end"] += 1


def _count_error(site: Site, kept: Kept, response: httpx.Response, outcome: Outcome) -> None:
    kind = _kind(_json(response))
    status = response.status_code
    missing = any(
        site.timeline.may_be_missing(name, kept.sent, kept.headers)
        for name, _ in kept.question.adapters
    )
    if status == 404 and missing:
        outcome.expected["adapter not loaded (404)"] += 1
    elif status == 429:
        outcome.expected["queue full (429)"] += 1
    else:
        outcome.unexpected[f"request: {status} {kind}"] += 1


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return {}


def _kind(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return "no error object"
    return str(error.get("code") or error.get("type"))


async def ask_bad(
    http: httpx.AsyncClient, site: Site, rng: random.Random, outcome: Outcome
) -> None:
    """Ask an adapter that cannot be served. The answer must be an error."""
    name = rng.choice(site.bad)
    asked = Question(
        prompt=rng.choice(site.prefixes),
        adapters=((name, 1.0),),
        max_tokens=4,
        temperature=rng.choice((0.0, 1.0)),
        seed=0,
        stream=rng.random() < 0.5,
    )
    response = await http.post("/v1/completions", json=asked.body(site.base))
    text = response.text
    if response.status_code == 429:
        outcome.expected["queue full (429)"] += 1
    elif response.status_code >= 400 and _kind(_json(response)) != "no error object":
        outcome.expected[f"{name} ({response.status_code})"] += 1
    elif response.status_code == 200 and asked.stream and '"error"' in text:
        outcome.expected[f"{name} (error in the stream)"] += 1
    else:
        outcome.unexpected[f"{name}: answered with {response.status_code}"] += 1


@functools.cache
def malformed(base: str) -> tuple[tuple[str, bytes, tuple[int, ...]], ...]:
    """Return the kind, the body and the acceptable statuses of requests that must be rejected."""
    return tuple(_malformed(base))


def _malformed(base: str) -> Iterator[tuple[str, bytes, tuple[int, ...]]]:
    good = {"model": base, "prompt": [1, 2], "max_tokens": 2}
    yield "not JSON", b'{"model": ', (400, 422)
    yield "not an object", b"[1, 2]", (400, 422)
    yield "not UTF-8", b'{"model": "\xff\xfe"}', (400, 422)
    yield "deep nesting", b"[" * 20000, (400, 413, 422)
    changes: dict[str, dict[str, Any]] = {
        "unknown field": {"max_token": 3},
        "wrong type": {"max_tokens": "many"},
        "negative temperature": {"temperature": -1},
        "unsupported field": {"suffix": "x"},
        "token outside of the vocabulary": {"prompt": [10**9]},
        "negative token": {"prompt": [-1]},
        "empty prompt": {"prompt": []},
        "prompt beyond the context": {"prompt": [1] * 200_000},
        "blend of an unknown adapter": {"lora": {"nobody": 1.0}},
        "unknown model": {"model": "nobody"},
    }
    for kind, change in changes.items():
        yield kind, json.dumps({**good, **change}).encode(), (400, 404, 413, 422)


async def send_malformed(
    http: httpx.AsyncClient, site: Site, rng: random.Random, outcome: Outcome
) -> None:
    """Send a body that must be rejected with a 4xx."""
    kind, body, statuses = rng.choice(malformed(site.base))
    response = await http.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    if response.status_code in statuses and _kind(_json(response)) != "no error object":
        outcome.expected[f"malformed ({response.status_code})"] += 1
    else:
        outcome.unexpected[f"malformed, {kind}: {response.status_code}"] += 1


async def _operator(
    http: httpx.AsyncClient, site: Site, rng: random.Random, until: float, outcome: Outcome
) -> None:
    """Load, unload and replace adapters."""
    while time.monotonic() < until:
        await asyncio.sleep(rng.uniform(0.2, 1.5))
        try:
            await asyncio.wait_for(change(http, site, rng, outcome), site.time_limit)
        except asyncio.TimeoutError:
            outcome.lost += 1
        except httpx.HTTPError as error:
            outcome.unexpected[f"change: {type(error).__name__}"] += 1


async def change(http: httpx.AsyncClient, site: Site, rng: random.Random, outcome: Outcome) -> None:
    """Change one adapter."""
    name = rng.choice(site.names)
    exists = site.timeline.exists(name)
    kind = rng.choices(("reload", "unload", "wrong"), (6, 3, 1))[0] if exists else "load"
    if kind == "unload":
        before = time.monotonic()
        site.timeline.unloaded(name, before, math.inf)  # others may see it before this client does
        response = await http.post("/v1/unload_lora_adapter", json={"lora_name": name})
        if _changed(response, kind, outcome):
            site.timeline.unloaded(name, before, time.monotonic())
        return
    if kind == "wrong":
        body = {"lora_name": "outside", "lora_path": str(site.outside)}
        response = await http.post("/v1/load_lora_adapter", json=body)
        if 400 <= response.status_code < 500:
            outcome.expected[f"load from outside ({response.status_code})"] += 1
        else:
            outcome.unexpected[f"load from outside: {response.status_code}"] += 1
        return
    content = rng.choice(list(site.versions))
    body = {
        "lora_name": name,
        "lora_path": str(site.versions[content]),
        "load_inplace": exists,
    }
    before = time.monotonic()
    response = await http.post("/v1/load_lora_adapter", json=body)
    if _changed(response, kind, outcome):
        site.timeline.loaded(name, content, before, time.monotonic())


def _changed(response: httpx.Response, kind: str, outcome: Outcome) -> bool:
    if response.status_code == 200:
        outcome.changes[kind] += 1
        return True
    body = _json(response)
    if response.status_code == 503 and _kind(body) == "adapter_memory_full":
        outcome.expected["adapter memory full (503)"] += 1
    else:
        outcome.unexpected[f"{kind}: {response.status_code} {_kind(body)}"] += 1
    return False

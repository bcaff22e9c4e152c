"""Replicas under Ray Serve: while one is killed, every request gets the answer of a single server."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest
import tiny_models
from tiny_tokenizer import tiny_tokenizer

import lorakit

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path += [str(EXAMPLES), str(Path(__file__).parent / "http")]

from whole import save, served, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="ray is not installed: pip install 'ray[serve]'",
    ),
    # Ray uses names that pydantic deprecates, and leaves files of its processes open.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

ADAPTERS = ("a", "b", "c", "d")
CLIENTS = 4
MODELS: list[dict[str, Any]] = [
    *({"model": name} for name in (*ADAPTERS, "base")),
    {"model": "base", "lora": {"a": 0.5, "c": 0.5}},
]
FORMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 5, "n": 2},
    {"temperature": 0, "stream": True},
    {"stream": True},  # without a seed: nobody can say what the answer is, but it must be whole
]
LONG = {"seed": 6, "n": 2, "stream": True, "max_tokens": 200}
"""In the stream of such an answer a replica is killed."""
BODIES = [
    {"prompt": "The river pub", "max_tokens": 30, **body}
    for body in (
        {"model": "a", **LONG},
        *({**model, **form} for model in MODELS for form in FORMS),
        {"model": "base", **LONG},
    )
]


@dataclass
class Answer:
    """What a client has got."""

    texts: dict[int, str]
    receipt: tuple[str, str]
    replicas: list[str]
    """One, and those that continued the stream."""
    attempts: int
    """Replicas that were asked before the first event."""


def ask(
    client: Any, body: dict[str, Any], on_event: Callable[[str], None] = lambda replica: None
) -> Answer:
    """Send a request and read its answer; call `on_event` with the replica for each event of a stream."""
    with client.stream("POST", "/v1/completions", json=body) as response:
        lines = list(response.iter_lines()) if not body.get("stream") else response.iter_lines()
        assert response.status_code == 200, list(lines)
        headers = response.headers
        replicas = [headers.get("x-lorakit-replica", "")]
        texts: defaultdict[int, str] = defaultdict(str)
        last = ""
        for last in filter(None, lines):
            if last.startswith(": continued by replica "):
                replicas.append(last.split()[-1])
            elif last != "data: [DONE]":
                event = json.loads(last.removeprefix("data: "))
                assert "error" not in event, event
                for part in event["choices"]:
                    texts[part["index"]] += part["text"]
                on_event(replicas[-1])
        assert (last == "data: [DONE]") == bool(body.get("stream"))
        receipt = headers["x-lorakit-base"], headers["x-lorakit-adapter"]
        return Answer(dict(texts), receipt, replicas, int(headers.get("x-lorakit-attempts", 1)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas")
    sizes = {"vocab_size": len(tiny_tokenizer()), "max_position_embeddings": 256}
    base = save(folder / "base", tiny_models.build("llama", **sizes), tiny_tokenizer())
    for seed, name in enumerate(ADAPTERS, start=1):
        method = lorakit.LoRA(rank=4, alpha=8, targets="all-linear")
        target = folder / "adapters" / name
        write(base, target, method, seed=seed, head={}, task="completion", labels=[])
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Start Ray and two replicas, and stop them in any case."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(EXAMPLES), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))  # else Ray writes ~/.ray/auth_token
        yield from running(folder)


def running(folder: Path) -> Iterator[str]:
    import ray
    import ray_serve
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {
        "replicas": "2",
        "base.name": str(folder / "base"),
        "base.dtype": "float32",
        "adapters": str(folder / "adapters"),
        "cache_memory": "20MB",
        "adapter_memory": "10MB",
    }
    # The path of a Unix socket has at most 107 characters, and Ray adds about 60.
    with TemporaryDirectory(prefix="ray", dir="/tmp") as short:
        try:
            ray.init(
                "local",
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=100_000_000,
                log_to_driver=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=short,
            )
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(ray_serve.build(options), name="lorakit")
            yield f"http://127.0.0.1:{port}"
        finally:
            ray.shutdown()


def pid_of(replica: str) -> int:
    """Return the process of a replica."""
    import ray

    actor = ray.get_actor(f"SERVE_REPLICA::lorakit#Replica#{replica}", namespace="serve")
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


def replicas_at(client: httpx.Client) -> set[str]:
    """Return the replicas that answer requests without an adapter, which go to all in turn."""
    answers = [client.get("/health") for _ in range(12)]
    assert {answer.status_code for answer in answers} == {200}
    return {answer.headers["x-lorakit-replica"] for answer in answers}


def test_no_request_is_lost_or_wrong_while_a_replica_dies(
    folder: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(folder) as (alone, _):
        right = [ask(alone, body) for body in BODIES]
    with httpx.Client(base_url=address, timeout=120) as client, ThreadPoolExecutor(CLIENTS) as pool:

        def load(on_event: Callable[[str], None] = lambda replica: None) -> list[Answer]:
            answers = [*pool.map(lambda body: ask(client, body, on_event), BODIES)]
            for body, answer, expected in zip(BODIES, answers, right, strict=True):
                assert answer.receipt == expected.receipt, body
                if "seed" in body or "temperature" in body:
                    assert answer.texts == expected.texts, body
            return answers

        before = replicas_at(client)
        first = load()
        owners = defaultdict(set)
        for body, answer in zip(BODIES, first, strict=True):
            owners[body["model"]].update(answer.replicas)
        assert all(len(names) == 1 for name, names in owners.items() if name in ADAPTERS), owners
        assert len(before) == 2

        (victim,) = owners["a"]
        pid, events, died = pid_of(victim), itertools.count(), list[float]()

        def kill(replica: str) -> None:
            """Kill the victim within a stream that it sends."""
            if replica == victim and next(events) == 20:
                os.kill(pid, signal.SIGKILL)
                died.append(time.monotonic())

        second = load(kill)
        while len(after := replicas_at(client) - {victim}) < 2:
            assert time.monotonic() < died[0] + 60, "the dead replica did not come back"
            time.sleep(0.2)
        seconds = time.monotonic() - died[0]
        third = load()
    retried = sum(answer.attempts > 1 for answer in second)
    continued = sum(len(answer.replicas) > 1 for answer in second)
    assert continued
    assert not any(answer.attempts > 1 or len(answer.replicas) > 1 for answer in [*first, *third])
    assert {name for answer in third for name in answer.replicas} <= after
    counts = [dict(Counter(a.replicas[-1] for a in some)) for some in (first, second, third)]
    with capsys.disabled():
        print(
            f"\n{len(second)} requests around the kill: {retried} asked of another replica, {continued} continued."
            f"\nrequests by replica before, around and after: {counts}"
            f"\nseconds until the dead replica was back: {seconds:.1f}"
        )


def test_a_request_is_cancelled_when_its_client_goes(address: str) -> None:
    body = {"model": "b", "prompt": "The river", "max_tokens": 230, "n": 16, "stream": True}
    with httpx.Client(base_url=address, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
            replica = response.headers["x-lorakit-replica"]
        cancelled = 'adapter="b",route="/v1/completions",status="499"'
        end = time.monotonic() + 20
        while True:
            page = client.get("/metrics")
            if page.headers["x-lorakit-replica"] == replica and cancelled in page.text:
                break
            assert time.monotonic() < end, "the request was not cancelled"
            time.sleep(0.1)


def part(text: str, receipt: bytes = b"1", index: int = 0) -> Any:
    import ray_serve

    body = b'data: {"created":%d,"choices":[{"index":%d,"text":"%s"}]}\n\n'
    headers = [(b"x-lorakit-adapter", receipt), (b"x-lorakit-replica", b"r")]
    return ray_serve.Part(200, headers, body % (secrets.randbelow(10**9), index, text.encode()))


def test_a_continuation_that_differs_is_an_error() -> None:
    import ray_serve

    from lorakit.serving.http.errors import ApiError

    sent = ray_serve.Sent()
    assert sent.next(part("The", index=1))
    assert sent.next(part(" river"))
    sent.repeated.clear()
    assert sent.next(part(" river")) is None
    assert sent.next(part("The", index=1)) is None
    new = sent.next(part(" pub"))
    assert new.body.count(sent.created) == 1
    for wrong in (part(" lake"), part(" river", receipt=b"2")):
        sent.repeated.clear()
        with pytest.raises(ApiError, match="another one answers differently"):
            sent.next(wrong)


def test_a_seed_does_not_make_a_body_too_large() -> None:
    import ray_serve

    content = {"model": "a", "prompt": "\u6cb3" * 1000, "seed": None}
    given = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    _, body = ray_serve._prepared("/v1/completions", given)
    sent = json.loads(body)
    assert sent == {**content, "seed": sent["seed"]}
    assert sent["seed"] is not None
    assert len(body) <= len(given) + 20


def test_options_of_one_process_are_rejected() -> None:
    import ray_serve

    from lorakit.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match="port is an option of lorakit serve alone"):
        ray_serve.build({"port": "9000"})
    with pytest.raises(ConfigurationError, match="unknown option '--replica'"):
        ray_serve.build({"replica": "2"})

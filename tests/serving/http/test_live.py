"""Behind a real socket: clients that go, bodies and headers that are slow or large, and the end of the server."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fakes import TEXT
from served import Serve, Served, wait_for
from starlette.responses import StreamingResponse
from whole import served as whole_server

from lorakit.serving.http import running

Live = Callable[..., str]


Connect = Callable[[str], socket.socket]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Connect to an address; the test's end closes the connections."""
    with contextlib.ExitStack() as stack:

        def open_one(address: str) -> socket.socket:
            parts = urlsplit(address)
            peer = (parts.hostname or "", parts.port or 0)
            return stack.enter_context(socket.create_connection(peer, timeout=10))

        yield open_one


def request(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def read_one(connection: socket.socket) -> bytes:
    """Read one answer with a content-length."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


BODY = {"model": "sql", "prompt": "a", "n": 2, "max_tokens": 50}


@pytest.mark.parametrize("stream", [False, True])
def test_the_clients_disconnect_cancels_its_requests(
    connect: Connect, serve: Serve, live: Live, stream: bool
) -> None:
    served = serve()
    served.engine.pause = threading.Event()
    connection = connect(live(served))
    connection.sendall(request({**BODY, "stream": stream}))
    wait_for(lambda: len(served.engine.tickets) == 2)
    if stream:
        assert connection.recv(100)
    time.sleep(0.05)
    assert not any(ticket.cancelled.is_set() for ticket in served.engine.tickets)
    connection.close()
    for ticket in served.engine.tickets:
        assert ticket.cancelled.wait(2)
    wait_for(lambda: served.store.leases[0].releases == 1)
    wait_for(lambda: '"499"' in served.app.state.serving.metrics.page().decode())


def test_a_disconnect_while_an_adapter_is_read_releases_it(
    connect: Connect, serve: Serve, live: Live
) -> None:
    served = serve()
    served.store.hold = threading.Event()
    connection = connect(live(served))
    connection.sendall(request(BODY))
    wait_for(lambda: served.app.state.serving.computing == 1)
    connection.close()
    wait_for(lambda: served.app.state.serving.in_flight == 0)
    served.store.hold.set()
    wait_for(lambda: len(served.store.leases) == 1 and served.store.leases[0].releases == 1)
    assert served.engine.tickets == []


def chunks(*parts: bytes) -> bytes:
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


def test_a_body_without_a_length_is_read_up_to_the_limit(
    connect: Connect, serve: Serve, live: Live
) -> None:
    served = serve(max_body=1000)
    connection = connect(live(served))
    connection.sendall(chunks(b"[" * 800, b"[" * 800))  # and no end
    answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"max_body" in answer
    assert b"connection: close" in answer.lower()


def test_a_declared_length_above_the_limit_is_rejected_unread(
    connect: Connect, serve: Serve, live: Live
) -> None:
    connection = connect(live(serve(max_body=1000)))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(head + b"Content-Length: 99999999999\r\n\r\n")
    assert read_all(connection).startswith(b"HTTP/1.1 413 ")


def test_a_slow_body_is_408(connect: Connect, serve: Serve, live: Live) -> None:
    served = serve(max_body_seconds=0.3)
    connection = connect(live(served))
    connection.sendall(request(BODY)[:-5])
    answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"max_body_seconds" in answer


def test_slow_headers_close_the_connection(
    connect: Connect, serve: Serve, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "HEADER_SECONDS", 0.15)
    served = serve()
    address = live(served, timeout_keep_alive=60)
    silent, trickling = connect(address), connect(address)
    began = time.monotonic()
    trickling.sendall(b"GET /health HTTP/1.1\r\n")
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - began < 5:
            trickling.sendall(b"X: y\r\n")
            time.sleep(0.03)
    assert read_all(silent) == b""
    assert time.monotonic() - began < 5


@pytest.mark.slow
def test_a_long_answer_is_not_cut_by_the_watch_of_headers(
    connect: Connect, serve: Serve, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "HEADER_SECONDS", 0.3)
    served = serve()
    served.engine.pause = threading.Event()
    connection = connect(live(served))
    connection.sendall(request(BODY))
    time.sleep(1)
    served.engine.pause.set()
    assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.slow
def test_a_body_that_nobody_reads_does_not_keep_the_connection(
    connect: Connect, serve: Serve, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a key: each of 1,024 such connections would make uvicorn answer everyone else with 503."""
    monkeypatch.setattr(running, "HEADER_SECONDS", 0.3)
    connection = connect(live(serve(), timeout_keep_alive=60))
    connection.sendall(b"POST /none HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n")
    assert connection.recv(1000).startswith(b"HTTP/1.1 404 ")
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - began < 3:
            connection.sendall(b"x")
            time.sleep(0.03)
    assert time.monotonic() - began < 3


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 100])
def test_a_client_that_reads_nothing_is_dropped(
    connect: Connect, serve: Serve, live: Live, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    monkeypatch.setattr(running, "HEADER_SECONDS", 0.3)
    served = serve()

    def answer(_: Any) -> StreamingResponse:
        return StreamingResponse(iter([b"x" * (20_000_000 // parts)] * parts))

    served.app.add_route("/large", answer)
    connection = connect(live(served))
    connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
    assert connection.recv(10)
    time.sleep(1)
    wait_for(lambda: served.app.state.serving.in_flight == 0)
    assert len(read_all(connection)) < 20_000_000


def test_large_headers_are_rejected(connect: Connect, serve: Serve, live: Live) -> None:
    address = live(serve(), h11_max_incomplete_event_size=running.HEADER_BYTES)
    connection = connect(address)
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 40_000)
    assert read_all(connection).startswith(b"HTTP/1.1 400 ")


def test_a_keep_alive_connection_answers_twice(connect: Connect, serve: Serve, live: Live) -> None:
    connection = connect(live(serve()))
    for _ in range(2):
        connection.sendall(request(BODY))
        assert read_one(connection).startswith(b"HTTP/1.1 200 ")


def test_an_offer_of_http_2_is_ignored(
    connect: Connect, serve: Serve, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Java's client makes it in each request. The body must not be lost."""
    offer = (
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\n\r\n"
    )
    logged: list[str] = []
    connection = connect(live(serve()))
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "warning", logged.append)
    for message in (request(BODY), chunks(json.dumps(BODY).encode(), b"")):
        connection.sendall(message.replace(b"\r\n\r\n", b"\r\n" + offer, 1))
        assert read_one(connection).startswith(b"HTTP/1.1 200 ")
    assert logged == []


def test_head_is_answered_as_get_without_the_body(
    connect: Connect, serve: Serve, live: Live
) -> None:
    """Monitors and load balancers send it."""
    address = live(serve())
    for path in ("/", "/health"):
        heads = []
        for method in ("GET", "HEAD"):
            connection = connect(address)
            line = f"{method} {path} HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\r\nConnection: close\r\n\r\n"
            connection.sendall(line.encode())
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
            heads.append(re.sub(rb"date: .*\r\n", b"", head))
            assert bool(body) == (method == "GET")
        assert heads[0] == heads[1]
        assert b" 200 " in heads[0]


# --- the official client -------------------------------------------------------------------------------


@pytest.fixture
def openai_client(serve: Serve, live: Live) -> Any:
    from openai import OpenAI

    served = serve()
    served.app.state.test = served
    with OpenAI(base_url=f"{live(served)}/v1", api_key="none", max_retries=0) as client:
        yield client, served


@pytest.mark.slow
def test_the_official_client(openai_client: tuple[Any, Served]) -> None:
    import openai

    client, served = openai_client
    assert [model.id for model in client.models.list()][1:] == ["e2e", "sql"]
    assert client.models.retrieve("sql").id == "sql"
    messages = [{"role": "user", "content": "Which pub?"}]
    chat = client.chat.completions.create(
        model="sql", messages=messages, n=2, logprobs=True, top_logprobs=2, seed=1
    )
    assert [choice.message.content for choice in chat.choices] == [TEXT, TEXT]
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
    assert chat.system_fingerprint == served.store.leases[0].receipt.fingerprint
    assert chat.usage.prompt_tokens_details.cached_tokens == 2
    completion = client.completions.create(model="sql", prompt="a", max_tokens=50, logprobs=1)
    assert completion.choices[0].text == TEXT
    assert completion.choices[0].logprobs.text_offset[0] == 0
    stream = client.chat.completions.create(
        model="sql", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    parts = list(stream)
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == TEXT
    assert parts[-1].usage.completion_tokens > 0
    parts = list(client.completions.create(model="sql", prompt="a", max_tokens=50, stream=True))
    assert "".join(part.choices[0].text for part in parts) == TEXT
    blend = client.chat.completions.create(
        model="tiny/base", messages=messages, extra_body={"lora": {"sql": 0.5, "e2e": 0.5}}
    )
    compared = client.chat.completions.create(
        model="sql", messages=messages, logprobs=True, extra_body={"base_logprobs": True}
    )
    own = compared.choices[0].logprobs.content
    assert len(compared.choices[0].base_logprobs) == len(own)
    assert "sql=" in blend.system_fingerprint
    with pytest.raises(openai.NotFoundError, match="Did you mean 'sql'") as raised:
        client.completions.create(model="sqll", prompt="a")
    assert (raised.value.param, raised.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError, match="'tools' is a field of OpenAI's API"):
        client.chat.completions.create(model="sql", messages=messages, tools=[{"type": "function"}])
    served.engine.fails_after = 2
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.completions.create(model="sql", prompt="a", stream=True))
    served.engine.is_full = True
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="sql", prompt="a")


@pytest.mark.slow
@pytest.mark.parametrize("status", [408, 500])
def test_the_official_client_does_not_repeat_a_request_in_vain(
    serve: Serve, live: Live, status: int
) -> None:
    import openai

    served = serve(max_seconds=0.2)
    if status == 408:
        served.engine.pause = threading.Event()
    else:
        served.engine.fails_after = 0
    with (
        openai.OpenAI(base_url=f"{live(served)}/v1", api_key="none", max_retries=2) as client,
        pytest.raises(openai.APIStatusError) as raised,
    ):
        client.completions.create(model="sql", prompt="a")
    assert raised.value.status_code == status
    assert len(served.engine.tickets) == 1


# --- the end of the server -----------------------------------------------------------------------------

SERVER = """
import socket, sys, threading
sys.path[:0] = ["tests", "tests/serving"]
from fakes import FakeEngine, FakeStore
from lorakit.serving.http.app import create_app
from lorakit.serving.http.running import run
from lorakit.serving.serve_config import ServeConfig
from starlette.responses import Response

engine = FakeEngine()
engine.pause = threading.Event()
threading.Thread(target=lambda: sys.stdin.readline() and engine.pause.set(), daemon=True).start()
listener = socket.create_server(("127.0.0.1", 0))
config = ServeConfig(host="0.0.0.0", allow_public=True)  # requests may have any Host header
app = create_app(engine, FakeStore(), config, base_name="base")
app.add_route("/large", lambda _: Response(b"x" * 20_000_000))
run(app, listener, started=lambda: print(listener.getsockname()[1], flush=True))
print("ended", flush=True)
import os; os._exit(0)
"""


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server whose answers end once it has read a line, and its address."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", SERVER], text=True, **pipes) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, process.communicate()[1]
        yield process, f"http://127.0.0.1:{port}"
        process.kill()


def is_ending(connection: socket.socket) -> bool:
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    return connection.recv(10_000).startswith(b"HTTP/1.1 503 ")


@pytest.mark.slow
def test_a_signal_finishes_what_runs_and_refuses_the_rest(connect: Connect, server: Any) -> None:
    """Also what is computed and still read by its client, for a minute."""
    process, address = server
    running_one, slow = connect(address), connect(address)
    running_one.sendall(request({**BODY, "model": "sql", "stream": True}))
    assert running_one.recv(10_000)
    slow.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
    received = len(slow.recv(10))
    process.send_signal(signal.SIGINT)
    wait_for(lambda: is_ending(connect(address)))
    late = connect(address)
    late.sendall(request(BODY))
    answer = read_one(late)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"shutting down" in answer
    process.stdin.write("\n")
    process.stdin.flush()
    assert b"[DONE]" in read_all(running_one)
    time.sleep(0.5)
    assert received + len(read_all(slow)) > 20_000_000
    assert running.END_SECONDS == 60
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "ended\n", "")


def test_the_end_does_not_wait_for_clients_that_come_after_the_signal(
    connect: Connect, serve: Serve, live: Live
) -> None:
    """Uploads, health checks and repeated requests could else keep the server alive for ever."""
    served = serve()
    served.engine.pause = threading.Event()
    address = live(served)
    running_one, late = connect(address), connect(address)
    running_one.sendall(request(BODY))
    wait_for(lambda: len(served.engine.tickets) == 2)
    assert served.server is not None
    served.server.handle_exit(signal.SIGTERM, None)
    late.sendall(request(BODY)[:-5])
    wait_for(lambda: len(served.server.server_state.tasks) == 2)
    assert not served.server.should_exit
    served.engine.pause.set()
    assert read_one(running_one).startswith(b"HTTP/1.1 200 ")
    wait_for(lambda: served.server.should_exit, seconds=10)
    late.sendall(request(BODY)[-5:])
    assert read_one(late).startswith(b"HTTP/1.1 503 ")


@pytest.mark.slow
def test_a_request_that_waits_for_its_adapter_at_the_signal_is_answered(
    connect: Connect, text: Path, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    with whole_server(text) as (client, opened):
        serving = client.app.state.serving
        acquire = opened.store.acquire
        monkeypatch.setattr(
            opened.store, "acquire", lambda choice: release.wait(10) and acquire(choice)
        )
        own = Served(client.app, opened.engine, opened.store, client)
        connection = connect(live(own))
        connection.sendall(request(BODY).replace(b"Host: x", b"Host: localhost"))
        wait_for(lambda: serving.computing == 1)
        assert own.server is not None
        own.server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.05)
        release.set()
        assert read_one(connection).startswith(b"HTTP/1.1 200 ")
        wait_for(lambda: own.server.should_exit)


def test_a_second_signal_ends_at_once(connect: Connect, serve: Serve, live: Live) -> None:
    served = serve()
    served.engine.pause = threading.Event()
    address = live(served)
    connection = connect(address)
    connection.sendall(request({**BODY, "stream": True}))
    assert connection.recv(10_000)
    assert served.server is not None
    assert served.thread is not None
    served.server.handle_exit(signal.SIGTERM, None)
    wait_for(lambda: is_ending(connect(address)))
    assert served.thread.is_alive()
    served.server.handle_exit(signal.SIGINT, None)
    served.thread.join(10)
    assert not served.thread.is_alive()

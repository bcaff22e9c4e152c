"""`lorakit serve`: its options, and the server from its start to its end."""

from __future__ import annotations

import json
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from random_adapters import randomise
from tiny_runs import save_base

import lorakit
from lorakit.cli import main, serve
from lorakit.errors import ConfigurationError
from lorakit.models.base_config import BaseConfig
from lorakit.serving.engine import EngineStatus, Receipt
from lorakit.serving.loaded import StoreStats
from lorakit.serving.opening import sources
from lorakit.serving.serve_config import ServeConfig, bytes_of
from lorakit.serving.verification import Verdict, Verifier


def error_of(capsys: Any, *arguments: str) -> str:
    assert main(["serve", *arguments]) == 1
    return capsys.readouterr().err


INVALID = {
    "a public address": (["--host", "0.0.0.0"], "no keys. Add --keys FILE, or --allow_public true"),
    "an address by name": (["--host", "example.org"], "which other machines can reach"),
    "no size": (["--adapter_memory", "much"], "adapter_memory is 'much'; write a size such as"),
    "a share above 1": (["--verify", "2"], "verify is 2.0; it must be at most 1"),
    "no new tokens": (["--max_tokens", "0"], "max_tokens is 0"),
    "no time": (["--max_seconds", "0"], "max_seconds is 0.0"),
    "a port": (["--port", "70000"], "port is 70000; it must be at most 65535"),
    "keys that are not there": (["--keys", "none.yaml"], "'none.yaml' does not exist. Check"),
    "nothing to stop for": (
        ["--verify_stops"],
        "and verify is 0: no answer is computed again. Add --",
    ),
    "an unknown option": (["--max_token", "1"], "Did you mean '--max_tokens'?"),
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_option_is_an_error(case: str, capsys: Any) -> None:
    arguments, words = INVALID[case]
    assert words in error_of(capsys, *arguments)


def test_a_port_that_is_taken_is_an_error(capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = error_of(capsys, "--port", port)
    assert f"Cannot listen on 127.0.0.1, port {port}" in message


def test_the_port_is_not_shared_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_KEEPALIVE, raising=False)
    with serve._listener(ServeConfig(port=0)) as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = error_of(capsys)
    assert "fastapi, uvicorn, prometheus_client" in message
    assert 'pip install "lorakit[serve]"' in message


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_loopback_address_needs_no_keys(host: str) -> None:
    assert ServeConfig(host=host).is_loopback


def test_a_public_address_needs_keys_or_a_decision() -> None:
    assert ServeConfig(host="0.0.0.0", keys="keys.yaml").keys
    assert ServeConfig(host="::", allow_public=True).allow_public


@pytest.mark.parametrize(
    ("text", "count"), [("500", 500), ("1GB", 10**9), ("1.5 kB", 1500), ("2GiB", 2**31)]
)
def test_sizes(text: str, count: int) -> None:
    assert bytes_of("x", text) == count


@pytest.mark.parametrize("text", ["", "-1", "1e9", "1 XB", "1GB2", "٣GB", "9" * 40])
def test_texts_that_are_no_sizes(text: str) -> None:
    with pytest.raises(ConfigurationError, match="write a size"):
        bytes_of("x", text)


def test_what_is_served_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="lorakit demo writes out/demo"):
        sources(ServeConfig())
    (tmp_path / "out/demo/adapter").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="lorakit demo writes out/demo"):
        sources(ServeConfig())
    (tmp_path / "out/demo/adapter/lorakit.json").touch()
    assert sources(ServeConfig()) == (None, {"demo": "out/demo"})
    # The demo's adapter needs the base of the demo.
    assert sources(ServeConfig(base=BaseConfig(name="another"))) == (None, {})
    assert sources(ServeConfig(base=BaseConfig(device="cpu"))) == (None, {"demo": "out/demo"})
    assert sources(ServeConfig(follow=["out/a", "b=out/c"])) == (None, {"a": "out/a", "b": "out/c"})
    with pytest.raises(ConfigurationError, match="not a folder"):
        sources(ServeConfig(adapters="nowhere"))
    (tmp_path / "one").mkdir()
    (tmp_path / "one/adapter_config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="which is an adapter itself"):
        sources(ServeConfig(adapters="one"))


FOLLOWED = {
    "one name twice": (["out/a", "old/a"], "two runs .* 'a', 'out/a' and 'old/a'.* NAME=old/a"),
    "one name given twice": (["x=out/a", "x=old/a"], "two runs with the name 'x'"),
    "the root": (["/"], "name '' for the run '/'. Write NAME=/, with a name"),
    "no name": (["=out/a"], "name '' for the run 'out/a'. Write NAME=out/a"),
    "a line break": (["a\nb=out/a"], r"name 'a\\nb' for"),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_a_followed_run_needs_a_name_of_its_own(case: str) -> None:
    runs, words = FOLLOWED[case]
    with pytest.raises(ConfigurationError, match=words):
        sources(ServeConfig(follow=runs))


def test_paths_of_followed_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out/lr=1e-4").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out")
    runs = ["lr=1e-4", "new=lr=1e-4", "absent=1"]
    assert ServeConfig(follow=runs).followed == {
        "lr=1e-4": "lr=1e-4",
        "new": "lr=1e-4",
        "absent": "1",
    }
    assert ServeConfig(follow=["."]).followed == {"out": "."}


class Opener:
    """Stands for `webbrowser.open`."""

    def __init__(self, *, finds_one: bool) -> None:
        self.finds_one = finds_one
        self.opened: queue.Queue[str] = queue.Queue()

    def __call__(self, address: str) -> bool:
        self.opened.put(address)
        return self.finds_one


def greet(config: ServeConfig, memory_notice: str | None = None) -> str:
    """Greet as a server does; return its address."""
    opened: Any = SimpleNamespace(
        name="b",
        store=SimpleNamespace(names=lambda: ["sql"]),
        base=SimpleNamespace(model=SimpleNamespace(dtype="torch.float32", device="cpu")),
        engine=SimpleNamespace(name="continuous", notice=None),
        memory_notice=memory_notice,
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serve._greet(config, listener, opened)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("finds_one", [True, False])
def test_the_playground_opens_in_the_browser(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, finds_one: bool
) -> None:
    opener = Opener(finds_one=finds_one)
    monkeypatch.setattr("webbrowser.open", opener)
    before = set(threading.enumerate())
    address = greet(ServeConfig(open=True))
    assert opener.opened.get(timeout=10) == address
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    out, err = capsys.readouterr()
    assert out.splitlines()[1] == f"playground: {address}"
    assert err == ("" if finds_one else f"note: no browser was found. Open {address} yourself.\n")


def test_no_browser_opens_by_default(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("webbrowser.open", lambda _: pytest.fail("it was opened"))
    address = greet(ServeConfig())
    _, page, curl = capsys.readouterr().out.splitlines()
    assert page == f"playground: {address}"
    *_, body = shlex.split(curl)
    assert curl.startswith(f"curl {address}/v1/completions ")
    assert json.loads(body)["prompt"] == "Hello"
    greet(ServeConfig(prompt="river"))
    assert "prompt is for the playground that --open opens" in capsys.readouterr().err


def test_what_fits_into_memory_is_a_note(capsys: Any) -> None:
    greet(ServeConfig(), "--cache_memory 2GB holds 100 tokens")
    assert capsys.readouterr().err == "note: --cache_memory 2GB holds 100 tokens\n"


def test_every_answer_that_is_chosen_for_verification_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, Any] = {}

    def open_all(config: ServeConfig, report: Any) -> Any:
        seen["report"] = report
        engine = SimpleNamespace(
            start=lambda: None,
            close=lambda timeout: None,
            status=lambda: EngineStatus(True, 0, 0, 0.0, 0, 0),
        )
        store = SimpleNamespace(stats=lambda: StoreStats(0, 0, 0, 0, 0, 0))
        return SimpleNamespace(name="b", engine=engine, store=store, verifier=None)

    def answer(app: Any, listener: Any, **_: Any) -> None:
        seen["app"] = app
        one = Receipt("digest", (("sql", "a" * 64, 1.0),))
        blend = Receipt("digest", (("sql", "a" * 64, 0.5), ("e2e", "b" * 64, 0.5)))
        for receipt in (one, blend, Receipt("digest")):
            seen["report"](receipt, None)
        seen["report"](one, Verdict(one, (-1.0, -2.0), (-1.5, -2.0), bound=0.3))

    monkeypatch.setattr("lorakit.serving.opening.open_all", open_all)
    monkeypatch.setattr("lorakit.serving.http.running.run", answer)
    serve._serve(ServeConfig(), None, None)  # type: ignore[arg-type]
    page = seen["app"].state.serving.metrics.page().decode()
    for name in ("sql", "(blend)", "b"):
        assert f'verified_answers_total{{adapter="{name}",result="skipped"}} 1.0' in page
    assert 'verified_answers_total{adapter="sql",result="passed"} 1.0' in page
    assert "lorakit_verification_difference_sum 0.25" in page
    assert "lorakit_verification_difference Mean absolute difference" in page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, and an adapter for it."""
    folder = tmp_path_factory.mktemp("served")
    save_base(folder / "base")
    opened = lorakit.load_base(folder / "base", dtype="float32")
    handle = lorakit.attach(opened.model, lorakit.LoRA(rank=2), name="x")
    randomise(handle, seed=1)
    handle.save(folder / "adapters/sql")
    return folder


COMMAND = [
    "serve",
    "--adapters",
    "adapters",
    "--port",
    "0",
    "--base.name",
    "base",
    "--cache_memory",
    "10MB",
]
ASKED = {"model": "sql", "prompt": "The river", "max_tokens": 4}
Serve = Callable[..., int]


@pytest.fixture
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Run the command; a function uses its application in place of a network. Returns the exit status."""

    def start(use: Callable[[TestClient], Any], *options: str) -> int:
        def run(app: Any, listener: Any, **_: Any) -> None:
            with TestClient(app, base_url="http://localhost:8000") as client:
                use(client)

        monkeypatch.setattr("lorakit.serving.http.running.run", run)
        return main([*COMMAND, *options])

    monkeypatch.chdir(folder)
    return start


def status(client: TestClient, path: str = "completions", **body: Any) -> int:
    return client.post(f"/v1/{path}", json=body).status_code


LOADED = {"lora_name": "again", "lora_path": "sql"}


def test_by_default_only_this_machine_is_answered_and_nothing_is_loaded(serving: Serve) -> None:
    def use(client: TestClient) -> None:
        assert status(client, **ASKED) == 200
        assert status(client, "load_lora_adapter", **LOADED) == 403
        client.headers["host"] = "evil.example"
        assert status(client, **ASKED) == 403

    assert serving(use) == 0


def test_adapters_are_loaded_if_allowed(serving: Serve) -> None:
    def use(client: TestClient) -> None:
        assert status(client, "load_lora_adapter", **LOADED) == 200
        assert status(client, **{**ASKED, "model": "again"}) == 200

    assert serving(use, "--allow_loading") == 0


@pytest.mark.parametrize("health", [401, 200])
def test_requests_need_a_key_of_the_file(serving: Serve, tmp_path: Path, health: int) -> None:
    secret = "k" * 20
    keys = [{"name": "team", "key": secret, "adapters": ["sql"]}]
    (tmp_path / "keys.json").write_text(json.dumps(keys))

    def use(client: TestClient) -> None:
        assert status(client, **ASKED) == 401
        assert client.get("/health").status_code == health
        client.headers["authorization"] = f"Bearer {secret}"
        assert status(client, **ASKED) == 200
        assert status(client, **{**ASKED, "model": "base"}) == 404
        client.headers["host"] = "api.example"  # other machines have names for this one
        assert status(client, **ASKED) == 200

    options = ["--health_without_key"] if health == 200 else []
    assert serving(use, "--keys", str(tmp_path / "keys.json"), *options) == 0


def test_requests_stay_within_the_limits_of_the_options(serving: Serve) -> None:
    def use(client: TestClient) -> None:
        assert status(client, **ASKED) == 200
        assert status(client, **{**ASKED, "max_tokens": 5}) == 400
        assert status(client, **ASKED, n=3) == 400
        assert status(client, **{**ASKED, "prompt": "river " * 9}) == 400
        assert status(client, **ASKED, user="x" * 200) == 413

    limits = {"max_tokens": 4, "max_choices": 2, "max_prompt_tokens": 8, "max_body": 200}
    assert serving(use, *(word for k, v in limits.items() for word in (f"--{k}", str(v)))) == 0


@pytest.mark.parametrize(("stops", "is_draining"), [(False, False), (True, False), (True, True)])
def test_a_failed_verification_stops_the_server_if_asked(
    serving: Serve, monkeypatch: pytest.MonkeyPatch, capsys: Any, stops: bool, is_draining: bool
) -> None:
    # All answers fail.
    monkeypatch.setattr("lorakit.serving.verification.bound_for", lambda dtype: -1.0)
    monkeypatch.setattr("os.kill", lambda *_: pytest.fail("on Windows it ends the process"))
    ended = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: ended.set())

    def use(client: TestClient) -> None:
        def replay(*arguments: Any) -> None:
            client.app.state.serving.is_draining = is_draining  # type: ignore[attr-defined]
            original(*arguments)

        original = Verifier._replay
        monkeypatch.setattr(Verifier, "_replay", replay)
        assert status(client, **ASKED) == 200
        failure = 'lorakit_verified_answers_total{adapter="sql",result="failed"} 1.0'
        end = time.monotonic() + 60
        while failure not in client.get("/metrics").text:
            assert time.monotonic() < end
            time.sleep(0.01)
        sends = stops and not is_draining
        assert ended.wait(10 if sends else 0.1) == sends

    try:
        options = ["--verify", "1", *(["--verify_stops"] if stops else [])]
        assert serving(use, *options) == int(stops)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ("an answer failed its verification" in capsys.readouterr().err) == stops


@pytest.mark.slow
def test_the_server_from_its_start_to_its_end(folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "lorakit", *COMMAND],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            greeting, page, curl = (process.stdout.readline() for _ in range(3))
            assert "base base (float32, cpu), continuous engine, 1 adapter" in greeting
            address = greeting.split()[2].rstrip(",")
            assert page == f"playground: {address}\n"
            with urllib.request.urlopen(address, timeout=60) as answer:
                assert answer.headers["content-type"].startswith("text/html")
            assert curl.startswith(f"curl {address}/v1/completions ")
            body = curl.split(" -d ")[1].strip().strip("'").encode()
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{address}/v1/completions", body, headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["model"] == "sql"
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=30)
            assert (process.returncode, err) == (0, "")
        finally:
            process.kill()

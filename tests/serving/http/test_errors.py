"""Every error has OpenAI's form and a request id, and every limit is a 4xx that names it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakeClassifier, classifying_store
from own_loop import run
from served import BASE, Serve, Served, wait_for

from lorakit.errors import AdapterFileError, AdapterStateError
from lorakit.serving.errors import EngineStoppedError, UnknownAdapterError
from lorakit.serving.http import classify, errors, prompts, schemas, state
from lorakit.serving.http.state import RequestRecord
from lorakit.serving.http.streaming import EventStream


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["x-request-id"]
    content = answer.json()
    assert list(content) == ["error"]
    assert list(content["error"]) == ["message", "type", "param", "code"]
    return content["error"]


COMPLETIONS = {
    "an unknown field": ({"tempreature": 1}, "tempreature", "unknown_field", "is not a field"),
    "echo": ({"echo": True}, "echo", "unsupported_field", "does not support"),
    "suffix": ({"suffix": "x"}, "suffix", "unsupported_field", "does not support"),
    "logit_bias": ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_field", "does not support"),
    "frequency_penalty": (
        {"frequency_penalty": 0.5},
        "frequency_penalty",
        "unsupported_field",
        "or set it to 0",
    ),
    "presence_penalty": (
        {"presence_penalty": False},
        "presence_penalty",
        "unsupported_field",
        "does not",
    ),
    "best_of": ({"best_of": 3}, "best_of", "unsupported_field", "other than n"),
    "text for a number": (
        {"max_tokens": "1"},
        "max_tokens",
        "invalid_value",
        'is "1"; it must be a valid integer',
    ),
    "a bool for a number": (
        {"temperature": True},
        "temperature",
        "invalid_value",
        "is true; it must be",
    ),
    "a float for a whole number": ({"n": 1.0}, "n", "invalid_value", "integer"),
    "a number for a bool": ({"stream": 1}, "stream", "invalid_value", "boolean"),
    "temperature 3": (
        {"temperature": 3},
        "temperature",
        "invalid_value",
        "less than or equal to 2",
    ),
    "top_p 0": ({"top_p": 0}, "top_p", "invalid_value", "greater than 0"),
    "n 0": ({"n": 0}, "n", "invalid_value", "greater than or equal to 1"),
    "max_tokens 0": (
        {"max_tokens": 0},
        "max_tokens",
        "invalid_value",
        "greater than or equal to 1",
    ),
    "a huge seed": ({"seed": 2**63}, "seed", "invalid_value", "less than"),
    "a stop of no text": ({"stop": [""]}, "stop", "invalid_value", "none is empty"),
    "a stop of a number": ({"stop": ["a", 1]}, "stop", "invalid_value", "list of texts"),
    "no prompt": ({"prompt": None}, "prompt", "invalid_value", "it must be a text"),
    "an empty prompt": ({"prompt": ""}, "prompt", "invalid_value", "has no tokens"),
    "no prompts": ({"prompt": []}, "prompt", "invalid_value", "it must be a text"),
    "prompts of two kinds": ({"prompt": ["a", 1]}, "prompt", "invalid_value", "it must be a text"),
    "an unknown token": ({"prompt": [5, 100000]}, "prompt", "invalid_value", "token id 100000"),
    "a negative token": ({"prompt": [-1]}, "prompt", "invalid_value", "token id -1"),
    "stream_options": (
        {"stream_options": {}},
        "stream_options",
        "unsupported_field",
        "needs stream",
    ),
    "an unknown stream option": (
        {"stream": True, "stream_options": {"x": 1}},
        "stream_options.x",
        "unknown_field",
        "is not a field",
    ),
    "an empty blend": ({"model": BASE, "lora": {}}, "lora", "invalid_value", "1 to 8"),
    "a blend on an adapter": ({"lora": {"sql": 1}}, "lora", "invalid_value", f"'{BASE}'"),
    "a weight of text": (
        {"model": BASE, "lora": {"sql": "1"}},
        "lora.sql",
        "invalid_value",
        "number",
    ),
    "a huge weight": ({"model": BASE, "lora": {"sql": 1e9}}, "lora.sql", "invalid_value", "100"),
    "a blend of the base": (
        {"model": BASE, "lora": {BASE: 1}},
        "lora",
        "invalid_value",
        "names of adapters",
    ),
    "too many new tokens": ({"max_tokens": 5000}, "max_tokens", "max_tokens", "at most 4,096"),
    "more than the context": (
        {"max_tokens": 300},
        "prompt",
        "context_length_exceeded",
        "context of 256",
    ),
    "a long prompt": (
        {"prompt": "x y " * 300, "max_tokens": 1},
        "prompt",
        "context_length_exceeded",
        "Shorten the prompt",
    ),
    "too many answers": ({"n": 33}, "n", "max_choices", "at most 32"),
    "too many answers to prompts": (
        {"prompt": ["a"] * 17, "n": 2},
        "n",
        "max_choices",
        "has 34 answers",
    ),
    "too many prompts": ({"prompt": ["a"] * 33}, "prompt", "max_choices", "has 33 prompts"),
    "too many stops": ({"stop": list("abcde")}, "stop", "max_stops", "at most 4"),
    "a long stop": ({"stop": "a" * 257}, "stop", "max_stop_length", "at most 256"),
    "base_logprobs alone": (
        {"base_logprobs": True},
        "base_logprobs",
        "unsupported_field",
        "Set logprobs: 0",
    ),
    "too many logprobs": ({"logprobs": 21}, "logprobs", "max_top_logprobs", "at most 20"),
}


@pytest.mark.parametrize("case", COMPLETIONS)
def test_an_invalid_completion_names_its_field(serve: Serve, case: str) -> None:
    body, param, code, words = COMPLETIONS[case]
    served = serve()
    error = error_of(served.complete(**body), 400)
    assert (error["param"], error["code"]) == (param, code)
    assert words in error["message"], error["message"]
    assert error["type"] == "invalid_request_error"
    assert served.engine.tickets == []


USER = {"role": "user", "content": "a"}
CHATS = {
    "tools": ({"tools": [{"type": "function"}]}, "tools", "does not support"),
    "response_format": (
        {"response_format": {"type": "json_object"}},
        "response_format",
        'Leave it out, or set it to {"type": "text"}.',
    ),
    "store": ({"store": True}, "store", "or set it to false"),
    "metadata": ({"metadata": {"a": "b"}}, "metadata", "does not support"),
    "reasoning_effort": ({"reasoning_effort": "low"}, "reasoning_effort", "does not support"),
    "a prompt": ({"prompt": "a"}, "prompt", "is not a field"),
    "base_logprobs alone": ({"base_logprobs": True}, "base_logprobs", "needs logprobs: true"),
    "base_logprobs as a number": ({"base_logprobs": 1}, "base_logprobs", "boolean"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    "logprobs as a number": ({"logprobs": 2}, "logprobs", "boolean"),
    "two lengths": ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
    "a long answer": ({"max_completion_tokens": 5000}, "max_completion_tokens", "at most 4,096"),
    "a variable that the template lacks": (
        {"chat_template_kwargs": {"add_generation_promt": False}},
        "chat_template_kwargs",
        "has 'add_generation_promt', which the tokenizer's chat template does not read",
    ),
    "an argument of the renderer": (
        {"chat_template_kwargs": {"add_generation_prompt": False}},
        "chat_template_kwargs",
        "has 'add_generation_prompt', which is set for each conversation",
    ),
    "the messages as a variable": (
        {"chat_template_kwargs": {"messages": []}},
        "chat_template_kwargs",
        "has 'messages', which is set for each conversation",
    ),
    "too many variables": (
        {"chat_template_kwargs": {f"a{i}": 1 for i in range(1001)}},
        "chat_template_kwargs",
        "at most 1,000 items",
    ),
    "no messages": ({"messages": []}, "messages", "is []; it must have at least 1 item."),
    "an unknown role": ({"messages": [{**USER, "role": "tool"}]}, "messages.0.role", "'assistant'"),
    "a long name": (
        {"messages": [{**USER, "name": "x" * 1001}]},
        "messages.0.name",
        "at most 1,000 characters",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages.0.content",
        "text only",
    ),
    "no content": (
        {"messages": [{"role": "user", "content": None}]},
        "messages.0.content",
        "it must be a text",
    ),
    "too many messages": ({"messages": [USER] * 1025}, "messages", "max_messages"),
}


@pytest.mark.parametrize("case", CHATS)
def test_an_invalid_chat_names_its_field(serve: Serve, case: str) -> None:
    body, param, words = CHATS[case]
    error = error_of(serve().chat(**body), 400)
    assert error["param"] == param
    assert words in error["message"], error["message"]


NEUTRAL = {
    "n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "none",
    "response_format": {"type": "text"}, "store": False, "metadata": None, "user": "someone", "modalities": ["text"],
    "service_tier": "auto", "safety_identifier": "someone", "top_logprobs": 0, "stream": True,
    "stream_options": {"include_usage": None},
}  # fmt: skip


def test_values_that_change_nothing_are_accepted(serve: Serve) -> None:
    served = serve()
    for parallel in (False, True):
        assert served.chat(**NEUTRAL, parallel_tool_calls=parallel).status_code == 200
    answer = served.complete(
        echo=False, suffix=None, best_of=2, n=2, logit_bias=None, logprobs=False
    )
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_unknown_model_lists_the_known_ones(serve: Serve, path: str) -> None:
    body = {"prompt": "a"} if path == "/v1/completions" else {"messages": [USER]}
    error = error_of(serve().post(path, model="sqll", **body), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "Did you mean 'sql'?" in error["message"]
    assert f"Models: {BASE}, e2e, sql." in error["message"]


def test_an_unknown_adapter_of_a_blend_is_named(serve: Serve) -> None:
    error = error_of(serve().complete(model=BASE, lora={"sql": 1, "other": 1}), 404)
    assert error["param"] == "lora.other"


def test_an_unknown_model_is_never_answered_by_the_base(serve: Serve) -> None:
    served = serve()
    for model in ("", "SQL", "base", "sql ", "../sql"):
        assert served.complete(model=model).status_code in (400, 404)
    assert served.engine.tickets == []


# --- bodies --------------------------------------------------------------------------------------------

JSON = {
    "malformed": (b'{"model": ', "line 1, column 11"),
    "a duplicate key": (
        b'{"model": "sql", "model": "e2e", "prompt": "a"}',
        "'model' is duplicated",
    ),
    "NaN": (b'{"model": "sql", "prompt": "a", "temperature": NaN}', "NaN is not a JSON number"),
    "infinity": (b'{"model": "sql", "prompt": "a", "temperature": 1e999}', "finite"),
    "deep nesting": (b"[" * 100_000, "recursion depth"),
    "no UTF-8": (b'{"model": "\xff"}', "not UTF-8"),
    "half a character": (b'{"model": "sql", "prompt": "\\ud800"}', "half of a surrogate"),
    "a huge number": (b'{"n": ' + b"9" * 5000 + b"}", "digits"),
    "empty": (b"", "empty"),
    "a list": (b"[]", "The body is []"),
}


@pytest.mark.parametrize("case", JSON)
def test_a_body_is_strict_json(serve: Serve, case: str) -> None:
    body, words = JSON[case]
    headers = {"content-type": "application/json"}
    answer = serve().client.post("/v1/completions", content=body, headers=headers)
    assert words in error_of(answer, 400)["message"]


MANY = 9_000
WRONG = {
    "messages": ("/v1/chat/completions", {"messages": [0] * MANY}, "messages.0"),
    "messages without fields": (
        "/v1/chat/completions",
        {"messages": [{}] * MANY},
        "messages.0.role",
    ),
    "fields": ("/v1/completions", {"prompt": "a", **dict.fromkeys(map(str, range(MANY)))}, "0"),
    "fields of messages": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a", **dict.fromkeys(map(str, range(1, MANY)))}]},
        "messages.0.1",
    ),
    "parts": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text"}] * MANY}]},
        "messages.0.content.0.text",
    ),
    "weights": (
        "/v1/completions",
        {"prompt": "a", "lora": dict.fromkeys(map(str, range(MANY)), "1")},
        "lora",
    ),
    "stops": ("/v1/completions", {"prompt": "a", "stop": [0] * MANY}, "stop"),
    "pairs": ("/v1/classify", {"input": [["a"]] * MANY}, "input"),
}


@pytest.mark.parametrize("case", WRONG)
def test_validation_stops_at_the_first_problem(
    serve: Serve, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs on the event loop: a body of 2 MB with a problem in every value would stop the server for seconds."""
    path, body, param = WRONG[case]
    counts, original = [], errors.validation_error

    def counted(problems: Any) -> Any:
        counts.append(len(list(problems)))
        return original(problems)

    monkeypatch.setattr(errors, "validation_error", counted)
    assert error_of(serve().post(path, model="sql", **body), 400)["param"] == param
    assert max(counts) < 10


TOO_MANY = {
    "messages": ("chat/completions", {"messages": [{"role": "user", "content": ""}] * 10_001}),
    "parts": (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 5_001}] * 2},
    ),
    "texts": ("classify", {"input": [["a", "b"]] * 10_001}),
}


@pytest.mark.parametrize("case", TOO_MANY)
def test_items_are_counted_before_they_are_validated(
    serve: Serve, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation runs on the event loop: 60,000 messages would stop the server for a second."""
    monkeypatch.setattr(schemas, "_is_pair", lambda _: 1 / 0)
    monkeypatch.setattr(schemas.Message, "unsupported", None)  # fails at the first message
    path, body = TOO_MANY[case]
    error = error_of(serve().post(f"/v1/{path}", model="sql", **body), 400)
    assert "at most 10,000" in error["message"]


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_large_body_is_413(serve: Serve, is_chunked: bool) -> None:
    served = serve(max_body=1000)
    whole = json.dumps({"model": "sql", "prompt": "a" * 2000}).encode()
    content = iter([whole[:900], whole[900:]]) if is_chunked else whole
    answer = served.client.post(
        "/v1/completions", content=content, headers={"content-type": "application/json"}
    )
    error = error_of(answer, 413)
    assert error["code"] == "max_body"
    assert "1 kB" in error["message"]


# --- routes, ids, and the state of the server ----------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/docs", 404), ("GET", "/redoc", 404), ("POST", "/", 405),
     ("GET", "/v1/completions", 405), ("DELETE", "/health", 405)],
)  # fmt: skip
def test_errors_of_routing(serve: Serve, method: str, path: str, status: int) -> None:
    error = error_of(serve().client.request(method, path), status)
    assert "/openapi.json" in error["message"]


def test_a_route_with_a_slash_is_another_one(serve: Serve) -> None:
    """A redirect would lead to whatever the Host header says."""
    answer = serve().client.post("/v1/completions/", json={}, follow_redirects=False)
    assert error_of(answer, 404)["code"] == "not_found"


@pytest.mark.parametrize("given", ["abc-1", "x" * 128])
def test_a_short_request_id_is_kept(serve: Serve, given: str) -> None:
    answer = serve().client.get("/health", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\tb", "é"])
def test_another_request_id_is_replaced(serve: Serve, given: str) -> None:
    headers = {"x-request-id": given.encode("latin-1")}
    kept = serve().client.get("/health", headers=headers).headers["x-request-id"]
    assert len(kept) == 32
    assert kept != given


STORE_ERRORS = [
    (
        UnknownAdapterError("No adapter is named 'sql'. Known: secret."),
        404,
        "There is no model 'sql'",
    ),
    (AdapterFileError("'sql' is damaged."), 500, "is damaged"),
    (AdapterStateError("'sql' is not linear in a weight."), 400, "not linear"),
    (OSError("/secret/path"), 500, "The server failed"),
]


@pytest.mark.parametrize(("error", "status", "words"), STORE_ERRORS)
def test_errors_of_the_store(serve: Serve, error: Exception, status: int, words: str) -> None:
    served = serve()
    served.store.fails = error
    message = error_of(served.complete(), status)["message"]
    assert words in message
    assert "secret" not in message


def test_a_client_does_not_see_the_paths_of_the_server(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve()
    served.store.fails = AdapterFileError("'/srv/secret/adapters/sql/adapter_config.json' is bad.")
    assert error_of(served.complete(), 500)["message"] == "'sql/adapter_config.json' is bad."
    assert "/srv/secret/adapters/sql/adapter_config.json" in caplog.text


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (r"C:\srv\secret\sql\a.json", r"sql\a.json"),
        (r"C:\\srv\\secret\\sql\\a.json", r"sql\\a.json"),  # as in repr
        (r"C:\srv/secret/sql\a.json", r"sql\a.json"),
        (r"\\secret\srv\sql\a.json", r"sql\a.json"),
        ("/v1/models", "/v1/models"),
        ("a:b/c/d", "a:b/c/d"),
    ],
)
def test_the_folders_of_windows_are_removed_too(path: str, shown: str) -> None:
    assert errors.without_folders(f"'{path}' is bad, '{path}'.") == f"'{shown}' is bad, '{shown}'."


@pytest.mark.parametrize("route", ["completions", "chat", "classify"])
def test_a_text_that_cannot_fit_is_not_tokenised(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    """Other requests wait for their turn to tokenise; 2 MB take seconds."""
    monkeypatch.setattr(prompts, "TOKENISING", None)
    monkeypatch.setattr(classify, "TOKENISING", None)
    text = "a " * 100_000
    if route == "classify":
        served = serve(store=classifying_store(), engine=FakeClassifier())
        answer = served.post("/v1/classify", model="reviews", input=["a" * 10, text][1:])
    else:
        served = serve()
        answer = served.chat(text) if route == "chat" else served.complete(prompt=text)
    error = error_of(answer, 400)
    assert error["code"] == "context_length_exceeded"
    assert "200,0" in error["message"]


def test_a_full_queue_is_429(serve: Serve) -> None:
    served = serve()
    served.engine.is_full = True
    answer = served.complete(n=2)
    assert error_of(answer, 429)["code"] == "queue_full"
    assert int(answer.headers["retry-after"]) >= 1


def test_requests_beyond_the_most_are_429_before_any_work(serve: Serve) -> None:
    served = serve(max_requests=1)
    served.store.hold = threading.Event()
    answers: list[Any] = []
    first = threading.Thread(target=lambda: answers.append(served.complete()))
    first.start()
    wait_for(lambda: served.app.state.serving.computing == 1)
    assert error_of(served.complete(), 429)["code"] == "queue_full"
    assert "lorakit_open_requests 1.0" in served.client.get("/metrics").text
    served.store.hold.set()
    first.join()
    assert answers[0].status_code == 200
    served.settle()
    assert "lorakit_open_requests 0.0" in served.client.get("/metrics").text
    assert served.complete().status_code == 200


def _die(served: Served) -> None:
    served.engine.is_alive = False


def _drain(served: Served) -> None:
    served.app.state.serving.is_draining = True


@pytest.mark.parametrize(
    ("change", "words"),
    [(_die, "has stopped"), (_drain, "shutting down")],
    ids=["dead", "draining"],
)
def test_a_dead_or_draining_engine_is_503(serve: Serve, change: Any, words: str) -> None:
    served = serve()
    assert served.client.get("/health").json() == {"status": "ok"}
    change(served)
    for answer in (served.client.get("/health"), served.complete(), served.chat()):
        assert words in error_of(answer, 503)["message"]
        assert answer.headers["retry-after"]


def test_an_engine_that_dies_at_a_request_is_503(serve: Serve) -> None:
    served = serve()
    served.engine.refuses = EngineStoppedError("The engine has failed.")
    error_of(served.complete(), 503)


@pytest.mark.parametrize("stream", [False, True])
def test_a_long_request_is_cancelled(serve: Serve, stream: bool) -> None:
    served = serve(max_seconds=0.3)
    served.engine.pause = threading.Event()
    answer = served.complete(stream=stream)
    if stream:
        assert '"code": "max_seconds"' in answer.text.split("\n\n")[-2]
        assert "[DONE]" not in answer.text
    else:
        assert error_of(answer, 408)["code"] == "max_seconds"
    assert served.engine.tickets[0].cancelled.wait(1)


def test_a_long_stream_is_cancelled_before_its_client_reads_the_error(serve: Serve) -> None:
    cancelled: list[bool] = []
    generation = SimpleNamespace(cancel=lambda: cancelled.append(True))
    app = serve(max_seconds=0.05).app
    record = RequestRecord("x", time.monotonic())
    scope = {"type": "http", "app": app, "lorakit.record": record, "headers": []}

    async def events() -> AsyncIterator[str]:
        await asyncio.sleep(60)
        yield ""

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(60)
        return {}

    async def send(message: dict[str, Any]) -> None:
        assert cancelled or b"max_seconds" not in message.get("body", b"")

    run(EventStream(generation, events(), {})(scope, receive, send))  # type: ignore[arg-type]
    assert cancelled


def test_a_slow_preparation_is_cancelled_and_its_lease_released(serve: Serve) -> None:
    served = serve(max_seconds=0.2)
    served.store.hold = threading.Event()
    error_of(served.complete(), 408)
    served.store.hold.set()
    served.settle()
    assert len(served.store.leases) == 1


def test_requests_that_wait_for_adapters_leave_threads_for_others(serve: Serve) -> None:
    served = serve()
    served.store.hold = threading.Event()
    requests = [threading.Thread(target=served.complete) for _ in range(state.THREADS)]
    for one in requests:
        one.start()
    wait_for(lambda: served.app.state.serving.computing == state.THREADS)
    listing = threading.Thread(target=served.client.get, args=("/v1/models",))
    listing.start()
    listing.join(3)
    was_answered = not listing.is_alive()
    served.store.hold.set()
    for one in (*requests, listing):
        one.join()
    assert was_answered


def test_the_openapi_document_names_every_route(serve: Serve) -> None:
    document = serve().client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        *("/v1/completions", "/v1/chat/completions", "/v1/classify", "/v1/models"),
        *("/v1/models/{model}", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
        *("/v1/reports/{model}", "/health", "/metrics"),
    }
    assert "422" not in json.dumps(document)


def test_another_host_is_rejected_where_hosts_are_named(serve: Serve) -> None:
    served = serve(host="127.0.0.1")
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert served.client.get("/health", headers={"host": host}).status_code == 200
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", ""):
        answer = served.client.get("/health", headers={"host": host})
        error = error_of(answer, 403)
        assert error["code"] == "host_not_allowed"
        assert "Add --keys FILE" in error["message"]

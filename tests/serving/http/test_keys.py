"""API keys: every route needs one, each sees its own adapters, and no key is ever shown."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from served import BASE, Serve
from test_errors import error_of

from lorakit.errors import ConfigurationError
from lorakit.serving.http.keys import Budget, KeyRing, read_keys

ALL, SQL = "all-0123456789abcdef", "sql-0123456789abcdef"


def ring(tmp_path: Path, *entries: dict[str, Any]) -> KeyRing:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(list(entries)))
    return read_keys(file)


@pytest.fixture
def keys(tmp_path: Path) -> KeyRing:
    return ring(
        tmp_path,
        {"name": "all", "key": ALL, "operator": True},
        {"name": "sql", "sha256": hashlib.sha256(SQL.encode()).hexdigest(), "adapters": ["sq*"]},
    )


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


ROUTES = [
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/v1/classify"), ("GET", "/v1/models"),
    ("GET", "/v1/models/sql"), ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"),
    ("GET", "/v1/reports/sql"), ("GET", "/health"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("POST", "/"),
    ("GET", "/nothing"), ("OPTIONS", "/v1/models"),
]  # fmt: skip


def test_the_list_of_routes_is_complete(serve: Serve) -> None:
    paths = {path for _, path in ROUTES} | {"/v1/models/{model}", "/v1/reports/{model}"}
    assert set(serve().client.get("/openapi.json").json()["paths"]) <= paths


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_a_key(serve: Serve, keys: KeyRing, method: str, path: str) -> None:
    served = serve(keys=keys, allow_loading=True)
    headers = [
        {},
        bearer("wrong-0123456789abcdef"),
        {"authorization": ALL},
        {"authorization": f"Basic {ALL}"},
    ]
    for sent in headers:
        answer = served.client.request(method, path, headers=sent)
        error = error_of(answer, 401)
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert served.client.request(method, path, headers=bearer(ALL)).status_code != 401


def test_health_is_exempt_by_a_setting(serve: Serve, keys: KeyRing) -> None:
    served = serve(keys=keys, health_without_key=True)
    assert served.client.get("/health").status_code == 200
    assert served.client.get("/health/").status_code in (307, 401)
    assert served.client.get("/metrics").status_code == 401


def test_a_key_sees_its_own_models(serve: Serve, keys: KeyRing) -> None:
    served = serve(keys=keys)
    for key, names in ((ALL, [BASE, "e2e", "sql"]), (SQL, ["sql"])):
        listed = served.client.get("/v1/models", headers=bearer(key)).json()["data"]
        assert [model["id"] for model in listed] == names


@pytest.mark.parametrize("model", ["e2e", BASE])
def test_a_foreign_model_is_answered_as_an_unknown_one(
    serve: Serve, keys: KeyRing, model: str
) -> None:
    served = serve(keys=keys)
    messages = []
    for name in (model, "x" * len(model)):
        body = {"model": name, "prompt": "a"}
        answer = served.client.post("/v1/completions", json=body, headers=bearer(SQL))
        messages.append(error_of(answer, 404)["message"].replace(name, "NAME"))
        one = served.client.get(f"/v1/models/{name}", headers=bearer(SQL))
        error_of(one, 404)
    assert messages[0] == messages[1]
    assert "e2e" not in messages[1]
    assert served.engine.tickets == []


def test_a_blend_needs_every_part(serve: Serve, tmp_path: Path) -> None:
    served = serve(keys=ring(tmp_path, {"name": "a", "key": SQL, "adapters": ["sql", BASE]}))
    body = {"model": BASE, "prompt": "a", "lora": {"sql": 1, "e2e": 1}}
    answer = served.client.post("/v1/completions", json=body, headers=bearer(SQL))
    assert error_of(answer, 404)["param"] == "lora.e2e"


def test_only_an_operator_loads_unloads_and_reads_metrics(serve: Serve, keys: KeyRing) -> None:
    served = serve(keys=keys, allow_loading=True)
    load = {"lora_name": "sql2", "lora_path": "sql2"}
    for headers, status in ((bearer(SQL), 403), (bearer(ALL), 200)):
        client = served.client
        assert (
            client.post("/v1/load_lora_adapter", json=load, headers=headers).status_code == status
        )
        body = {"lora_name": "sql2"}
        assert (
            client.post("/v1/unload_lora_adapter", json=body, headers=headers).status_code == status
        )
        assert client.get("/metrics", headers=headers).status_code == status


def test_too_many_requests_are_429(serve: Serve, tmp_path: Path) -> None:
    served = serve(keys=ring(tmp_path, {"name": "a", "key": ALL, "requests_per_minute": 2}))
    body = {"model": "sql", "prompt": "a"}
    answers = [
        served.client.post("/v1/completions", json=body, headers=bearer(ALL)) for _ in range(3)
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    error = error_of(answers[-1], 429)
    assert error["type"] == "rate_limit_error"
    assert "requests_per_minute" in error["message"]
    assert 20 < int(answers[-1].headers["retry-after"]) <= 30
    assert served.client.get("/health", headers=bearer(ALL)).status_code == 200


def test_an_invalid_request_counts(serve: Serve, tmp_path: Path) -> None:
    served = serve(keys=ring(tmp_path, {"name": "a", "key": ALL, "requests_per_minute": 1}))
    answers = [
        served.client.post("/v1/completions", json={}, headers=bearer(ALL)) for _ in range(2)
    ]
    assert [answer.status_code for answer in answers] == [400, 429]


def test_tokens_are_reserved_and_unused_ones_given_back(serve: Serve, tmp_path: Path) -> None:
    served = serve(keys=ring(tmp_path, {"name": "a", "key": ALL, "tokens_per_minute": 100}))
    served.engine.text = lambda request: " a"

    def complete(most: int) -> Any:
        body = {"model": "sql", "prompt": [5, 6], "max_tokens": most}
        answer = served.client.post("/v1/completions", json=body, headers=bearer(ALL))
        served.settle()
        return answer

    used = complete(90).json()["usage"]["total_tokens"]
    (key,) = served.app.state.serving.keys.keys
    assert key.tokens.take(101 - used) > 0
    assert complete(80).status_code == 200
    served.engine.text = lambda request: " a" * 99
    assert complete(80).json()["usage"]["completion_tokens"] == 80
    answer = complete(50)
    assert "tokens_per_minute" in error_of(answer, 429)["message"]
    assert int(answer.headers["retry-after"]) > 5
    answer = complete(99)
    assert error_of(answer, 400)["code"] == "tokens_per_minute"


def test_a_budget_refills_steadily() -> None:
    now = [0.0]
    budget = Budget(60, lambda: now[0])
    assert budget.take(60) == 0
    assert budget.take(30) == 30
    now[0] = 29.5
    assert budget.take(30) == pytest.approx(0.5)
    now[0] = 30.0
    assert budget.take(30) == 0
    now[0] = 1000.0
    assert budget.take(61) > 0
    assert budget.take(60) == 0


def test_no_key_is_shown(serve: Serve, keys: KeyRing, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    served = serve(keys=keys)
    served.engine.fails_after, served.engine.error = 0, RuntimeError("inside")
    body = {"model": "sql", "prompt": "a"}
    texts = [
        served.client.post("/v1/completions", json=body, headers=bearer(key)).text
        for key in (ALL, SQL, "wrong-0123456789abcdef")
    ]
    shown = "".join([*texts, caplog.text, repr(keys.keys)])
    assert not [key for key in (ALL, SQL, "wrong-0123456789abcdef") if key in shown]


FILES = {
    "unknown_field": ([{"name": "a", "key": ALL, "adapter": ["x"]}], "Did you mean 'adapters'?"),
    "no name": ([{"key": ALL}], "needs name, and either key or sha256"),
    "key and sha256": ([{"name": "a", "key": ALL, "sha256": "0" * 64}], "either key or sha256"),
    "a short key": ([{"name": "a", "key": "short"}], "has 5 characters; it must have at least 16"),
    "a number as key": ([{"name": "a", "key": 1234567890123456789}], "is not text"),
    "a short digest": ([{"name": "a", "sha256": "ab"}], "64 hexadecimal digits"),
    "no digest": ([{"name": "a", "sha256": "x" * 64}], "64 hexadecimal digits"),
    "one name twice": ([{"name": "a", "key": ALL}, {"name": "a", "key": SQL}], "same name"),
    "one key twice": ([{"name": "a", "key": ALL}, {"name": "b", "key": ALL}], "same key"),
    "no rate": ([{"name": "a", "key": ALL, "requests_per_minute": 0}], "must be at least 1"),
    "text as adapters": ([{"name": "a", "key": ALL, "adapters": "sql"}], "must be a list"),
    "no mapping": (["a"], "is not a mapping"),
    "no list": ({"name": "a"}, "has no list of keys"),
    "nothing": ([], "has no list of keys"),
}


@pytest.mark.parametrize("case", FILES)
def test_an_invalid_file_of_keys(tmp_path: Path, case: str) -> None:
    content, words = FILES[case]
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError) as raised:
        read_keys(file)
    assert words in str(raised.value), raised.value
    assert ALL not in str(raised.value)
    assert "1234567890" not in str(raised.value)


def test_a_file_that_is_no_yaml_shows_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(f"- name: a\n  key: {ALL}\n key: [{SQL}\n")
    with pytest.raises(ConfigurationError, match="line 3") as raised:
        read_keys(file)
    assert ALL not in str(raised.value)
    file.write_text(f"- name: a\n  key: {ALL}\0\n")
    with pytest.raises(ConfigurationError, match="control character") as raised:
        read_keys(file)
    assert ALL not in str(raised.value)
    with pytest.raises(ConfigurationError, match="does not exist"):
        read_keys(tmp_path / "none.yaml")
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        read_keys(file)


def test_a_yaml_file_with_a_heading(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(f"keys:\n- name: a\n  key: {ALL}\n")
    assert [key.name for key in read_keys(file).keys] == ["a"]

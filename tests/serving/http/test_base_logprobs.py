"""The field base_logprobs: the tokens of an answer under the base alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeEngine, score_of
from served import BASE, Serve, Served, wait_for
from test_completions import events
from test_errors import error_of
from test_keys import SQL, bearer, ring
from test_live import connect, request
from whole import post, served

import lorakit
from lorakit.errors import AdapterStateError
from lorakit.serving.errors import EngineStoppedError

__all__ = ["connect"]

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [5, 6, 7], "max_tokens": 4, "logprobs": 0},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Which pub?"}],
        "max_tokens": 4,
        "logprobs": True,
    },
}
ASKED = {"model": "sql", "base_logprobs": True}


def last_choices(answer: Any) -> dict[int, dict[str, Any]]:
    """Return the last choice of each answer of a stream; no other one may have the field."""
    last = {}
    *parts, done = events(answer.text)
    assert done == "[DONE]"
    for event in parts:
        for choice in event["choices"]:
            assert ("base_logprobs" in choice) == (choice["finish_reason"] is not None)
            last[choice["index"]] = choice
    return last


@pytest.mark.parametrize("path", ROUTES)
def test_a_whole_answer_has_them(serve: Serve, path: str) -> None:
    served = serve()
    answer = served.post(path, **ROUTES[path], **ASKED, n=2)
    assert answer.status_code == 200, answer.text
    for choice, (tokens, lease, start) in zip(
        answer.json()["choices"], served.engine.scored, strict=True
    ):
        assert choice["base_logprobs"] == score_of(tokens[start:])
        assert len(choice["base_logprobs"]) == 4
        assert tokens[:start] == list(served.engine.tickets[0].request.prompt)
        assert lease.blend == ()


@pytest.mark.parametrize("path", ROUTES)
def test_a_stream_has_them_in_the_last_event_of_each_answer(serve: Serve, path: str) -> None:
    served = serve()
    last = last_choices(served.post(path, **ROUTES[path], **ASKED, n=2, stream=True))
    expected = [score_of(tokens[start:]) for tokens, _, start in served.engine.scored]
    assert [last[0]["base_logprobs"], last[1]["base_logprobs"]] == expected


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("wish", [{}, {"base_logprobs": False}, {"base_logprobs": None}])
def test_without_the_field_nothing_is_computed(
    serve: Serve, path: str, wish: dict[str, Any]
) -> None:
    served = serve()
    body = {**ROUTES[path], "model": "sql", **wish}
    assert "base_logprobs" not in served.post(path, **body).text
    assert "base_logprobs" not in served.post(path, **body, stream=True).text
    assert (served.engine.scored, len(served.store.leases)) == ([], 2)


def test_the_base_is_scored_by_itself(serve: Serve) -> None:
    served = serve()
    answer = served.complete(model=BASE, logprobs=0, base_logprobs=True).json()
    ((tokens, _, start),) = served.engine.scored
    assert answer["choices"][0]["base_logprobs"] == score_of(tokens[start:])


def test_a_token_of_probability_0_is_a_number(serve: Serve) -> None:
    served = serve()
    served.engine.holds_scores = True
    threading.Thread(target=set_first, args=(served.engine, [float("-inf"), -1.0])).start()
    answer = served.complete(logprobs=0, base_logprobs=True, max_tokens=2).json()
    assert answer["choices"][0]["base_logprobs"] == [-9999.0, -1.0]


def set_first(engine: FakeEngine, result: list[float] | Exception) -> None:
    wait_for(lambda: len(engine.scores) == 1)
    if isinstance(result, Exception):
        engine.scores[0].set_exception(result)
    else:
        engine.scores[0].set_result(result)


# --- what fails ----------------------------------------------------------------------------------------


def test_a_key_that_may_not_use_the_base_does_not_learn_its_scores(
    serve: Serve, tmp_path: Path
) -> None:
    served = serve(keys=ring(tmp_path, {"name": "sql", "key": SQL, "adapters": ["sql"]}))
    served.client.headers.update(bearer(SQL))
    error = error_of(served.complete(logprobs=0, base_logprobs=True), 404)
    assert (error["param"], error["code"]) == ("base_logprobs", "model_not_found")
    assert served.engine.tickets == []
    assert served.complete(logprobs=0).status_code == 200


def test_a_base_that_cannot_compute_alone_is_known_before(serve: Serve) -> None:
    served = serve()
    acquire = served.store.acquire

    def refuse(choice: Any) -> Any:
        if choice is None:
            raise AdapterStateError("The base has no trained 'lm_head'. Choose an adapter.")
        return acquire(choice)

    served.store.acquire = refuse  # type: ignore[method-assign]
    error = error_of(served.complete(logprobs=0, base_logprobs=True, stream=True), 400)
    assert "no trained 'lm_head'" in error["message"]
    assert served.engine.tickets == []


FAILURES = {
    "the engine ends": (EngineStoppedError("The server was shut down."), 503, "shut down"),
    "no memory": (RuntimeError("CUDA out of memory"), 500, "The server failed"),
}


@pytest.mark.parametrize("case", FAILURES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_score_that_fails_is_an_error(serve: Serve, case: str, stream: bool) -> None:
    error, status, words = FAILURES[case]
    served = serve()
    served.engine.holds_scores = True
    threading.Thread(target=set_first, args=(served.engine, error)).start()
    answer = served.complete(logprobs=0, base_logprobs=True, stream=stream)
    if not stream:
        assert words in error_of(answer, status)["message"]
        return
    assert words in events(answer.text)[-1]["error"]["message"]


def test_an_engine_that_takes_no_score_is_an_error(serve: Serve) -> None:
    served = serve()

    def refuse(*_: Any, **__: Any) -> Any:
        raise EngineStoppedError("The server was shut down.")

    served.engine.score = refuse  # type: ignore[method-assign]
    error_of(served.complete(logprobs=0, base_logprobs=True), 503)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_running", [False, True])
def test_a_disconnect_while_the_base_computes_frees_everything(
    connect: Callable[..., Any],
    serve: Serve,
    live: Callable[[Served], str],
    stream: bool,
    is_running: bool,
) -> None:
    served = serve()
    served.engine.holds_scores = True
    body = {**ROUTES["/v1/completions"], **ASKED, "n": 2, "stream": stream}
    connection = connect(live(served))
    connection.sendall(request(body))
    wait_for(lambda: len(served.engine.scores) == 1)
    (future,) = served.engine.scores
    if is_running:
        assert future.set_running_or_notify_cancel()
    # The base may begin while the second answer is still computed.
    wait_for(lambda: served.app.state.serving.computing == 1)
    connection.close()
    wait_for(lambda: served.app.state.serving.in_flight == 0)
    if is_running:
        assert served.app.state.serving.computing == 1  # a pass cannot be stopped
        future.set_result([-1.0])
    served.settle()
    assert future.cancelled() != is_running
    assert len(served.engine.scores) == 1
    assert '"499"' in served.app.state.serving.metrics.page().decode()


def test_the_event_loop_answers_while_the_base_computes(serve: Serve) -> None:
    served = serve()
    served.engine.holds_scores = True
    answers: list[Any] = []
    thread = threading.Thread(
        target=lambda: answers.append(served.complete(logprobs=0, base_logprobs=True))
    )
    thread.start()
    wait_for(lambda: len(served.engine.scores) == 1)
    assert served.client.get("/health").status_code == 200
    assert answers == []
    served.engine.scores[0].set_result([-1.0])
    thread.join(10)
    assert answers[0].status_code == 200


def test_the_request_counts_under_its_adapter(serve: Serve) -> None:
    served = serve()
    served.complete(logprobs=0, base_logprobs=True)
    page = served.app.state.serving.metrics.page().decode()
    assert 'lorakit_requests_total{adapter="sql",route="/v1/completions",status="200"} 1.0' in page
    assert BASE not in page


# --- real engines --------------------------------------------------------------------------------------


@torch.no_grad()
def forced(folder: Path, prompt: list[int], tokens: list[int]) -> list[float]:
    """Return the log-probabilities of tokens after a prompt under the bare base."""
    model = lorakit.load_base(folder / "base", dtype="float32").model
    scores = model(torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
    return [scores[len(prompt) - 1 + i, token].item() for i, token in enumerate(tokens)]


@pytest.mark.slow
@pytest.mark.parametrize("verify", [0.0, 1.0])
@pytest.mark.parametrize("model", ["sql", "base", {"e2e": 0.5, "sql": -0.5}])
def test_they_are_those_of_the_bare_model(text: Path, model: Any, verify: float) -> None:
    chosen = {"model": "base", "lora": model} if isinstance(model, dict) else {"model": model}
    sent: list[tuple[list[int], list[int]]] = []
    with served(text, verify=verify) as (client, opened):
        submit = opened.engine.submit

        def recording(asked: Any, deliver: Any) -> Any:
            tokens: list[int] = []
            sent.append((list(asked.prompt), tokens))

            def record(event: Any) -> None:
                tokens.extend(token.id for token in getattr(event, "tokens", ()))
                deliver(event)

            return submit(asked, record)

        opened.engine.submit = recording  # type: ignore[method-assign]
        found, own = [], []
        for path, body in ROUTES.items():
            body = {**body, **chosen, "base_logprobs": True, "seed": 3, "n": 2, "max_tokens": 6}
            for choice in post(client, path, **body)["choices"]:
                found.append(choice["base_logprobs"])
                own.append(logprobs_of(choice))
            last = last_choices(client.post(path, json={**body, "stream": True}))
            found += [last[index]["base_logprobs"] for index in range(2)]
        wait_for(lambda: opened.store.stats().leases == 0)
    assert len(found) == len(sent) == 8
    for values, (prompt, tokens) in zip(found, sent, strict=True):
        assert values == pytest.approx(forced(text, prompt, tokens), abs=1e-4)
    for values, same in zip([*found[:2], *found[4:6]], own, strict=True):
        assert (values == pytest.approx(same, abs=1e-3)) == (model == "base")


def logprobs_of(choice: dict[str, Any]) -> list[float]:
    found = choice["logprobs"]
    return found.get("token_logprobs") or [token["logprob"] for token in found["content"]]


@pytest.mark.slow
def test_a_token_that_the_base_lacks_is_known_before(text: Path, tmp_path: Path) -> None:
    """The prompt is refused, with or without the field; an answer has tokens of the base only."""
    import shutil

    from tiny_tokenizer import tiny_tokenizer

    shutil.copytree(text / "adapters", tmp_path / "adapters")
    (tmp_path / "base").symlink_to(text / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "adapters/sql")
    with served(tmp_path) as (client, opened):
        body = {"model": "sql", "max_tokens": 4, "logprobs": 0, "base_logprobs": True}
        error = error_of(client.post("/v1/completions", json={**body, "prompt": "a <new>"}), 400)
        assert "which only the tokenizer knows" in error["message"]
        (choice,) = post(client, "/v1/completions", **body, prompt="a")["choices"]
        assert len(choice["base_logprobs"]) == len(logprobs_of(choice))
        wait_for(lambda: opened.store.stats().leases == 0)

"""Completions: OpenAI's form, in one piece and as a stream."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import Any

import pytest
from fakes import BASE_DIGEST, DIGESTS, TEXT
from served import BASE, Serve, wait_for

from lorakit.errors import AdapterFileError, DataError
from lorakit.serving.engine import Sampling
from lorakit.serving.http.answers import Chat, Completion, CompletionChoice
from lorakit.serving.http.logprobs import TokenTexts
from lorakit.serving.http.streaming import event


def events(text: str) -> list[Any]:
    """Return the contents of server-sent events; the last one is "[DONE]" or an error."""
    parts = text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    contents = [part.removeprefix("data: ") for part in parts]
    return [c if c == "[DONE]" else json.loads(c) for c in contents]


def test_an_answer_has_the_form_of_openai(serve: Serve) -> None:
    served = serve()
    answer = served.complete(max_tokens=100)
    assert answer.status_code == 200
    content = answer.json()
    assert content["object"] == "text_completion"
    assert content["model"] == "sql"
    (choice,) = content["choices"]
    assert choice == {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}
    prompt = len(served.engine.tickets[0].request.prompt)
    usage = content["usage"]
    assert usage["prompt_tokens"] == prompt
    assert usage["total_tokens"] == prompt + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


def test_the_defaults_are_those_of_openai(serve: Serve) -> None:
    served = serve()
    first, second = (served.complete().json() for _ in range(2))
    request, other = (ticket.request for ticket in served.engine.tickets)
    assert (request.max_tokens, request.stop, request.top_logprobs) == (16, (), None)
    assert (request.sampling.temperature, request.sampling.top_p) == (1.0, 1.0)
    assert request.sampling.seed != other.sampling.seed
    assert first["choices"][0]["finish_reason"] == "length"
    assert first["id"] != second["id"]


def test_a_text_with_unicode_line_ends_is_one_line_of_a_stream() -> None:
    text = "one\u2028two\x85three\u2029four \u00e9"
    choice = CompletionChoice(index=0, text=text, logprobs=None, finish_reason=None)
    line, empty = event(choice).splitlines()
    assert (json.loads(line.removeprefix("data: "))["text"], empty) == (text, "")


def test_null_is_the_default(serve: Serve) -> None:
    served = serve()
    names = (
        "n",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "max_tokens",
        "stream",
        "logprobs",
        "suffix",
    )
    assert served.complete(**dict.fromkeys(names)).status_code == 200
    assert served.engine.tickets[0].request.max_tokens == 16


def test_the_settings_reach_the_engine(serve: Serve) -> None:
    served = serve()
    served.complete(temperature=0, top_p=0.5, top_k=7, seed=-3, stop=["a", "b"], max_tokens=2, n=2)
    first, second = (ticket.request for ticket in served.engine.tickets)
    assert first.sampling == Sampling(temperature=0, top_p=0.5, top_k=7, seed=-3)
    assert second.sampling.seed not in (-3, first.sampling.seed)
    assert first.stop == ("a", "b")
    served.complete(seed=-3, n=2, stop="a")
    assert served.engine.tickets[3].request.sampling.seed == second.sampling.seed
    assert served.engine.tickets[3].request.stop == ("a",)


def test_the_answers_to_equal_prompts_have_seeds_of_their_own(serve: Serve) -> None:
    served = serve()
    served.complete(prompt=["The river", "The river"], n=2, seed=3)
    seeds = [ticket.request.sampling.seed for ticket in served.engine.tickets]
    assert seeds[0] == 3
    assert len(set(seeds)) == 4


@pytest.mark.parametrize("is_encoder_decoder", [False, True])
def test_a_completion_continues_its_prompt_and_a_chat_does_not(
    serve: Serve, is_encoder_decoder: bool
) -> None:
    served = serve()
    limits = served.engine.limits
    served.engine.limits = dataclasses.replace(limits, is_encoder_decoder=is_encoder_decoder)
    served.complete()
    served.chat()
    completion, chat = (ticket.request for ticket in served.engine.tickets)
    assert completion.text_before == (() if is_encoder_decoder else completion.prompt)
    assert chat.text_before == ()


def test_a_special_token_as_stop_text_ends_an_answer(serve: Serve) -> None:
    """No text of an answer shows it."""
    served = serve()
    served.complete(stop=["<|im_start|>", "pub"])
    request = served.engine.tickets[0].request
    ids = served.store.tokenizer.convert_tokens_to_ids(["<|im_start|>"])
    assert request.stop_ids == set(ids)
    assert request.stop == ("<|im_start|>", "pub")


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("The river", 1), (["The river", "pub"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2)],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_each_prompt_has_n_choices_in_order(serve: Serve, prompt: Any, count: int) -> None:
    served = serve()
    served.engine.text = lambda request: f" {len(request.prompt)}"
    content = served.complete(prompt=prompt, n=2).json()
    assert [choice["index"] for choice in content["choices"]] == list(range(2 * count))
    prompts = [ticket.request.prompt for ticket in served.engine.tickets]
    assert [c["text"] for c in content["choices"]] == [f" {len(p)}" for p in prompts]
    assert content["usage"]["prompt_tokens"] == sum(map(len, prompts[::2]))
    if isinstance(prompt, list) and isinstance(prompt[0], int):
        assert list(prompts[0]) == prompt


def test_a_prompt_has_the_ids_of_training(serve: Serve) -> None:
    from lorakit.tasks.language_modelling import prompt_ids

    served = serve()
    served.complete(prompt="The river pub")
    assert list(served.engine.tickets[0].request.prompt) == prompt_ids(
        served.store.tokenizer, "The river pub"
    )


@pytest.mark.parametrize(
    ("model", "lora", "names"),
    [
        (BASE, None, ()),
        ("sql", None, (("sql", 1.0),)),
        (BASE, {"sql": 0.7, "e2e": -0.5}, (("sql", 0.7), ("e2e", -0.5))),
    ],
)
def test_the_receipt_names_what_computed_the_answer(
    serve: Serve, model: str, lora: Any, names: Any
) -> None:
    served = serve()
    body = {"model": model} | ({"lora": lora} if lora else {})
    answer = served.complete(**body)
    (lease,) = served.store.leases
    assert [(n, w) for n, _, w in lease.receipt.adapters] == list(names)
    assert answer.json()["system_fingerprint"] == lease.receipt.fingerprint
    assert answer.headers["x-lorakit-base"] == BASE_DIGEST
    shown = ", ".join(DIGESTS[n] + ("" if w == 1 else f"*{w:g}") for n, w in names)
    assert answer.headers["x-lorakit-adapter"] == (shown or "none")


def test_logprobs_have_the_offsets_of_the_tokens(serve: Serve) -> None:
    served = serve()
    (choice,) = served.complete(max_tokens=100, logprobs=2).json()["choices"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == TEXT
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert TEXT[offset : offset + len(token)] == token
    assert set(logprobs["token_logprobs"]) == {-0.5}
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert top[token] == -0.5
        assert len(top) == 3
    (choice,) = served.complete(logprobs=0).json()["choices"]
    assert choice["logprobs"]["top_logprobs"] is None


@pytest.mark.parametrize("chat", [False, True])
def test_logprobs_of_a_whole_answer_do_not_stop_the_event_loop(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    """Thousands of tokens with 20 likely ones each take seconds."""
    original, threads = TokenTexts.add, set()

    def add(self: TokenTexts, token: int) -> Any:
        threads.add(threading.current_thread().name)
        return original(self, token)

    monkeypatch.setattr(TokenTexts, "add", add)
    for form in (Chat, Completion):  # its Python objects take ten times as long as its JSON
        monkeypatch.setattr(form, "model_dump", None)
    served = serve()
    answer = served.chat(logprobs=True) if chat else served.complete(logprobs=1)
    assert answer.json()["choices"][0]["logprobs"]
    assert all(name.startswith("lorakit-http") for name in threads)


def test_tokens_within_a_character_have_its_offset(serve: Serve) -> None:
    served = serve()
    served.engine.text = lambda request: "é€ pub"
    (choice,) = served.complete(logprobs=0, max_tokens=50).json()["choices"]
    offsets = choice["logprobs"]["text_offset"]
    assert offsets[:5] == [0, 0, 1, 1, 1]
    assert offsets[5] == 2


def test_a_stream_has_the_same_text(serve: Serve) -> None:
    served = serve()
    answer = served.complete(stream=True, max_tokens=100, n=2)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-lorakit-base"] == BASE_DIGEST
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == TEXT
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["system_fingerprint"] for chunk in chunks} == {
        served.store.leases[0].receipt.fingerprint
    }
    assert all("usage" not in chunk for chunk in chunks)


def test_a_stream_reports_its_usage_if_asked(serve: Serve) -> None:
    served = serve()
    answer = served.complete(
        stream=True, stream_options={"include_usage": True}, max_tokens=3, logprobs=1
    )
    *chunks, last, done = events(answer.text)
    assert done == "[DONE]"
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)
    tokens = [t for c in chunks if (lp := c["choices"][0]["logprobs"]) for t in lp["tokens"]]
    assert len(tokens) == 3


@pytest.mark.parametrize("after", [0, 3], ids=["before the first byte", "within the stream"])
def test_an_error_ends_a_stream(serve: Serve, after: int) -> None:
    served = serve()
    served.engine.fails_after = after
    answer = served.complete(stream=True)
    if after == 0:
        assert answer.status_code == 500
        error = answer.json()["error"]
    else:
        assert answer.status_code == 200
        *chunks, last = events(answer.text)
        assert len(chunks) == after
        error = last["error"]
    assert error["message"] == "The logits are not finite."
    assert error["type"] == "server_error"
    page = served.client.get("/metrics").text
    assert 'route="/v1/completions",status="500"' in page
    assert 'route="/v1/completions",status="200"' not in page


@pytest.mark.parametrize("stream", [False, True])
def test_an_unforeseen_error_shows_nothing_inside(serve: Serve, stream: bool, caplog: Any) -> None:
    served = serve()
    served.engine.fails_after, served.engine.error = 2, RuntimeError("secret 42")
    answer = served.complete(stream=stream)
    assert "secret" not in answer.text
    assert "The server failed" in answer.text
    assert "secret 42" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("x"), AdapterFileError("x")])
@pytest.mark.parametrize("place", ["the answer", "the stream", "the store"])
def test_a_failure_is_logged_under_the_id_of_its_request(
    serve: Serve, place: str, error: Exception, caplog: Any
) -> None:
    served = serve()
    served.engine.fails_after, served.engine.error = 2, error
    served.store.fails = error if place == "the store" else None
    answer = served.complete(stream=place == "the stream")
    (record,) = caplog.records
    assert f"request {answer.headers['x-request-id']} failed" in record.getMessage()


def test_an_error_of_one_choice_cancels_the_others(serve: Serve) -> None:
    served = serve()
    served.engine.pause = threading.Event()
    refused = served.engine.submit
    calls = []

    def submit(request: Any, deliver: Any) -> Any:
        calls.append(request)
        if len(calls) == 3:
            raise DataError("This prompt exceeds the cache.")
        return refused(request, deliver)

    served.engine.submit = submit  # type: ignore[method-assign]
    answer = served.complete(n=3)
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        400,
        "This prompt exceeds the cache.",
    )
    assert all(ticket.cancelled.is_set() for ticket in served.engine.tickets)
    wait_for(lambda: served.store.leases[0].releases == 1)

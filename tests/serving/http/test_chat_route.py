"""Chats: the template, the roles, and OpenAI's form."""

from __future__ import annotations

import pytest
from fakes import TEXT
from served import Serve
from test_completions import events
from tiny_tokenizer import CHAT_TEMPLATE, EOS, tiny_tokenizer

from lorakit.tasks.chat_template import ChatTemplate

USER = {"role": "user", "content": "Which pub?"}


def test_an_answer_has_the_form_of_openai(serve: Serve) -> None:
    served = serve()
    content = served.chat().json()
    assert content["object"] == "chat.completion"
    assert content["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert content["usage"]["prompt_tokens"] == len(served.engine.tickets[0].request.prompt)


def test_the_prompt_is_the_rendered_template(serve: Serve) -> None:
    served = serve()
    parts = [{"type": "text", "text": "Which "}, {"type": "text", "text": "pub?"}]
    for content in ("Which pub?", parts):
        served.chat(content)
    expected = ChatTemplate(served.store.tokenizer).ids([USER], answer=True)
    for ticket in served.engine.tickets:
        assert list(ticket.request.prompt) == expected
        assert ticket.request.stop_ids == {served.store.tokenizer.convert_tokens_to_ids(EOS)}


@pytest.mark.parametrize("text", [TEXT, "", "\n"])
def test_an_answer_of_the_api_can_be_sent_back(serve: Serve, text: str) -> None:
    """Also an empty one: else the client could never send the next message."""
    served = serve()
    served.engine.text = lambda request: text
    message = {
        **served.chat().json()["choices"][0]["message"],
        "tool_calls": None,
        "annotations": [],
        "audio": None,
    }
    assert message["content"] == text
    turns = [USER, message, USER]
    assert served.post("/v1/chat/completions", model="sql", messages=turns).status_code == 200
    expected = ChatTemplate(served.store.tokenizer).ids(
        [{"role": turn["role"], "content": turn["content"]} for turn in turns], answer=True
    )
    assert list(served.engine.tickets[-1].request.prompt) == expected


def test_a_developer_is_a_system(serve: Serve) -> None:
    served = serve()
    for role in ("system", "developer"):
        turns = [{"role": role, "content": "Be brief."}, USER]
        served.post("/v1/chat/completions", model="sql", messages=turns)
    first, second = (ticket.request.prompt for ticket in served.engine.tickets)
    assert first == second


def test_the_template_gets_the_names_of_authors(serve: Serve) -> None:
    served = serve()
    served.store.tokenizer = tiny_tokenizer(
        chat_template="{% for m in messages %}{{ m.name or 'nobody' }}: {{ m.content }}\n{% endfor %}"
    )
    turns = [{**USER, "name": "Ann"}, {**USER, "name": None}, USER]
    served.post("/v1/chat/completions", model="sql", messages=turns)
    prompt = served.store.tokenizer.decode(served.engine.tickets[0].request.prompt)
    assert prompt == "Ann: Which pub?\nnobody: Which pub?\nnobody: Which pub?\n"


@pytest.mark.parametrize("is_thinking", [True, False, None])
def test_the_template_gets_variables(serve: Serve, is_thinking: bool | None) -> None:
    """As Qwen 3's, which thinks unless `enable_thinking` is false."""
    served = serve()
    switch = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    served.store.tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE + switch)
    variables = None if is_thinking is None else {"enable_thinking": is_thinking}
    assert served.chat(chat_template_kwargs=variables).status_code == 200
    prompt = served.store.tokenizer.decode(served.engine.tickets[0].request.prompt)
    assert prompt.endswith("assistant\n<think></think>") == (is_thinking is False)


def test_a_template_without_a_system_role_gets_the_text_in_the_first_message(serve: Serve) -> None:
    served = serve()
    template = served.store.tokenizer.chat_template
    served.store.tokenizer = tiny_tokenizer(
        chat_template="{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + template
    )
    turns = [{"role": "system", "content": "Be brief."}, USER]
    answer = served.post("/v1/chat/completions", model="sql", messages=turns)
    assert answer.status_code == 200
    prompt = served.store.tokenizer.decode(served.engine.tickets[0].request.prompt)
    assert "Be brief.\n\nWhich pub?" in prompt


def test_the_default_length_is_what_the_context_leaves(serve: Serve) -> None:
    served = serve()
    served.chat()
    request = served.engine.tickets[0].request
    assert request.max_tokens == 256 - len(request.prompt)
    served = serve(max_tokens=7)
    served.chat()
    assert served.engine.tickets[0].request.max_tokens == 7


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_length(serve: Serve, name: str) -> None:
    served = serve()
    assert served.chat(**{name: 3}).json()["choices"][0]["finish_reason"] == "length"
    assert served.engine.tickets[0].request.max_tokens == 3


def test_logprobs(serve: Serve) -> None:
    served = serve()
    served.engine.text = lambda request: "é pub"
    (choice,) = served.chat(logprobs=True, top_logprobs=2).json()["choices"]
    content = choice["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in content] == [2] * len(content)
    assert {token["logprob"] for token in content} == {-0.5}
    assert [token["bytes"] for token in content[:2]] == [None, None]  # halves of é
    assert content[-1]["bytes"] == list(content[-1]["token"].encode())


def test_a_stream(serve: Serve) -> None:
    served = serve()
    answer = served.chat(
        stream=True, stream_options={"include_usage": True}, n=2, logprobs=True, max_tokens=5
    )
    *chunks, last, done = events(answer.text)
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 10
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert TEXT.startswith("".join(choice["delta"].get("content", "") for choice in own))
        assert own[-1]["delta"] == {}
        assert own[-1]["finish_reason"] == "length"
        assert sum(len((c["logprobs"] or {"content": []})["content"]) for c in own) == 5
    assert {chunk["object"] for chunk in [*chunks, last]} == {"chat.completion.chunk"}


def test_a_tokenizer_without_a_template_is_named(serve: Serve) -> None:
    served = serve()
    served.store.tokenizer = tiny_tokenizer(chat_template=None)
    answer = served.chat()
    assert answer.status_code == 400
    assert "has no chat template" in answer.json()["error"]["message"]


@pytest.mark.slow
def test_a_template_without_an_end_is_an_error(serve: Serve) -> None:
    served = serve()
    served.store.tokenizer = tiny_tokenizer(
        chat_template="{% for i in range(99999) %}{% for j in range(99999) %}a{% endfor %}{% endfor %}"
    )
    answer = served.chat()
    assert answer.status_code == 400
    assert "cannot be rendered" in answer.json()["error"]["message"]

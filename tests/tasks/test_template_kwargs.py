"""Values for the variables of a chat template: defaults that a tokenizer keeps."""

from __future__ import annotations

import json

import pytest
from tiny_tokenizer import CHAT_TEMPLATE, THINKING_TEMPLATE, tiny_tokenizer
from transformers import AutoTokenizer

from lorakit.errors import ConfigurationError, DataError
from lorakit.tasks import Chat
from lorakit.tasks.chat_template import ChatTemplate
from lorakit.tasks.template_kwargs import check_template_kwargs, with_template_kwargs

USER = {"role": "user", "content": "Which pub?"}
ANSWER = {"role": "assistant", "content": "Near the park."}
OFF = {"enable_thinking": False}


def prompt(tokenizer, **values):
    return tokenizer.apply_chat_template(
        [USER], add_generation_prompt=True, tokenize=False, **values
    )


def test_values_are_defaults_of_the_template_and_saved_with_it(tmp_path):
    tokenizer = tiny_tokenizer(chat_template=THINKING_TEMPLATE)
    own = with_template_kwargs(tokenizer, OFF)
    own.save_pretrained(tmp_path)
    for changed in (own, AutoTokenizer.from_pretrained(tmp_path)):
        assert prompt(changed) == prompt(tokenizer, **OFF) != prompt(tokenizer)
        assert prompt(changed, enable_thinking=True) == prompt(tokenizer)
        assert ChatTemplate(changed).text([USER], answer=True) == prompt(tokenizer, **OFF)
        assert with_template_kwargs(changed, OFF) is changed
    assert tokenizer.chat_template == THINKING_TEMPLATE
    again = with_template_kwargs(own, {"enable_thinking": True})  # the last value counts
    assert prompt(again) == prompt(tokenizer)
    assert with_template_kwargs(tokenizer, {}) is tokenizer


def test_every_template_of_a_tokenizer_gets_the_values():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": THINKING_TEMPLATE, "tool_use": "{{ tools | tojson }}"}
    own = with_template_kwargs(tokenizer, OFF)
    assert prompt(own) == prompt(tokenizer, **OFF)
    assert prompt(own, tools=[{"name": "f"}]) == '[{"name": "f"}]'


@pytest.mark.parametrize(
    "value", [None, True, -2.5, 10**20, 'it\'s "q" \\ \n é😀 %} {{ }}', [{"a": [1, {}]}, []]]
)
def test_a_template_gets_the_value_that_was_set(value):
    tokenizer = tiny_tokenizer(
        chat_template="{% macro m() %}{{ x | tojson }}{% endmacro %}{{ m() }}"
    )
    own = with_template_kwargs(tokenizer, {"x": value})
    assert json.loads(own.apply_chat_template([USER], tokenize=False)) == value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": []}, "'messages', which is set for each conversation"),
        ({"add_generation_prompt": True}, "'add_generation_prompt', which is set for each conv"),
        ({"bos_token": ""}, "'bos_token', which is set for each conversation"),
        ({"enable-thinking": True}, "'enable-thinking', which is not a variable of a template"),
        ({"none": True}, "'none', which is not a variable of a template"),
        ({"x": float("nan")}, r"kwargs\.x is nan; it must be text, a finite number"),
        ({"x": {1: 2}}, r"kwargs\.x is \{1: 2\}; it must be text"),
    ],
)
def test_names_and_values_that_a_template_cannot_get_are_rejected(values, message):
    with pytest.raises(ConfigurationError, match=message):
        check_template_kwargs(values, "data.chat_template_kwargs")


@pytest.mark.parametrize("name", ["content", "eos_token", "image_token"])
def test_names_that_the_template_or_the_tokenizer_sets_are_no_variables(name):
    template = (
        "{% for m in messages if m.content %}{% set content = m.content %}{% endfor %}{{ content }}"
    )
    template += (
        "{{ image_token }}{% if not size is defined %}{% set size = 1 %}{% endif %}{{ size }}"
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer._set_model_specific_special_tokens({"image_token": "<image>"})
    assert with_template_kwargs(tokenizer, {"size": 2}).apply_chat_template([USER], tokenize=False)
    with pytest.raises(ConfigurationError, match=f"'{name}', which"):
        with_template_kwargs(tokenizer, {name: "a"})


def test_a_variable_that_the_template_does_not_read_is_rejected():
    tokenizer = tiny_tokenizer(chat_template=THINKING_TEMPLATE)
    for name in ("enable_thinkin", "m", "content"):  # others are set by the template, or are keys
        with pytest.raises(ConfigurationError, match=f"'{name}'.* reads enable_thinking"):
            with_template_kwargs(tokenizer, {name: False})
    with pytest.raises(ConfigurationError, match="it reads no such variable"):
        with_template_kwargs(tiny_tokenizer(chat_template=CHAT_TEMPLATE), OFF)
    with pytest.raises(DataError, match="cannot be rendered: line 1"):
        with_template_kwargs(tiny_tokenizer(chat_template="{% if %}"), OFF)


@pytest.mark.parametrize(
    ("values", "accepted", "thoughts", "advice"),
    [
        ({}, "A park!", "", "ends with '<think>.n'.* as reasoning_content, or .* off: .*: false}"),
        (OFF, "", "A park!", "ends with '</think>'. Remove the turn's thoughts, or .*: true}"),
    ],
)
def test_the_error_of_an_answer_in_the_other_mode_names_the_setting(
    values, accepted, thoughts, advice
):
    tokenizer = with_template_kwargs(tiny_tokenizer(chat_template=THINKING_TEMPLATE), values)
    chat = Chat(tokenizer, max_length=1000)
    chat.encode({"messages": [USER, ANSWER | {"reasoning_content": accepted}]})
    with pytest.raises(DataError, match=advice):
        chat.encode({"messages": [USER, ANSWER | {"reasoning_content": thoughts}]})

"""Chat templates are untrusted programs: each of these must end at once, with an error that names its file."""

from __future__ import annotations

import threading
import time

import pytest
from tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

from lorakit.errors import DataError
from lorakit.tasks import BadRow, Chat
from lorakit.tasks.chat_template import ChatTemplate
from lorakit.tasks.rendering import MAX_TEMPLATE, bounded_rendering
from lorakit.tasks.template_work import UNITS

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def tokenizer_with(template):
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.name_or_path = "models/tiny"
    return tokenizer


def render(template, turns=TURNS):
    return ChatTemplate(tokenizer_with(template)).text(turns)


def doubling(step, start="['ab']", end="{{ ns.x|length }}"):
    """A template that doubles `ns.x` 40 times."""
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range(40) %}}"
        f"{{% set ns.x = {step} %}}{{% endfor %}}{end}"
    )


TOO_LARGE = {
    "product": "{{ 'a' * 10**9 }}",
    "product of lists": "{{ ([0] * 10**10)|length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "large integers": "{% set ns = namespace(x=10) %}"
    "{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "sum of strings": doubling("ns.x + ns.x", "'ab'"),
    "concatenation": doubling("ns.x ~ ns.x", "'ab'"),
    "nested lists": doubling("[ns.x, ns.x]", end="{{ ns.x|tojson }}"),
    "nested tuples": doubling("(ns.x, ns.x)", end="{{ ns.x }}"),
    "nested mappings": doubling("{'a': ns.x, 'b': ns.x}", end="{{ ns.x|string }}"),
    "nested dict()": doubling("dict(a=ns.x, b=ns.x)", end="{{ ns.x|tojson }}"),
    "block set": "{% set ns = namespace(x='ab') %}{% for i in range(40) %}"
    "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "replace": doubling("ns.x.replace('a', 'aa')", "'ab'"),
    "replace filter": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "join": "{{ ('b' * 100000).join('a' * 100000) }}",
    "join filter": "{{ ('a' * 100000)|join('b' * 100000) }}",
    "sum of lists": "{{ range(99999)|batch(1)|sum(start=[])|length }}",
    "lazy map": "{{ range(99999)|map('center', 99999)|join }}",
    "center": "{{ 'a'|center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ '1'.zfill(10**9) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(10**8) }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "indent": "{{ ('a\n' * 100000)|indent(100000) }}",
    "batch": "{{ [1]|batch(10**10, 0)|list }}",
    "slice": "{{ [1]|slice(10**10)|list }}",
    "round": "{{ 5|round(-10**10) }}",
    "tojson indent": "{{ messages|tojson(indent=10**10) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent filter": "{{ '%1000000000d'|format(1) }}",
    "percent precision": "{{ '%.1000000000f' % 1 }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "computed width": "{{ '{:9{}{}}'.format(1, 99999, 999) }}",
    "format of many": "{{ ('{0}' * 100000).format('a' * 100000) }}",
    "bytes": "{{ (5).to_bytes(10**10, 'big')|length }}",
    "literal text in a loop": f"{{% for i in range(99999) %}}{'text ' * 1000}{{% endfor %}}",
    "for ever": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "quadratic filter": "{{ ('<' * 100000)|urlize }}",
    "macros that double": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
}


SLOW = ("macros that double", "for ever")
"""Cases that take above 0.5 s."""


def cases(table):
    marks = {name: [pytest.mark.slow] if name in SLOW else [] for name in table}
    values = {name: c if isinstance(c, tuple) else (c,) for name, c in table.items()}
    return [pytest.param(*values[name], id=name, marks=marks[name]) for name in table]


@pytest.mark.parametrize("template", cases(TOO_LARGE))
def test_a_template_that_explodes_is_an_error_at_once(template):
    began = time.monotonic()
    with pytest.raises(
        DataError,
        match=r"chat template of .*tiny.*(more than .*(units of work|bits)|computes the width)",
    ):
        render(template)
    assert time.monotonic() - began < 5  # usually 0.01 to 1 s


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without an end"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "calls itself without an end|nested"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ x|no_such_filter }}", "No filter named 'no_such_filter'"),
        ("{{ 9 ** (9 ** 2 ** 9) }}", "4,096 bits"),
        (" " * (MAX_TEMPLATE + 1), "characters"),
    ],
)
def test_a_template_that_cannot_work_is_an_error_that_names_it(template, reason):
    with pytest.raises(DataError, match=f"chat template of .*tiny.*({reason})") as caught:
        render(template)
    assert not isinstance(caught.value, BadRow)  # it would be repeated for every row
    assert "tokenizer" in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages[0]['missing']['key'] }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content|int(base=99) + undefined.x }}",
        "{{ {}['a'].b }}",
        "{{ 'a' + 1 }}",
        "{{ messages|tojson(indent={}) }}",
        "{{ strftime_now(5) }}",
        "{{ lipsum(10**9) }}",
        "{% include 'other' %}",
    ],
)
def test_a_failure_that_may_depend_on_the_row_is_a_bad_row(template):
    with pytest.raises(BadRow, match="was rejected by the chat template"):
        render(template)


def test_the_time_is_bounded_where_each_step_is_slow(monkeypatch):
    monkeypatch.setattr("lorakit.tasks.template_work.SECONDS", 0.2)
    monkeypatch.setattr("lorakit.tasks.template_work.UNITS", 10**12)
    slow = (
        "{% set x = 'ab' * 2000000 %}{% for i in range(99999) %}"
        "{% if x[1:] == x[:-1] %}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"ran for more than 0.2 seconds"):
        render(slow)


def test_the_limits_hold_in_every_thread():
    errors = []

    def worker():
        try:
            render(TOO_LARGE["concatenation"])
        except DataError as error:
            errors.append(error)

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(errors) == 4


def test_an_ordinary_template_gives_the_text_of_transformers():
    template = (
        "{%- macro tool(t) -%}{{ t|tojson(indent=2) }}{%- endmacro -%}"
        "{%- set ns = namespace(last=0) -%}"
        "{%- for m in messages -%}{%- set ns.last = loop.index0 -%}"
        "{{- '<|im_start|>' ~ m.role + '\n' + '%s|%5d' % (m['content'].strip().split('</think>')[-1], 3) -}}"
        "{{- '{:>8}'.format('x') ~ 'a' * 3 ~ (m.content|replace('a', 'bb')) ~ ['a', 'b']|join(', ') -}}"
        "{%- if m.tools -%}{%- for t in m.tools if t -%}{{ tool(t)|indent(2) }}{%- endfor -%}{%- endif -%}"
        "{{- '<|im_end|>\n' -}}{%- endfor -%}"
        "{{- messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list -}}"
        "{{- (messages|length) ** 2 -}}{{- ns.last -}}"
    )
    turns = [
        {**TURNS[0], "tools": [{"name": "f", "parameters": {"x": [1, 2**62, None]}}]},
        TURNS[1],
    ]
    tokenizer = tiny_tokenizer(chat_template=template)
    expected = tokenizer.apply_chat_template(turns, tokenize=False)
    assert ChatTemplate(tokenizer).text(turns) == expected


def test_the_limit_grows_with_the_conversation():
    long = "word " * (UNITS // 5)
    turns = [{"role": "user", "content": long}, {"role": "assistant", "content": long}]
    assert len(render(CHAT_TEMPLATE, turns)) > 2 * len(long)


def test_transformers_own_rendering_is_unchanged_outside():
    tokenizer = tiny_tokenizer(chat_template="{{ 'a' * 20000000 }}")
    with pytest.raises(DataError):
        ChatTemplate(tokenizer).text(TURNS)
    assert len(tokenizer.apply_chat_template(TURNS, tokenize=False)) == 20_000_000
    with bounded_rendering("tiny", TURNS):
        pass


def test_training_stops_at_the_template_not_at_each_row():
    tokenizer = tiny_tokenizer(chat_template="{{ 'a' * 10**9 }}")
    with pytest.raises(DataError, match="units of work") as caught:
        Chat(tokenizer, max_length=100).encode({"messages": TURNS})
    assert not isinstance(caught.value, BadRow)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (5, "is a number .*, expected text"),
        ({"tool_use": "{{ messages }}"}, "has several chat templates and none is the default"),
    ],
)
def test_a_template_that_is_not_one_text_is_an_error(template, message):
    with pytest.raises(DataError, match=message):
        ChatTemplate(tokenizer_with(template)).assistant_turns(TURNS, None)

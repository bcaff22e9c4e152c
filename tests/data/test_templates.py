from __future__ import annotations

import pytest

from lorakit.data.templates import Template
from lorakit.errors import ConfigurationError, DataError
from lorakit.tasks import BadRow


def test_fields_are_filled_in_and_braces_doubled():
    template = Template("{{q}}: {question}\n{n} {question} {customer rating}")
    assert template.fields == ["question", "n", "customer rating"]
    row = {"question": "why {not}?", "n": 2, "customer rating": 1.5}
    assert template.render(row.get) == "{q}: why {not}?\n2 why {not}? 1.5"


@pytest.mark.parametrize(
    "text",
    ["{a.b}", "{a[0]}", "{a!r}", "{a:>5}", "{}", "{0}", "{a", "a}", "{a.__class__}", "{a:{b}}"],
)
def test_nothing_but_plain_names_is_allowed(text):
    with pytest.raises(ConfigurationError, match=r"prompt_template .* for literal braces"):
        Template(text, name="prompt_template")


def test_an_unknown_column_names_the_nearest():
    template = Template("{dialog}", name="prompt_template")
    with pytest.raises(DataError, match=r"'dialog', which prompt_template .* mean 'dialogue'"):
        template.check(["id", "dialogue"], "data.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": "x"}, "'b' is missing"),
        ({"a": "x", "b": ["y"]}, "'b' is a list, expected text"),
        ({"a": " ", "b": ""}, "'a' is empty, as is b"),
        ({"a": None, "b": None}, "'a' is empty, as is b"),
    ],
)
def test_a_row_that_cannot_fill_a_template_is_named(row, message):
    with pytest.raises(BadRow, match=message):
        Template("{a} and {b}").render(row.__getitem__)


@pytest.mark.parametrize("empty", ["", None])  # Parquet files write null
def test_one_column_of_several_may_be_empty(empty):
    assert Template("{a}\n{b}").render({"a": "x", "b": empty}.__getitem__) == "x\n"

"""YAML files have the numbers of YAML 1.2. `test_storage.py` has the files that are refused."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lorakit.storage import dump_yaml, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("5e-4", 5e-4), ("010", 10), ("0x1F", 31), (".5", 0.5), ("-3", -3), ("1E3", 1000.0)],
        *[("1:30", "1:30"), ("2024-01-31", "2024-01-31"), ("1_000", "1_000"), ("0o17", "0o17")],
        *[("true", True), ("yes", True), ("null", None), ("~", None), ("'5'", "5")],
    ],
)
def test_plain_values(text: str, value: Any) -> None:
    found = parse_yaml(text)
    assert found == value
    assert type(found) is type(value)


def test_anchors_merges_and_a_byte_order_mark_are_read() -> None:
    text = "\ufeffone: &one {rank: 1, alpha: 2}\ntwo: {<<: *one, alpha: 3}\nthree: [*one, *one]"
    one = {"rank": 1, "alpha": 2}
    assert parse_yaml(text) == {"one": one, "two": {"rank": 1, "alpha": 3}, "three": [one, one]}


@given(st.text(alphabet="ab01:-[]{}|>'\"#%@,.~\n \t\0\ufeff\ud800", max_size=40))
def test_any_text_without_tags_is_read_or_is_a_yaml_error(text: str) -> None:
    with suppress(yaml.YAMLError):
        parse_yaml(text)


TEXT = st.text(st.characters(exclude_characters="\x85\u2028\u2029", codec="utf-8"), max_size=8)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXT,
    st.from_regex(r"[-+]?[0-9.]{1,3}(e[-+]?[0-9])?", fullmatch=True),
)  # fmt: skip


@given(st.dictionaries(TEXT, st.lists(SCALARS, max_size=3), max_size=4))
def test_written_values_are_read_back_with_their_types(value: dict[str, Any]) -> None:
    back = parse_yaml(dump_yaml(value, sort_keys=False))
    assert back == value
    assert repr(back) == repr(value)

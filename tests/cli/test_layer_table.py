"""Tables of layers keep every column on narrow terminals."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lorakit.cli import layer_table

LLAMA = "model.layers.{}.self_attn.q_proj"
ROBERTA = "roberta.encoder.layer.{}.attention.self.query"
SHORT = [f"{'x' * (length - 2)}.{{}}" for length in (16, 19, 22, 30)]
"""Names that take half of a terminal of 32 to 60 columns."""
NUMBERS = {
    "rank": 8,
    "norm": 0.9213,
    "effective rank": 5.123,
    "stable rank": 2.0,
    "first direction": 0.4321,
    "rank for 0.9": 5,
    "adapted": "a word",
}


def printed(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the lines of the table of two layers on a terminal of this width."""
    output = Console(file=io.StringIO(), width=width)
    monkeypatch.setattr(layer_table, "console", lambda: output)
    factors = (1, 1.25)
    rows = {
        name.format(i): {
            heading: value if isinstance(value, str) else value * factor
            for heading, value in NUMBERS.items()
        }
        for i, factor in enumerate(factors)
    }
    output.print(layer_table.layer_table(rows, each=False))
    assert isinstance(output.file, io.StringIO)
    return output.file.getvalue().splitlines()


@pytest.mark.parametrize("name", [*SHORT, LLAMA, ROBERTA, f"{ROBERTA}.{'x' * 40}"])
@pytest.mark.parametrize("width", [40, 46, 60, 80, 100, 160])
def test_no_character_of_a_table_is_cut_off(name: str, width: int, monkeypatch) -> None:
    whole, narrow = ("".join(printed(name, w, monkeypatch)) for w in (400, width))
    assert sorted(narrow.replace(" ", "")) == sorted(whole.replace(" ", ""))


@pytest.mark.parametrize(
    ("name", "width"), [(SHORT[-1], 60), (LLAMA, 80), (ROBERTA, 100), (ROBERTA, 160)]
)
def test_names_stay_in_one_piece(name: str, width: int, monkeypatch) -> None:
    lines = printed(name, width, monkeypatch)
    assert any(name.format("*") in line for line in lines)
    assert max(map(len, lines)) <= width

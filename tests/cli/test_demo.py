"""`lorakit demo` prints the text of other people's functions literally."""

from __future__ import annotations

from lorakit.cli.console import console
from lorakit.cli.demo import _print_examples
from lorakit.evaluation.evaluate import Evaluation


def test_texts_of_examples_are_no_markup(capsys) -> None:
    record = {"prompt": "def f(x: list[int] = [/a]):", "output": "[bold]", "references": ["[/b]"]}
    found = Evaluation(outputs=[record])
    _print_examples(console(), found, found)
    shown = capsys.readouterr().out
    assert "def f(x: list[int] = [/a]):" in shown
    assert "[bold]" in shown
    assert "[/b]" in shown

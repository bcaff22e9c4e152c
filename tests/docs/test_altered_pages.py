"""A page that is wrong makes its walk fail, with the page and the line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import made
import outputs
import pages
import presumed
import pytest
from walk import Presumed, walk, words

ANALYSIS, TARGETS = "docs/guides/analysis.md", "docs/guides/targets.md"
SPECTRUM = "lorakit analyze spectrum e2e-r64/adapter"

ALTERATIONS = {
    "a path of no adapter": (ANALYSIS, SPECTRUM, f"{SPECTRUM}s", "status 1"),
    "an option misspelt": (
        ANALYSIS,
        SPECTRUM,
        f"{SPECTRUM} --enrgy 0.9",
        "unknown option '--enrgy'",
    ),
    "a command misspelt": (
        ANALYSIS,
        SPECTRUM,
        SPECTRUM.replace("spectrum", "spektrum"),
        "status 1",
    ),
    "a line of the output removed": (
        ANALYSIS,
        "Rank 1 in every layer keeps 0.9 of it.\n",
        "",
        "the output differs from the page",
    ),
    "a line too many": (
        ANALYSIS,
        "Rank 1 in every layer keeps 0.9 of it.\n",
        "Rank 1 in every layer keeps 0.9 of it.\nDone.\n",
        "no line like 'Done.'",
    ),
    "a word of the output changed": (
        ANALYSIS,
        "every layer keeps",
        "every layer holds",
        "no line like",
    ),
    "a column renamed": (ANALYSIS, "   stable rank", "   stable size", "no line like"),
    "another program": (ANALYSIS, SPECTRUM, "analyze spectrum", "analyze is not lorakit"),
    "an argument misspelt": (TARGETS, "rank_pattern=", "rank_patern=", "rank_patern"),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_an_altered_page_fails(alteration: str, reader: Callable[[str], Path]) -> None:
    page, old, new, reason = ALTERATIONS[alteration]
    text = pages.read(page)
    right = pages.steps(page, text)
    wrong = pages.steps(page, text.replace(old, new, 1))
    (pair,) = [
        (before, after)
        for before, after in zip(right, wrong, strict=True)
        if (before.text, before.output) != (after.text, after.output)
    ]
    reader(page)
    made.adapter("e2e-r64/adapter", rank=64)
    unaltered, failures = (walk([step], Presumed(), vars(made).copy()) for step in pair)
    assert unaltered == []
    (failure,) = failures
    start = old if pair[0].kind == "python" else pair[0].text.splitlines()[0]
    line = 1 + text[: text.index(start)].count("\n")
    assert failure.startswith(f"{page}:{line}: ")
    assert reason in failure


def test_a_command_is_split_as_in_a_shell() -> None:
    command = "lorakit x 'a b' $'c\\n' \\\n    --y '{z: 1}' *.jsonl  # a comment"
    assert words(command) == ["lorakit", "x", "a b", "c\n", "--y", "{z: 1}", "*.jsonl"]


@pytest.mark.parametrize(
    ("page", "printed", "same"),
    [
        ("loss  1.5 to 2e-3   30", "loss 7   2", True),
        ("layers.0.q_proj 1.02 GB in 3s", "layers.11.q_proj 9 kB in 2 min", True),
        ("rank 8: 94.8%, 1,331 texts", "rank 1: 3%, 2 texts", True),
        ("e2e-r64/adapter", "e2e-r8/adapter", False),
        ("loss 1.5", "loss", False),
        ("loss 1.5", "losses 1.5", False),
        ("...\nb", "a\na\nb", True),
        ("a\n...", "a", True),
        ("...\nb", "b\nc", False),
        ("a", "a\nb", False),
    ],
)
def test_outputs_differ_in_words_not_in_numbers(page: str, printed: str, same: bool) -> None:
    assert (outputs.difference(page.splitlines(), printed.splitlines()) == "") is same


def test_every_exception_is_on_a_page() -> None:
    """An exception for a command that no page has any more would hide a later command."""
    steps = {page: pages.steps(page, pages.read(page)) for page in pages.PAGES}
    commands = [step.text for of_page in steps.values() for step in of_page]
    unused = [start for start in presumed.NOT_RUN if not any(c.startswith(start) for c in commands)]
    for table in (presumed.COMMANDS, presumed.PYTHON):
        for page, of_page in table.items():
            texts = [step.text for step in steps[page]]
            for start in (*of_page.before, *of_page.more, *of_page.typed):
                if not any(text.startswith(start) for text in texts):
                    unused.append(f"{page}: {start}")
    assert unused == []

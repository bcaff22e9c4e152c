from __future__ import annotations

import ast
import importlib
import inspect
import sys
import sysconfig
from importlib.util import find_spec

import pytest

from lorakit.data import docstrings
from lorakit.errors import DataError


@pytest.fixture(scope="module")
def splits():
    return {split: docstrings.load(split) for split in docstrings.SPLITS}


@pytest.fixture(scope="module")
def every_row(splits):
    return [row for rows in splits.values() for row in rows]


@pytest.mark.slow
def test_there_is_enough_to_train_and_to_score_on(splits):
    # Some systems leave out tkinter, which has about 600.
    assert len(splits["train"]) > (2000 if find_spec("tkinter") else 1500)
    assert len(splits["validation"]) > 300
    assert len(splits["test"]) > 300


@pytest.mark.slow
def test_splits_share_no_module_prompt_or_completion(splits, every_row):
    for value in (
        lambda row: row["module"].split(".")[0].lstrip("_"),
        lambda row: row["prompt"],
        lambda row: row["completion"].casefold(),
    ):
        sets = [{value(row) for row in rows} for rows in splits.values()]
        assert sum(map(len, sets)) == len(set.union(*sets))
    assert len({row["completion"].casefold() for row in every_row}) == len(every_row)


@pytest.mark.slow
def test_rows_are_what_python_itself_says_about_its_functions(every_row):
    signature, completion = next(
        (row["prompt"], row["completion"]) for row in every_row if "\ndef dedent(" in row["prompt"]
    )
    assert signature == "# textwrap\ndef dedent(text):\n"
    documented = inspect.getdoc(importlib.import_module("textwrap").dedent)
    assert documented is not None
    assert " ".join(documented.split()).startswith(completion)


@pytest.mark.slow
def test_rows_are_clean(every_row):
    for row in every_row:
        place, signature, end = row["prompt"].split("\n")
        assert end == ""
        assert place.startswith(f"# {row['module']}")
        assert row["module"].split(".")[0] in sys.stdlib_module_names
        ast.parse(f"{signature} pass")
        assert row["completion"].endswith(".")
        assert "\n" not in row["completion"]
        assert 4 <= len(row["completion"].split()) <= 24


@pytest.mark.slow
def test_the_order_mixes_modules(splits):
    assert len({row["module"].split(".")[0] for row in splits["train"][:50]}) > 15


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        (
            "Return the n-th item, e.g. the first. Counts from 0.",
            "Return the n-th item, e.g. the first.",
        ),
        ("Join two or more\n   paths\n\nMore text.", "Join two or more paths."),
        ("Remove all files (if any)", "Remove all files (if any)."),
        ("Deprecated since 3.4, use other()", None),
        ("indent(text) -> str", None),
        (">>> f(1)", None),
        ("Too short.", None),
        ("Ends in a colon here:", None),
        ("Return the na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve sum.", None),
        ("", None),
    ],
)
def test_the_summary_is_a_plain_first_sentence(docstring, expected):
    assert docstrings.summary(docstring) == expected


def test_twin_modules_share_a_split():
    assert docstrings.split_of("_pyio") == docstrings.split_of("pyio.more")


def test_a_wrong_split_is_named():
    with pytest.raises(DataError, match=r"no split 'valid'; .* Did you mean 'validation'"):
        docstrings.load("valid")


def test_a_python_without_sources_is_named(monkeypatch, tmp_path):
    paths = dict(sysconfig.get_paths(), stdlib=str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    docstrings._rows.cache_clear()
    with pytest.raises(DataError, match="installed without the sources"):
        docstrings.load("train")

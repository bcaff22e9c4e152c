"""The pages of the paper's tables hold exactly what follows from the logs of their runs, and others quote them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tables import pages
from lorakit import storage
from lorakit.errors import RunFolderError

PAGES = list(pages())
COLUMNS = ("MRPC", "CoLA", "RTE", "STS-B", "BLEU")
ROOT = Path(__file__).parents[2]
INDEX = ROOT / "docs" / "results" / "index.md"


def _records(page: Path) -> list[dict[str, Any]]:
    log = page.parent / "runs" / page.stem
    return [storage.read_record(run, RunFolderError) for run in log.glob("runs/*/*/*.json")]


@pytest.mark.parametrize(("path", "text"), PAGES, ids=[path.stem for path, _ in PAGES])
def test_a_page_is_that_of_its_log(path: Path, text: str) -> None:
    assert path.read_text(encoding="utf-8") == text, "write it again: python -m benchmarks.tables"


@pytest.mark.parametrize("path", [path for path, _ in PAGES], ids=lambda path: path.stem)
def test_every_record_is_whole_and_of_one_dtype(path: Path) -> None:
    records = _records(path)
    assert {record["settings"].get("base.dtype") for record in records} <= {"float32"}
    for record in records:
        assert record["failure"] or record["curve"][-1]["step"] == record["steps"]
        assert record["versions"]["torch"]


def _tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a page of Markdown: for each row the cell of each column."""
    tables = []
    for lines in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        header, _, *rows = (
            [cell.strip() for cell in line.strip("|\n").split("|")] for line in lines.splitlines()
        )
        tables.append([dict(zip(header, row, strict=True)) for row in rows])
    return tables


def _comparisons() -> set[tuple[str, ...]]:
    """Of each data set: its score with full fine-tuning and LoRA, the difference, and the paper's difference."""
    found = set()
    for path, text in PAGES:
        scores, differences = _tables(text)[:2]
        ours = {row["method"].strip("*"): row for row in scores if row["model"].startswith("**")}
        full = next(row for row in differences if row["LoRA minus"] == "FT")
        interval = r"(\S+) [\[{](\S+), (\S+)[\]}].* \(paper (\S+)\)"
        for data in COLUMNS:
            if match := re.fullmatch(interval, full.get(data, "")):
                medians = (ours[method][data].strip("*").split()[0] for method in ("FT", "LoRA"))
                difference, low, high, paper = match.groups()
                found.add((path.stem, data, *medians, f"{difference}, {low} to {high}", paper))
    return found


@pytest.mark.parametrize("path", [ROOT / "README.md", INDEX], ids=lambda path: path.stem)
def test_readme_and_index_quote_each_comparison_with_full_fine_tuning(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    (table,) = (
        table for table in _tables(text) if "full fine-tuning" in table[0] and "LoRA" in table[0]
    )
    pages = dict(re.findall(r"\[([\w-]+)\]\(\S*?(table\w[\w-]+)\.md\)", text))
    quoted = set()
    for row in table:
        data, base, *figures = row.values()
        name = base.split("]")[0].strip("[")
        quoted.add((pages[name], next(column for column in COLUMNS if column in data), *figures))
    assert quoted == _comparisons()


def test_the_index_names_the_source_of_every_run() -> None:
    recorded = Counter(
        record["source"][:8] if record.get("source") else "not recorded"
        for path, _ in PAGES
        for record in _records(path)
    )
    (table,) = (
        table for table in _tables(INDEX.read_text(encoding="utf-8")) if "source" in table[0]
    )
    assert {row["source"]: int(row["runs"]) for row in table} == recorded

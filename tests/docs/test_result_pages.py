"""The pages of the paper's tables hold exactly what follows from the logs of their runs, and others quote them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.tables import pages
from lorakit import storage
from lorakit.errors import RunFolderError

PAGES = list(pages())
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("path", "text"), PAGES, ids=[path.stem for path, _ in PAGES])
def test_a_page_is_that_of_its_log(path: Path, text: str) -> None:
    assert path.read_text(encoding="utf-8") == text, "write it again: python -m benchmarks.tables"


@pytest.mark.parametrize("path", [path for path, _ in PAGES], ids=lambda path: path.stem)
def test_every_record_is_whole_and_of_one_dtype(path: Path) -> None:
    log = path.parent / "runs" / path.stem
    records = [storage.read_record(run, RunFolderError) for run in log.glob("runs/*/*/*.json")]
    assert {record["settings"].get("base.dtype") for record in records} <= {"float32"}
    for record in records:
        assert record["failure"] or record["curve"][-1]["step"] == record["steps"]
        assert record["versions"]["torch"]


def test_readme_and_index_quote_the_differences_of_table_2() -> None:
    """Each that has an interval, with it."""
    pattern = r"([+-]\d+\.\d) \[([+-]\d+\.\d), ([+-]\d+\.\d)\], \w+"
    table2 = (text for path, text in PAGES if path.stem.startswith("table2"))
    differences = [found for text in table2 for found in re.findall(pattern, text)]
    assert differences
    for path in (ROOT / "README.md", ROOT / "docs" / "results" / "index.md"):
        quoted = " ".join(path.read_text(encoding="utf-8").split())
        for value, low, high in differences:
            assert re.search(re.escape(value) + ".{0,90}" + re.escape(f"{low} to {high}"), quoted)

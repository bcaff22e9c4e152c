"""Differences between the scores without Java and the official scores, on golden outputs and on human texts.

python -m benchmarks.metrics_without_java [--shared ../shared]

For E2E and WebNLG the output is the first reference of an input, scored against its other references.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lorakit.metrics import WITHOUT_JAVA, e2e, webnlg

Texts = tuple[list[str], list[list[str]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    shared = parser.parse_args().shared
    golden, challenge, triples = (read(shared) for read in (golden_texts, e2e_texts, webnlg_texts))
    table = Table("texts", "metrics", "score", "with Java", "without", "difference", box=None)
    for name, family, texts in (
        ("golden outputs", e2e, golden),
        ("E2E test", e2e, challenge),
        ("WebNLG test", e2e, triples),
        ("WebNLG test", webnlg, triples),
    ):
        official, ours = family(*texts, java=True), family(*texts, java=False)
        for score in (score for score in official if score + WITHOUT_JAVA in ours):
            java, python = official[score], ours[score + WITHOUT_JAVA]
            cells = (f"{java:.4f}", f"{python:.4f}", f"{python - java:+.4f}")
            table.add_row(name, family.__name__, score, *cells)
    Console().print(table)


def golden_texts(shared: Path) -> Texts:
    folder = shared / "metrics" / "e2e_golden"
    groups = (folder / "references.txt").read_text(encoding="utf-8").strip().split("\n\n")
    outputs = (folder / "outputs.txt").read_text(encoding="utf-8").splitlines()
    return outputs, [group.splitlines() for group in groups]


def e2e_texts(shared: Path) -> Texts:
    groups: dict[str, list[str]] = {}
    for row in _rows(shared / "data" / "e2e_nlg" / "test.jsonl"):
        groups.setdefault(row["meaning_representation"], []).append(row["human_reference"])
    return _first_against_others(list(groups.values()))


def webnlg_texts(shared: Path) -> Texts:
    rows = _rows(shared / "data" / "webnlg" / "test.jsonl")
    return _first_against_others([row["lex"]["text"] for row in rows])


def _rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _first_against_others(groups: list[list[str]]) -> Texts:
    several = [group for group in groups if len(group) > 1]
    return [group[0] for group in several], [group[1:] for group in several]


if __name__ == "__main__":
    main()

"""Scoring of outputs in files: plain text as for the E2E scorer, or rows as `lorakit evaluate` writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lorakit.data.readers import reader_for, text_lines
from lorakit.data.rows import Problem, Row
from lorakit.errors import ConfigurationError, DataError, nearest, require_choice
from lorakit.metrics import (
    GLUE,
    classification,
    e2e,
    glue,
    regression,
    rouge,
    webnlg,
    wikisql,
)
from lorakit.metrics.checks import check_pairs

OnTexts = Literal["e2e", "webnlg", "dart", "rouge"]
OnLabels = Literal["classification", "regression"]
GlueTask = Literal["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
Family = Literal[OnTexts, "wikisql", OnLabels, GlueTask]


def score_files(
    outputs: str | Path,
    references: str | Path | None,
    metrics: Family,
    *,
    java: bool | None = None,
) -> dict[str, float]:
    """Return the metrics of a family from `lorakit.metrics` for the outputs in a file.

    Files ending in .jsonl, .json, .csv, .tsv or .parquet (optionally followed by .gz) have rows. Other files are plain
    UTF-8 text:

    ========== ===================================================== ============================
    what       plain text                                            columns of rows
    ========== ===================================================== ============================
    outputs    one a line; an empty line is an empty output          output
    references one a line, empty lines between groups; without       references, a list of texts,
               empty lines one for each output                       or reference, a text
    labels     one a line                                            label
    WikiSQL    (not possible)                                        table, sql; or golds, a list
                                                                     of objects with both
    ========== ===================================================== ============================

    Args:
        outputs: File of the outputs: texts, predicted classes or predicted numbers.
        references: File of the references or labels, in the same order; None reads them from the rows of `outputs`.
        metrics: Texts of "e2e", "webnlg", "dart" or "rouge" (SAMSum), queries of "wikisql", labels of a GLUE task or of
            any "classification" or "regression". A classification with the classes 0 and 1 only is binary: its f1 is
            that of class 1.
        java: Whether "e2e", "webnlg" and "dart" use Java; None uses it if it is installed.

    Raises:
        DataError: A file cannot be read, or its content cannot be scored.
        ConfigurationError: The references are missing, or a package or Java is not installed.
        LorakitError: Java failed.
    """
    require_choice("metrics", metrics, get_args(Family))
    predicted = _read(outputs)
    expected = predicted if references is None else _read(references)
    if references is None and predicted.rows is None:
        raise ConfigurationError(
            f"{outputs} is plain text, which cannot contain references. Name a separate file with the references."
        )
    if metrics in GLUE:
        return glue(metrics, predicted.numbers("output"), expected.numbers("label"))
    if metrics == "classification":
        return classification(predicted.numbers("output"), expected.numbers("label"))  # type: ignore[arg-type]
    if metrics == "regression":
        return regression(predicted.numbers("output"), expected.numbers("label"))
    texts = predicted.texts("output")
    if metrics == "wikisql":
        golds = expected.golds()
        check_pairs(texts, golds)
        repeated = [text for text, group in zip(texts, golds, strict=True) for _ in group]
        return wikisql(repeated, [gold for group in golds for gold in group])
    groups = expected.groups(len(texts))
    if metrics == "rouge":
        return rouge(texts, groups)
    score = e2e if metrics == "e2e" else webnlg
    return score(texts, groups, java=java)


@dataclass(frozen=True, slots=True)
class _File:
    """Content of a file: rows, or the lines of plain text."""

    path: Path
    rows: list[Row] | None = None
    lines: tuple[str, ...] = ()

    def texts(self, column: str) -> list[str]:
        """Return the texts of a column, or the lines."""
        if self.rows is None:
            return list(self.lines)
        return [_text(_value(row, column), row, column) for row in self.rows]

    def groups(self, outputs: int) -> list[list[str]]:
        """Return the references of each output."""
        if self.rows is not None:
            return [_references(row) for row in self.rows]
        lines = list(self.lines)
        while lines and not lines[-1]:
            lines.pop()
        # Without empty lines, each line is the reference of one output. Exception: a single output whose references
        # end with an empty line has them all.
        if "" not in lines and not (outputs == 1 and len(lines) < len(self.lines)):
            return [[line] for line in lines]
        groups: list[list[str]] = [[]]
        for line in lines:
            if line:
                groups[-1].append(line)
            else:
                groups.append([])
        return groups

    def numbers(self, column: str) -> list[float]:
        """Return the numbers of a column, or of the lines; whole numbers as int."""
        if self.rows is None:
            lines = enumerate(self.lines, start=1)
            return [_number(line, f"{self.path}:{number}") for number, line in lines]
        return [_number(_value(row, column), row.origin) for row in self.rows]

    def golds(self) -> list[list[dict[str, Any]]]:
        """Return the rows of WikiSQL that each output answers: the list `golds`, else the row itself."""
        if self.rows is None:
            raise DataError(
                f"{self.path} is plain text, expected rows of WikiSQL with 'table' and 'sql' (.jsonl)."
            )
        return [_golds(row) for row in self.rows]


def _read(file: str | Path) -> _File:
    path = Path(file)
    reader = reader_for(path)
    if reader is None:
        return _File(path, lines=tuple(line.strip() for line in text_lines(path)))
    rows = list(reader(path))
    for row in rows:
        if isinstance(row, Problem):
            raise DataError(str(row))
    return _File(path, rows=rows)  # type: ignore[arg-type]


def _value(row: Row, column: str) -> Any:
    value = row.values.get(column)
    if value is None:
        raise DataError(
            f"{row.origin}: '{column}' is missing. The row has: {', '.join(map(str, row.values)) or 'nothing'}."
            + nearest(column, map(str, row.values))
        )
    return value


def _text(value: object, row: Row, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{row.origin}: '{column}' is {value!r:.80}, expected a text.")
    return value


def _references(row: Row) -> list[str]:
    if row.values.get("references") is None and "reference" in row.values:
        return [_text(_value(row, "reference"), row, "reference")]
    references = _value(row, "references")
    if not isinstance(references, list):
        raise DataError(
            f"{row.origin}: 'references' is {references!r:.80}, expected a list of texts."
        )
    return [_text(reference, row, "references") for reference in references]


def _golds(row: Row) -> list[dict[str, Any]]:
    golds = row.values.get("golds")
    if golds is None:
        return [row.values]
    if not isinstance(golds, list) or not golds:
        raise DataError(
            f"{row.origin}: 'golds' is {golds!r:.80}, expected a list of objects with 'table' and 'sql'."
        )
    return golds


def _number(value: object, origin: str) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)
    except (ValueError, OverflowError):
        raise DataError(f"{origin}: found {value!r:.80}, expected a number.") from None
    return int(number) if number.is_integer() else number

"""WikiSQL: write the SQL query that answers a question about a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from lorakit import metrics
from lorakit.errors import DataError
from lorakit.metrics.text_to_sql import spelt
from lorakit.tasks.language_modelling import TextTask
from lorakit.tasks.named_text import NamedText
from lorakit.tasks.task import BadRow, DataSet, Fields, Groups, json_type, text_field

CONDITION = ("column_index", "operator_index", "condition")
"""The hub's names for the parts of conditions, each in a separate list."""


class WikiSQL(NamedText):
    """Write a query from a question and the column names of a table (Zhong et al. 2017).

    Queries have WikiSQL's text form, `SELECT COUNT Player FROM table WHERE Position = Guard`. Scoring parses a
    generated query into its logical form. The paper does not publish its format of schema and query.
    """

    name = "wikisql"
    layouts = (("question", "table", "sql"),)
    metric = "logical_form"
    scores = ("logical_form", "execution")
    quick_scores = (*TextTask.quick_scores, "logical_form")
    scored_split = "validation"
    data_set = DataSet(folder="wikisql", hub="Salesforce/wikisql")
    template = (
        "Write the SQL query that answers the question. The table is called table; write names and values without "
        "quotes.\n{context}\nSQL:"
    )
    after_context = "\n\n"

    def context(self, fields: Fields) -> str:
        """Return the column names, separated by bars, and the question on a second line."""
        table = _mapping(fields, "table")
        header = table.get("header")
        if not isinstance(header, Sequence) or isinstance(header, str) or not header:
            raise BadRow("needs the column names in a list 'header'", "table")
        names = [" ".join(str(name).split()) for name in header]
        question = " ".join(text_field(fields, "question").split())
        return f"Columns: {' | '.join(names)}\nQuestion: {question}"

    def answers(self, fields: Fields) -> Iterable[str]:
        """Return the query as text."""
        gold = self.gold(fields)
        try:
            return [spelt(gold["sql"], gold["table"]["header"])]
        except DataError as error:
            raise BadRow(f"cannot be written as a query: {error}", "sql") from None

    def gold(self, fields: Fields) -> Mapping[str, Any]:
        """Return table and logical form in the layout of WikiSQL's files, also for a row of the hub."""
        table, sql = _mapping(fields, "table"), dict(_mapping(fields, "sql"))
        conditions = sql.get("conds")
        if isinstance(conditions, Mapping):
            lists = [conditions.get(name) for name in CONDITION]
            if not all(isinstance(x, Sequence) for x in lists) or len({len(x) for x in lists}) > 1:  # type: ignore[arg-type]
                raise BadRow(f"needs lists of equal length: {', '.join(CONDITION)}", "sql")
            sql["conds"] = [list(condition) for condition in zip(*lists, strict=True)]  # type: ignore[arg-type]
        scored_table: dict[str, Any] = {"header": table.get("header")}
        if table.get("rows") is not None:
            scored_table |= {"rows": _with_numbers(table), "types": table.get("types")}
        return {
            "table": scored_table,
            "sql": {name: sql.get(name) for name in ("sel", "agg", "conds")},
        }

    @classmethod
    def check_scoring(cls, examples: Groups) -> None:
        """Execute the correct queries."""
        cls.score([""] * len(examples), examples)

    @classmethod
    def score(cls, outputs: Sequence[Any], examples: Groups, **settings: Any) -> dict[str, float]:
        """Return logical-form accuracy, and execution accuracy if tables have rows: :func:`metrics.wikisql`."""
        # Repeated questions count separately.
        texts = [output for output, group in zip(outputs, examples, strict=True) for _ in group]
        golds = [example.gold for group in examples for example in group]
        if settings.get("quick"):  # without rows no query is executed
            golds = [{**gold, "table": {"header": gold["table"]["header"]}} for gold in golds]
            text_scores = super().score(outputs, examples, **settings)
            return {**text_scores, **metrics.wikisql(texts, golds)}
        return metrics.wikisql(texts, golds)


def _mapping(fields: Fields, column: str) -> Mapping[str, Any]:
    value = fields.get(column)
    if not isinstance(value, Mapping):
        raise BadRow(f"is {json_type(value)}, expected an object", column)
    return value


def _with_numbers(table: Mapping[str, Any]) -> list[list[Any]]:
    """Return the rows with numbers in columns of type real. The hub stores all cells as text."""
    types = table.get("types") or ()
    rows = [list(row) for row in table["rows"]]
    for row in rows:
        for i, column_type in enumerate(types):
            if column_type == "real" and i < len(row) and isinstance(row[i], str):
                with suppress(ValueError):
                    value = float(row[i].replace(",", ""))
                    row[i] = value if math.isfinite(value) else row[i]  # a name can be Nan or inf
    return rows

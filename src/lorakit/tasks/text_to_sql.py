"""WikiSQL: a question about a table, and the query that answers it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from lorakit import metrics
from lorakit.errors import DataError
from lorakit.metrics.text_to_sql import spelt
from lorakit.tasks.data_set import DataSet
from lorakit.tasks.language_modelling import TextTask
from lorakit.tasks.named_text import NamedText, each_example
from lorakit.tasks.task import BadRow, Example, Fields, kind, text_field

CONDITION = ("column_index", "operator_index", "condition")
"""What the hub calls the parts of a condition, each in a list of its own."""


class WikiSQL(NamedText):
    """The column names of a table and a question; the query as text (Zhong et al. 2017).

    The query is written as WikiSQL spells it, `SELECT COUNT Player FROM table WHERE Position = Guard`, and a generated
    one is read back into its logical form for scoring. How the paper wrote schema and query is not published.
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
        """Return the column names, parted by bars, and the question in a line of its own."""
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
        """Return table and logical form as WikiSQL's own files have them, whether the row is of a file or the hub."""
        table, sql = _mapping(fields, "table"), dict(_mapping(fields, "sql"))
        conditions = sql.get("conds")
        if isinstance(conditions, Mapping):
            lists = [conditions.get(name) for name in CONDITION]
            if not all(isinstance(x, Sequence) for x in lists) or len({len(x) for x in lists}) > 1:  # type: ignore[arg-type]
                raise BadRow(f"needs lists of one length: {', '.join(CONDITION)}", "sql")
            sql["conds"] = [list(condition) for condition in zip(*lists, strict=True)]  # type: ignore[arg-type]
        kept: dict[str, Any] = {"header": table.get("header")}
        if table.get("rows"):
            kept |= {"rows": _with_numbers(table), "types": table.get("types")}
        return {"table": kept, "sql": {name: sql.get(name) for name in ("sel", "agg", "conds")}}

    @classmethod
    def score(
        cls, outputs: Sequence[Any], examples: Sequence[Sequence[Example]], **settings: Any
    ) -> dict[str, float]:
        """Return logical-form accuracy, and execution accuracy where tables have rows: :func:`metrics.wikisql`."""
        texts, each = each_example(outputs, examples)  # questions that stand twice count twice
        scores = metrics.wikisql(texts, [example.gold for example in each])
        if settings.get("quick"):
            mine = {"logical_form": scores["logical_form"]}
            return {**super().score(outputs, examples, **settings), **mine}
        return scores


def _mapping(fields: Fields, column: str) -> Mapping[str, Any]:
    value = fields.get(column)
    if not isinstance(value, Mapping):
        raise BadRow(f"is {kind(value)}, expected an object", column)
    return value


def _with_numbers(table: Mapping[str, Any]) -> list[list[Any]]:
    """The rows, with numbers in columns of numbers, where the hub has texts throughout."""
    types = table.get("types") or ()
    rows = [list(row) for row in table["rows"]]
    for row in rows:
        for i, of in enumerate(types):
            if of == "real" and i < len(row) and isinstance(row[i], str):
                with suppress(ValueError):
                    row[i] = float(row[i].replace(",", ""))
    return rows

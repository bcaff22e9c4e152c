"""Metrics of WikiSQL: logical-form accuracy and execution accuracy of generated queries."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.errors import DataError
from lorakit.metrics.checks import check_pairs
from lorakit.metrics.tables import AGGREGATES, OPERATORS, Query, Table, normalized

QUERY = re.compile(r"select (.+?) from table(?: where (.+))?")


def wikisql(outputs: Sequence[str], examples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the accuracy of queries, from 0 to 1, as defined by evaluate.py of salesforce/WikiSQL.

    - logical_form: the query has the same column, the same aggregate and the same set of conditions (column, operator,
      value). Order and case do not matter.
    - execution: the query has the same result as the correct one. Present if the tables have rows.

    Queries have WikiSQL's text form, ``SELECT COUNT Player FROM table WHERE Position = Guard AND Age > 30``, with the
    column names of the table. Case and white space do not matter. Any other text counts as wrong.

    For execution, text in the table and in conditions is lower-cased. A condition on a column of numbers uses the
    number in its value, as in the official program. But two conditions on one column are both applied; the official
    program applies the last one twice.

    Args:
        outputs: Generated queries.
        examples: Rows of WikiSQL. `table` has the `header`; to execute queries also `rows` (lists of cells) and `types`
            ("text" or "real" for each column; without them a column of numbers only is "real"). `sql` has `sel`, `agg`
            and `conds`.

    Raises:
        DataError: The list of outputs is empty, an output is not text, or an example is not a row of WikiSQL.
    """
    check_pairs(outputs, examples)
    pairs = [_example(example, f"Example {i}") for i, example in enumerate(examples, start=1)]
    for number, output in enumerate(outputs, start=1):
        if not isinstance(output, str):
            raise DataError(f"Output {number} is {output!r}, expected text.")
    guesses = [
        parse(output, table.header) for output, (table, _) in zip(outputs, pairs, strict=True)
    ]
    correct = [guess == query for guess, (_, query) in zip(guesses, pairs, strict=True)]
    scores = {"logical_form": sum(correct) / len(correct)}
    with_rows = sum(table.rows is not None for table, _ in pairs)
    if 0 < with_rows < len(pairs):
        raise DataError(f"{with_rows} of {len(pairs)} tables have rows, expected all or none.")
    if with_rows:
        correct = [
            _same_result(guess, query, table, f"Example {i}")
            for i, (guess, (table, query)) in enumerate(zip(guesses, pairs, strict=True), start=1)
        ]
        scores["execution"] = sum(correct) / len(correct)
    return scores


def parse(text: str, header: Sequence[str]) -> Query | None:
    """Parse a query with the column names of `header`; return None for any other text.

    Of columns with equal names the first is used. If a name is a prefix of another, the longest match is used. A value
    ends before ``AND``, a column and an operator.
    """
    clauses = QUERY.fullmatch(normalized(text))
    if clauses is None:
        return None
    names = [normalized(name) for name in header]
    selected, where = clauses.groups()
    select = _select(selected, names)
    if select is None:
        return None
    columns = "|".join(re.escape(name) for name in sorted(set(names), key=len, reverse=True))
    operators = "|".join(OPERATORS).lower()
    start = re.compile(rf"({columns}) ({operators})(?: |$)")
    between = re.compile(rf" and (?=(?:{columns}) (?:{operators})(?: |$))")
    conditions = set()
    for condition in between.split(where) if where else ():
        match = start.match(condition)
        if match is None:
            return None
        operator = OPERATORS.index(match[2].upper())
        conditions.add((names.index(match[1]), operator, condition[match.end() :]))
    return Query(*select, frozenset(conditions))


def spelt(sql: Mapping[str, Any], header: Sequence[str]) -> str:
    """Return a logical form (`sel`, `agg`, `conds`) in WikiSQL's text form. `parse` is the inverse.

    Raises:
        DataError: The logical form is invalid, or has a column outside `header`.
    """
    _example({"table": {"header": header}, "sql": sql}, "The query")

    def name(column: int) -> str:
        return " ".join(str(header[column]).split())

    selected = f"{AGGREGATES[sql['agg']]} {name(sql['sel'])}".strip()
    conditions = [
        f"{name(column)} {OPERATORS[operator]} {' '.join(str(value).split())}"
        for column, operator, value in sql["conds"]
    ]
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    return f"SELECT {selected} FROM table{where}"


def _select(selected: str, names: list[str]) -> tuple[int, int] | None:
    """Return the indices of the column and the aggregate of a SELECT clause, or None."""
    for aggregate, name in enumerate(AGGREGATES):
        column = selected.removeprefix(f"{name} ".lower()) if name else selected
        if column in names and (not name or column != selected):
            return names.index(column), aggregate
    return None


def _same_result(guess: Query | None, query: Query, table: Table, location: str) -> bool:
    expected = table.find(query)
    if expected is None:
        raise DataError(
            f"{location}: its correct query cannot be executed. Each condition needs an operator of =, > or < (0, 1, "
            "2), and a number for a column of type real."
        )
    return guess is not None and table.find(guess) == expected


def _example(example: Mapping[str, Any], location: str) -> tuple[Table, Query]:
    """Return the table and the correct query of a row of WikiSQL."""
    table, sql = (_mapping(example, name, location) for name in ("table", "sql"))
    header = _list(table, "header", f"{location}: table")
    width = len(header)
    selected = _index(sql.get("sel"), width, f"{location}: sql.sel")
    aggregate = _index(sql.get("agg"), len(AGGREGATES), f"{location}: sql.agg")
    names = [normalized(name) for name in header]
    conditions = set()
    for condition in _list(sql, "conds", f"{location}: sql"):
        if not isinstance(condition, Sequence) or len(condition) != 3:
            raise DataError(
                f"{location}: a condition is {condition!r}, expected [column, operator, value]."
            )
        column, operator, value = condition
        column = _index(column, width, f"{location}: the column of a condition")
        operator = _index(operator, len(OPERATORS), f"{location}: the operator of a condition")
        conditions.add((names.index(names[column]), operator, normalized(value)))
    query = Query(names.index(names[selected]), aggregate, frozenset(conditions))
    if table.get("rows") is None:
        return Table(header), query
    rows = _list(table, "rows", f"{location}: table")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != width:
            raise DataError(
                f"{location}: row {number} of the table is {row!r:.80}, expected a list of {width} cells."
            )
    return Table(header, rows, _types(table, rows, width, location)), query


def _types(table: Mapping[str, Any], rows: Sequence, width: int, location: str) -> list[str]:
    if table.get("types") is None:
        return [
            "real" if rows and all(isinstance(row[i], int | float) for row in rows) else "text"
            for i in range(width)
        ]
    types = _list(table, "types", f"{location}: table")
    if len(types) != width or not {"text", "real"}.issuperset(types):
        raise DataError(
            f"{location}: the table's types are {types!r:.80}, expected 'text' or 'real' for each of {width} columns."
        )
    return list(types)


def _mapping(example: object, name: str, location: str) -> Mapping[str, Any]:
    value = example.get(name) if isinstance(example, Mapping) else None
    if not isinstance(value, Mapping):
        raise DataError(f"{location} has no object '{name}', expected a row of WikiSQL.")
    return value


def _list(values: Mapping[str, Any], name: str, location: str) -> Sequence[Any]:
    value = values.get(name)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{location}.{name} is {value!r:.80}, expected a list.")
    return value


def _index(value: object, count: int, location: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise DataError(f"{location} is {value!r}, expected an index from 0 to {count - 1}.")
    return value

"""WikiSQL: logical form and execution."""

from __future__ import annotations

import copy
import gzip
import json
from itertools import islice
from pathlib import Path

import pytest

from lorakit.errors import DataError
from lorakit.metrics import wikisql
from lorakit.metrics.tables import number_in
from lorakit.metrics.text_to_sql import parse, spelt

HEADER = ["Player", "No.", "Position", "Years in Toronto", "Position from table"]


def example(sel: int, agg: int, *conds, **table) -> dict:
    return {
        "table": {"header": HEADER, **table},
        "sql": {"sel": sel, "agg": agg, "conds": [list(condition) for condition in conds]},
    }


GUARDS = example(0, 3, (2, 0, "Guard"), (1, 1, "30"))


@pytest.mark.parametrize(
    "output",
    [
        "SELECT COUNT Player FROM table WHERE Position = Guard AND No. > 30",
        "SELECT COUNT Player FROM table WHERE No. > 30 AND Position = Guard",
        "  select count player\nfrom table where position = GUARD and  no. > 30 ",
        "SELECT COUNT Player FROM table WHERE No. > 30 AND Position = Guard AND No. > 30",
    ],
)
def test_ways_to_write_the_right_query(output: str) -> None:
    assert wikisql([output], [GUARDS]) == {"logical_form": 1}


@pytest.mark.parametrize(
    "output",
    [
        "SELECT Player FROM table WHERE Position = Guard AND No. > 30",
        "SELECT MAX Player FROM table WHERE Position = Guard AND No. > 30",
        "SELECT COUNT Position FROM table WHERE Position = Guard AND No. > 30",
        "SELECT COUNT Player FROM table WHERE Position = Guard",
        "SELECT COUNT Player FROM table WHERE Position = Guard AND No. < 30",
        "SELECT COUNT Player FROM table WHERE Position = Guard AND No. > 31",
        "SELECT COUNT Player FROM table WHERE Position = Guard AND No. > 30 AND No. > 31",
        "SELECT COUNT Player FROM table WHERE Position = Guard OR No. > 30",
        "SELECT COUNT Player FROM table",
        "SELECT COUNT Nobody FROM table WHERE Position = Guard AND No. > 30",
        "Guard",
        "",
    ],
)
def test_wrong_queries(output: str) -> None:
    assert wikisql([output], [GUARDS]) == {"logical_form": 0}


def test_names_and_values_that_look_like_syntax() -> None:
    odd = example(4, 0, (3, 0, "1995 and Player of where = x"))
    right = "SELECT Position from table FROM table WHERE Years in Toronto = 1995 and Player of where = x"
    assert wikisql([right], [odd]) == {"logical_form": 1}


def test_a_column_is_taken_before_an_aggregate() -> None:
    assert parse("SELECT Max Speed FROM table", ["Speed", "Max Speed"]).column == 1  # type: ignore[union-attr]
    query = parse("SELECT MAX Speed FROM table", ["Speed"])
    assert (query.column, query.aggregate) == (0, 1)  # type: ignore[union-attr]


@pytest.mark.slow
def test_every_query_of_wikisql_is_read_as_itself(shared: Path) -> None:
    with gzip.open(shared / "data" / "wikisql" / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, 5000)]
    outputs = [row["sql"]["human_readable"] for row in rows]
    assert wikisql(outputs, rows) == {"logical_form": 1}
    # Each query against the next row: correct only if two rows have the same query.
    shifted = wikisql([*outputs[1:], outputs[0]], rows)["logical_form"]
    assert shifted < 0.01


@pytest.mark.slow
def test_every_query_of_the_validation_set_comes_back_from_its_text(shared: Path) -> None:
    """Each of the 8,421 queries, written as text and parsed, gives its logical form with the same indices."""
    file = shared / "data" / "wikisql" / "validation.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    failures = []
    for row in rows:
        sql, header = row["sql"], row["table"]["header"]
        text = spelt(sql, header)
        assert text == " ".join(sql["human_readable"].split())  # WikiSQL's own text
        query = parse(text, header)
        conditions = {(c, op, " ".join(value.lower().split())) for c, op, value in sql["conds"]}
        if query is None or (sql["sel"], sql["agg"], conditions) != (
            *(query.column, query.aggregate),
            query.conditions,
        ):
            failures.append((text, query))
    assert (len(rows), failures) == (8421, [])


def test_ambiguous_texts() -> None:
    """Parsing is ambiguous in two cases: columns with equal names, and a value that contains a condition."""
    twice = parse(spelt({"sel": 1, "agg": 0, "conds": []}, ["Score", "score"]), ["Score", "score"])
    assert twice is not None
    assert twice.column == 0
    conditions = [[0, 0, "a and No. > 3"]]
    split = parse(spelt({"sel": 0, "agg": 0, "conds": conditions}, HEADER), HEADER)
    assert split is not None
    assert split.conditions == {(0, 0, "a"), (1, 1, "3")}


def test_an_invalid_logical_form_is_rejected() -> None:
    with pytest.raises(DataError, match=r"sql\.sel is 9, expected an index from 0 to 4"):
        spelt({"sel": 9, "agg": 0, "conds": []}, HEADER)


ROWS = [["Ann", 7, "Guard"], ["Bob", 31, "guard"], ["Cy", 40, "GUARD"], ["Di", 1000, None]]
TABLE = {"header": ["Player", "No.", "Position"], "rows": ROWS}


@pytest.mark.parametrize(
    ("conditions", "output", "right"),
    [
        ([[1, 1, "30"]], "SELECT Player FROM table WHERE No. > 30", True),
        ([[1, 1, "30"]], "SELECT Player FROM table WHERE No. > 8", True),
        ([[1, 1, "30"]], "SELECT Player FROM table WHERE No. > about 30 or so", True),
        ([[1, 1, "30"]], "SELECT Player FROM table WHERE No. > 6", False),
        ([[1, 1, "30"]], "SELECT No. FROM table WHERE No. > 30", False),
        ([[1, 1, "30"]], "SELECT Player FROM table WHERE No. > many", False),
        ([[1, 1, "30"]], "SELECT Player FROM table WHERE No. OP 30", False),
        ([[1, 1, "30"]], "no query", False),
        ([[1, 0, "1,000"]], "SELECT Player FROM table WHERE No. = 1000", True),
        ([[1, 1, "7"], [1, 2, "40"]], "SELECT Player FROM table WHERE Player = bob", True),
        ([[2, 0, "guard"]], "SELECT Player FROM table WHERE No. < 1000", True),
        ([], "SELECT Player FROM table WHERE No. > 0", True),
        ([[0, 0, "x'; --"]], "SELECT Player FROM table WHERE Player = nobody", True),
    ],
)
def test_execution(conditions: list, output: str, right: bool) -> None:
    row = {"table": TABLE, "sql": {"sel": 0, "agg": 0, "conds": conditions}}
    assert wikisql([output], [row])["execution"] == right


@pytest.mark.parametrize(
    ("aggregate", "output"),
    [
        (1, "SELECT No. FROM table WHERE No. = 1000"),
        (2, "SELECT No. FROM table WHERE Player = Ann"),
        (3, "SELECT COUNT Player FROM table"),
        (4, "SELECT SUM No. FROM table WHERE No. > 1"),
        (5, "SELECT AVG No. FROM table WHERE No. > 0"),
    ],
)
def test_execution_of_aggregates(aggregate: int, output: str) -> None:
    row = {"table": TABLE, "sql": {"sel": 1, "agg": aggregate, "conds": []}}
    assert wikisql([output], [row]) == {"logical_form": 0, "execution": 1}


def test_types_say_how_a_column_compares() -> None:
    table = {**TABLE, "types": ["text", "text", "text"]}
    row = {"table": table, "sql": {"sel": 0, "agg": 0, "conds": [[1, 0, "1000"]]}}
    # As text, "1000" sorts before "31", and conditions are not parsed as numbers.
    assert wikisql(["SELECT Player FROM table WHERE No. < 2"], [row])["execution"] == 1
    assert wikisql(["SELECT Player FROM table WHERE No. = 1,000"], [row])["execution"] == 0


def test_numbers_in_texts() -> None:
    assert number_in("-1,234.5") == -1234.5
    assert number_in("over 12 of 30") == 12
    assert number_in("-.5 degrees") == -0.5
    assert number_in("nan") is None
    assert number_in("9" * 400) is None


def _changed(path: str, value) -> dict:
    row = copy.deepcopy(GUARDS)
    *parents, last = path.split(".")
    place = row
    for name in parents:
        place = place[name]
    place[last] = value
    return row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a row", "Example 1 has no object 'table'"),
        ({"table": {"header": ["a"]}}, "Example 1 has no object 'sql'"),
        (_changed("table.header", "Player"), "table.header is 'Player', expected a list"),
        (_changed("sql.sel", 5), "sql.sel is 5, expected an index from 0 to 4"),
        (_changed("sql.agg", None), "sql.agg is None, expected an index from 0 to 5"),
        (_changed("sql.conds", None), "sql.conds is None, expected a list"),
        (_changed("sql.conds", [[0, 0]]), r"a condition is \[0, 0\], expected"),
        (_changed("sql.conds", [[0, 4, "x"]]), "the operator of a condition is 4"),
        (
            _changed("table.rows", [["a", "b"]]),
            "row 1 of the table is .* expected a list of 5 cells",
        ),
        (
            {**GUARDS, "table": {"header": ["a"] * 3, "rows": [], "types": ["int"] * 3}},
            "expected 'text' or 'real' for each of 3 columns",
        ),
        (
            {"table": TABLE, "sql": {"sel": 0, "agg": 0, "conds": [[1, 0, "many"]]}},
            "its correct query cannot be executed",
        ),
    ],
)
def test_rows_of_other_data_are_rejected(row, message: str) -> None:
    with pytest.raises(DataError, match=message):
        wikisql(["SELECT a FROM table"], [row])


def test_outputs_must_be_text_and_all_tables_alike() -> None:
    with pytest.raises(DataError, match="Output 1 is 3, expected text"):
        wikisql([3], [GUARDS])  # type: ignore[list-item]
    row = {"table": TABLE, "sql": {"sel": 0, "agg": 0, "conds": []}}
    with pytest.raises(DataError, match="1 of 2 tables have rows"):
        wikisql(["a", "b"], [GUARDS, row])

from __future__ import annotations

import csv
import gzip
import json
import runpy
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lorakit.data import readers
from lorakit.data.readers import reader_for
from lorakit.data.rows import Problem, Row
from lorakit.errors import DataError

ROWS = [{"text": "naïve ☃", "n": "1"}, {"text": "two\u2028lines", "n": "2"}]


def read(path, content=None):
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    reader = reader_for(path)
    assert reader is not None
    return list(reader(path))


def problems(rows):
    return [str(row) for row in rows if isinstance(row, Problem)]


def values(rows):
    return [row.values for row in rows if isinstance(row, Row)]


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows, delimiter=","):
    lines = [delimiter.join(rows[0])]
    lines += [delimiter.join(f'"{value}"' for value in row.values()) for row in rows]
    return "\r\n".join(lines) + "\r\n"


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_in_a_file_of_lines_is_to_be_renamed(tmp_path, indent):
    rows = read(tmp_path / "data.jsonl", json.dumps(ROWS, indent=indent).encode())
    found = [
        problem.endswith("if the file is one list, rename it to .json")
        for problem in problems(rows)
    ]
    assert found == [True] + [False] * (len(rows) - 1)
    assert len(read(tmp_path / "data.json", json.dumps(ROWS, indent=indent).encode())) == 2


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "csv"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_gets_the_command_that_converts_it(tmp_path, suffix, encoding):
    data = ("\ufeff" + as_jsonl(ROWS)).encode(encoding)
    with pytest.raises(DataError, match=r"is UTF-16\. Convert it: iconv -f utf-16"):
        read(tmp_path / f"data.{suffix}", gzip.compress(data) if suffix.endswith("gz") else data)


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    ("suffix", "content", "lines"),
    [
        (".jsonl", as_jsonl(ROWS), [1, 2]),
        (".json", as_jsonl(ROWS), [1, 2]),
        (".json", json.dumps(ROWS, indent=1), [2, 6]),
        (".csv", as_csv(ROWS), [2, 3]),
        (".tsv", as_csv(ROWS, "\t"), [2, 3]),
    ],
)
def test_every_text_format_gives_the_same_rows_with_their_lines(
    tmp_path, suffix, content, lines, bom, gz
):
    path = tmp_path / f"data{suffix}{gz}"
    data = bom + content.encode()
    rows = read(path, gzip.compress(data) if gz else data)
    assert rows == [Row(row, f"{path}:{line}") for row, line in zip(ROWS, lines, strict=True)]


def test_parquet_rows_are_numbered(tmp_path):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 1000), path, row_group_size=300)
    rows = read(path)
    assert values(rows) == ROWS * 1000
    assert (rows[0].origin, rows[-1].origin) == (f"{path}:row 1", f"{path}:row 2000")


CALLS = [
    {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]}
    for call in (
        {"name": "weather", "arguments": {"city": "Rome"}},
        {"name": "calc", "arguments": {"terms": [{"x": 1}, {"y": [None, 2]}]}},
    )
]


def test_parquet_messages_have_the_members_of_jsonl(tmp_path):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CALLS), path)
    assert values(read(path)) == values(read(tmp_path / "data.jsonl", as_jsonl(CALLS))) == CALLS


def test_jsonl_names_each_bad_line_and_reads_the_others(tmp_path):
    lines = [
        b'{"a": 1}',
        b"",
        b'{"a": "caf\xe9"}',
        b'{"a": 1',
        b"[1]",
        b"null",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 2}',
    ]
    path = tmp_path / "data.jsonl"
    rows = read(path, b"\n".join(lines))
    assert values(rows) == [{"a": 1}, {"a": 2}]
    assert rows[-1].origin == f"{path}:9"
    messages = problems(rows)
    expected = [
        "3: not UTF-8 (byte 0xe9 at 11)",
        "4: not valid JSON (Expecting ',' delimiter at character 9)",
        "5: found a list, expected an object",
        "6: found null, expected an object",
        "7: not readable as JSON",
        "8: not readable as JSON",
    ]
    assert len(messages) == len(expected)
    for message, start in zip(messages, expected, strict=True):
        assert message.startswith(f"{path}:{start}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n{"a": }]', "data.json:2: not valid JSON"),
        ('[{"a": 1},\n{"a": 2}', "found the end of the file after the object of line 2"),
        ('[{"a": 1}\n{"a": 2}]', "found '{' after the object of line 1, expected , or ]"),
        ('[{"a": 1},]', "data.json:1: not valid JSON"),
        ('[{"a": 1}]\n[{"a": 2}]', r"data.json:2: found '\[' after the list, expected the end"),
        ("[] x", "data.json:1: found 'x' after the list"),
        ("[", "data.json:1: not valid JSON"),
        ('"a"', "found '\"', expected a list of objects"),
        (
            '{"version": 1,\n "data": [{"a": 1}]}',
            "found one object, expected a list.*Save one of its lists: 'data'",
        ),
        (b'[\n{"a": "\xff"}]', r"data.json:2: not UTF-8 \(byte 0xff\)"),
    ],
)
def test_a_broken_json_list_is_an_error(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path / "data.json", content)


@pytest.mark.parametrize("content", ["", "  \n", "[]", " [ ] "])
def test_json_without_objects_has_no_rows(tmp_path, content):
    assert read(tmp_path / "data.json", content) == []


def test_json_list_reports_members_that_are_no_objects(tmp_path):
    rows = read(tmp_path / "data.json", '[1,\n{"a": 1}\n]')
    assert values(rows) == [{"a": 1}]
    assert problems(rows) == [
        f"{tmp_path}/data.json:1: found a number (1), expected an object {{...}}"
    ]


def test_csv_names_each_bad_line_and_reads_the_others(tmp_path):
    path = tmp_path / "data.csv"
    lines = ["a,b", '1,"x', 'y"', "1", "1,2,3", "", '"x"y,1', "2,ok"]
    rows = read(path, "\n".join(lines))
    assert rows[0] == Row({"a": "1", "b": "x\ny"}, f"{path}:2")  # a quoted field over two lines
    assert rows[-1] == Row({"a": "2", "b": "ok"}, f"{path}:8")
    assert problems(rows) == [
        f"{path}:4: 1 fields, but the header has 2 columns",
        f"{path}:5: 3 fields, but the header has 2 columns",
        f"{path}:7: not valid CSV (',' expected after '\"')",
    ]


def test_csv_with_a_document_in_a_field(tmp_path):
    text = "river " * 100_000
    rows = read(tmp_path / "data.csv", f"text,label\n{text},1\n")
    assert values(rows) == [{"text": text, "label": "1"}]


def test_a_quote_that_never_closes_cannot_hide_the_rows_after_it(tmp_path):
    """As one bad row, it would take all of them: only a last row is a problem of its own."""
    message = r"data\.csv:3: a quote opens a field that does not end up to line 4, the last"
    with pytest.raises(DataError, match=message):
        read(tmp_path / "data.csv", 'a,b\n1,2\n3,"4\n5,6\n')
    rows = read(tmp_path / "data.csv", 'a,b\n1,2\n3,"4')
    assert values(rows) == [{"a": "1", "b": "2"}]
    assert problems(rows) == [f"{tmp_path}/data.csv:3: not valid CSV (unexpected end of data)"]


def test_two_stray_quotes_of_a_tsv_file_cannot_join_the_rows_between_them(tmp_path):
    message = r"data\.tsv:2: a quote opens a field that joins the rows up to line 4\."
    with pytest.raises(DataError, match=message):
        read(tmp_path / "data.tsv", 'a\tb\n"river\t1\npub\t0\npark"\t1\n')
    rows = read(tmp_path / "data.tsv", 'a\tb\n"two\nlines"\t1\n"if x:\n\ty"\t0\n')
    assert [row["a"] for row in values(rows)] == ["two\nlines", "if x:\n\ty"]


@pytest.mark.parametrize(
    ("header", "message"),
    [("a,b,a", "names the column 'a' more than once"), ("a,,b", "column 2 .* has no name")],
)
def test_a_csv_header_must_name_each_column_once(tmp_path, header, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path / "data.csv", f"{header}\n1,2,3\n")


def test_a_truncated_gzip_file_is_named(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    whole = gzip.compress(as_jsonl(ROWS * 1000).encode())
    with pytest.raises(DataError, match=r"data\.jsonl\.gz: the gzip file is truncated"):
        read(path, whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"data\.jsonl\.gz: cannot be read \(Not a gzipped file"):
        read(path, as_jsonl(ROWS))


def test_a_missing_file_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read(tmp_path / "train.jsonl", as_jsonl(ROWS))
    message = (
        r"trian\.jsonl: cannot be read \(there is no such file\)\. Did you mean 'train\.jsonl'\?$"
    )
    with pytest.raises(DataError, match=message):
        read(Path("trian.jsonl"))


def test_a_broken_parquet_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data\.parquet: not a readable Parquet file"):
        read(tmp_path / "data.parquet", b"PAR1 nonsense PAR1")


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pyarrow.array([2**31 - 1], pyarrow.int32()).cast(pyarrow.date32()), "days=2147483647"),
        (pyarrow.array([2**62]).cast(pyarrow.timestamp("us")), "date value out of range"),
        (pyarrow.array([2**62]).cast(pyarrow.duration("s")), "too large"),
    ],
)
def test_a_parquet_value_out_of_range_is_an_error_with_its_column(tmp_path, column, reason):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "day": column}), path)
    with pytest.raises(
        DataError, match=rf"data\.parquet: column 'day' has a value .*{reason}.*write"
    ):
        read(path)


def test_a_parquet_file_must_name_each_column_once(tmp_path):
    path = tmp_path / "data.parquet"
    columns = [pyarrow.array(values) for values in (["x"], [1], [0])]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=["text", "label", "label"]), path)
    with pytest.raises(DataError, match=r"2 columns have the name 'label'; rename all but one"):
        read(path)


@pytest.mark.parametrize("name", ["data.txt", "data", "data.parquet.gz", "jsonl"])
def test_unknown_formats_have_no_reader(tmp_path, name):
    assert reader_for(tmp_path / name) is None


def test_a_larger_limit_of_the_callers_for_csv_fields_stays():
    before = csv.field_size_limit(2**31 - 1)
    try:
        runpy.run_path(readers.__file__)
        assert csv.field_size_limit() == 2**31 - 1
    finally:
        csv.field_size_limit(before)

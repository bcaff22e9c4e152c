"""Data files that would take all memory or time: each is an error with its line, or a bad row."""

from __future__ import annotations

import gzip
import json
import time
from contextlib import suppress

import pyarrow
import pyarrow.parquet
import pytest
from test_readers import problems, read

from lorakit.data import bounded_files
from lorakit.data.bounded_files import MAX_COLUMNS
from lorakit.data.columns import ColumnMap
from lorakit.data.data_config import DataConfig
from lorakit.data.parquet import read_parquet
from lorakit.data.rows import Row
from lorakit.data.sources import read_source
from lorakit.errors import DataError


def zeros(count, byte=b"\n"):
    """Return a gzip file that inflates to `count` times `byte`: about 1/1000 of that."""
    chunk = gzip.compress(byte * 2**20, compresslevel=9)
    return chunk * (count // len(byte) // 2**20)  # members are concatenated


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_duplicate_key_is_a_bad_row_with_its_line(tmp_path, name):
    rows = read(tmp_path / name, '{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}\n{"a": 3}\n')
    assert problems(rows) == [
        f"{tmp_path / name}:2: not readable as JSON (the key 'c' is duplicated)"
    ]
    assert [row.values for row in rows if isinstance(row, Row)] == [{"a": 1}, {"a": 3}]


def test_a_duplicate_key_in_a_list_is_a_bad_row_with_its_line(tmp_path):
    rows = read(tmp_path / "a.json", '[{"a": 1},\n{"a": 1, "a": 2},\n{"a": 3}]')
    assert problems(rows) == [
        f"{tmp_path / 'a.json'}:2: not readable as JSON (the key 'a' is duplicated)"
    ]
    assert [row.values for row in rows if isinstance(row, Row)] == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("value", ["NaN", "-Infinity"])
@pytest.mark.parametrize("layout", ["[{{}},\n{row}]", "{{}}\n{row}\n"])
def test_a_number_that_is_none_is_a_bad_row_with_its_line(tmp_path, layout, value):
    rows = read(tmp_path / "a.json", layout.format(row=f'{{"a": {value}}}'))
    (problem,) = problems(rows)
    assert problem.startswith(f"{tmp_path / 'a.json'}:2: not readable as JSON (")


def test_many_duplicate_keys_take_linear_time(tmp_path):
    keys = ", ".join(f'"k{i}": 0' for i in range(MAX_COLUMNS * 5))
    began = time.monotonic()
    rows = read(tmp_path / "a.jsonl", f'{{{keys}, "k0": 1}}\n')
    assert "the key 'k0' is duplicated" in problems(rows)[0]
    assert time.monotonic() - began < 5  # usually 0.02 s; 100 s if each key is searched in all


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_more_columns_than_the_limit_are_an_error(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    names = [f"c{i}" for i in range(60_000)]
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({name: ["x"] for name in names}), path)
    elif suffix == ".csv":
        path.write_text(",".join(names) + "\n" + ",".join(names) + "\n")
    else:
        path.write_text(json.dumps(dict.fromkeys(names, 1)) + "\n")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"60,000 columns, and the limit is 10,000"):
        read_source(str(path))
    assert time.monotonic() - began < 10


def test_rows_that_each_name_another_column_are_an_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"c{i}": 1}}\n' for i in range(MAX_COLUMNS + 1)))
    with pytest.raises(DataError, match="its rows have 10,001 different columns"):
        read_source(str(path))


def test_a_header_with_a_repeated_name_takes_linear_time(tmp_path):
    names = [f"c{i}" for i in range(MAX_COLUMNS - 1)]
    with pytest.raises(DataError, match="names the column 'c5' more than once"):
        read(tmp_path / "a.csv", ",".join([*names, "c5"]) + "\n")


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize("blank", ["\n", " \n", "\r\n"])
def test_blank_lines_without_an_end_are_an_error(tmp_path, monkeypatch, suffix, blank, gz):
    monkeypatch.setattr(bounded_files, "MAX_BLANK_LINES", 100)
    path = tmp_path / f"a{suffix}{gz}"
    start = '{"a": 1}\n' if suffix == ".jsonl" else "a\n1\n"
    pack = gzip.compress if gz else bytes
    read(path, pack((start + blank * 100 + start).encode()))
    with pytest.raises(DataError, match=f"a{suffix}{gz}:10[23]: more than 100 blank lines"):
        read(path, pack((start + blank * 101 + start).encode()))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_a_line_above_the_limit_is_an_error_with_its_number(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(bounded_files, "MAX_LINE", 1000)
    start = '{"a": 1}\n' if suffix == ".jsonl" else "a\n"
    with pytest.raises(DataError, match=rf"a{suffix}:2: the line is longer than 1,000"):
        read(tmp_path / f"a{suffix}", start + "x" * 1001)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("byte", [b"\n", b"x", b"\0", b" ", b"[", b'"', b"x\n", b"{}\n", b"{},"])
def test_a_gzip_bomb_is_an_error_within_seconds(tmp_path, monkeypatch, suffix, byte):
    monkeypatch.setattr(bounded_files, "FREE_ROWS", 50_000)
    path = tmp_path / f"a{suffix}.gz"
    bomb = zeros(2**28, byte)
    assert len(bomb) < 1e6
    path.write_bytes(bomb)
    began = time.monotonic()
    with pytest.raises(
        DataError,
        match=r"a\.(jsonl|json|csv)\.gz.*(inflates|longer than|blank lines|rows|unreadable)",
    ):
        read_source(str(path))
    assert time.monotonic() - began < 60  # usually below 5 s


@pytest.mark.slow
def test_ordinary_gzip_files_are_read_whole(tmp_path):
    lines = b'{"text": "the same row again and again"}\n' * 200_000
    assert len(read(tmp_path / "a.jsonl.gz", gzip.compress(lines, 1))) == 200_000


@pytest.mark.parametrize(
    ("suffix", "content", "problem"),
    [
        (".jsonl", '{"a\\ud800": 1}\n', "1: a key is not valid Unicode"),
        (".jsonl", '{"a": "x\0"}\n', "1: not valid JSON"),
        (".csv", b"a,b\xff\n1,2\n", "column 2 of the header is not UTF-8"),
        (".jsonl", '{"a": ' + "[" * 100_000, "1: not readable as JSON"),
        (".json", '[{"a": ' + "[" * 100_000, "1: not valid JSON"),
        (".jsonl", '{"a": ' + "1" * 5000 + "}", "1: not readable as JSON"),
    ],
)
def test_text_that_is_not_unicode_or_too_deep_is_a_problem(tmp_path, suffix, content, problem):
    path = tmp_path / f"a{suffix}"
    try:
        found = problems(read(path, content))
    except DataError as error:
        found = [str(error)]
    assert len(found) == 1
    assert problem in found[0]


@pytest.mark.slow
def test_a_parquet_file_that_declares_more_than_it_has_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"a": ["x" * 100_000_000]}), path, compression="zstd", use_dictionary=False
    )
    with pytest.raises(DataError, match=r"inflates from .* to at least 100 MB"):
        list(read_parquet(path))
    monkeypatch.setattr(bounded_files, "FREE_ROWS", 1000)
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x"] * 100_000}), path)
    with pytest.raises(DataError, match=r"has more than 1,[0-9]{3} rows"):
        list(read_parquet(path))


def test_a_parquet_file_without_columns_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({}), path)
    with pytest.raises(DataError, match=r"has no columns"):
        list(read_parquet(path))


def test_deeply_nested_parquet_columns_are_read_or_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    value = {"a": 1}
    for _ in range(90):
        value = {"a": [value]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([value]), path)
    with suppress(DataError):
        assert list(read_parquet(path)) == [Row(value, f"{path}:row 1")]


@pytest.mark.slow
def test_damage_anywhere_in_a_parquet_file_is_a_data_error(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"prompt": ["a", "b"], "n": [1, 2], "l": [[1], [2, 3]]})
    pyarrow.parquet.write_table(table, path)
    data = bytearray(path.read_bytes())
    for position in range(0, len(data), 7):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[position] ^= flip
            path.write_bytes(damaged)
            with suppress(DataError):
                list(read_parquet(path))


def test_an_error_about_columns_names_the_first_ones(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        ",".join(f"c{i}" for i in range(MAX_COLUMNS)) + "\n" + "," * (MAX_COLUMNS - 1) + "\n"
    )
    columns = read_source(str(path)).columns
    for config in (DataConfig(train="a.csv", columns={"text": "nope"}), DataConfig(train="a.csv")):
        with pytest.raises(DataError, match=r"c0, c1, .*c19 and 9,980 more") as caught:
            ColumnMap(config, columns, "a.csv").task("auto", [])
        assert len(str(caught.value)) < 1500

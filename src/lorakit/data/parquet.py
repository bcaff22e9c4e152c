"""Reader of Parquet files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from lorakit.data.bounded_files import (
    MAX_COLUMNS,
    check_inflated,
    most_rows,
    too_many_columns,
    too_many_rows,
)
from lorakit.data.rows import Row, Rows
from lorakit.errors import DataError


def read_parquet(path: Path) -> Rows:
    """Read the rows of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_declared(file.metadata, file.schema_arrow.names, path)
            batches = (_values(batch, path) for batch in file.iter_batches(batch_size=1024))
            number = 0
            for number, values in enumerate(chain.from_iterable(batches), start=1):
                yield Row(values, f"{path}:row {number}")
            if number != file.metadata.num_rows:
                raise DataError(
                    f"{path}: its footer declares {file.metadata.num_rows:,} rows, but it has {number:,}; "
                    "copy or download it again"
                )
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f"{path}: not a readable Parquet file ({error}); copy or download it again"
        ) from error


def _values(batch: Any, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch of Arrow columns as Python values."""
    names, columns, structs = batch.schema.names, [], lists_of_structs(batch.schema)
    for name, column in zip(names, batch.columns, strict=True):
        try:
            values = column.to_pylist()
            columns.append(list(map(without_nulls, values)) if name in structs else values)
        except (OverflowError, ValueError) as error:
            raise DataError(
                f"{path}: column {name!r} has a value that Python cannot hold ({error}); remove the column, or write "
                "it as text"
            ) from error
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def lists_of_structs(schema: Any) -> set[str]:
    """Return the columns of an Arrow schema that hold lists of structs, such as messages and tools."""
    import pyarrow

    return {
        column.name
        for column in schema
        if isinstance(getattr(column.type, "value_type", None), pyarrow.StructType)
    }


def without_nulls(value: Any) -> Any:
    """Return a value without the members of its objects that are null.

    Arrow gives all structs of a list the same members. In a list of tool calls each call has the arguments of all
    others, as nulls.
    """
    if isinstance(value, dict):
        return {name: without_nulls(x) for name, x in value.items() if x is not None}
    return list(map(without_nulls, value)) if isinstance(value, list) else value


def _check_declared(metadata: Any, columns: list[str], path: Path) -> None:
    """Reject a Parquet file whose footer declares more than a file of its size holds."""
    if not columns:
        raise DataError(f"{path}: has no columns")
    if len(columns) > MAX_COLUMNS:
        raise DataError(f"{path}: {too_many_columns(len(columns))}")
    for name, times in Counter(columns).items():
        if times > 1:
            raise DataError(f"{path}: {times} columns have the name {name!r}; rename all but one")
    if metadata.num_rows > most_rows(path):
        raise too_many_rows(path)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    check_inflated(sum(max(group.total_byte_size, 0) for group in groups), path)

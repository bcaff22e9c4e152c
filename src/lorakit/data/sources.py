"""Read rows from files, the Hugging Face hub or a built-in data set."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lorakit import storage
from lorakit.data import docstrings
from lorakit.data.bounded_files import MAX_COLUMNS
from lorakit.data.parquet import lists_of_structs, without_nulls
from lorakit.data.readers import READERS, reader_for
from lorakit.data.rows import Problem, Row, Rows
from lorakit.errors import DataError, nearest

BUILT_IN: dict[str, Callable[[str], list[dict[str, str]]]] = {"docstrings": docstrings.load}
"""Built-in data sets: name -> function that returns the rows of a split."""

HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?")

MAX_PROBLEMS = 100_000
"""Most unreadable rows of a file."""


@dataclass(frozen=True)
class DataRows:
    """Rows of all files or data sets of a split, in order, with a problem for each unreadable row."""

    name: str
    rows: list[Row | Problem]
    sha256: str
    """Digest of the file's bytes, of several files' digests, or of the rows as JSON."""
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Class names that a hub data set declares, by column."""
    splits: list[str] = field(default_factory=list)
    """Split of each row: its name on the hub, or the file name without suffixes."""

    @property
    def columns(self) -> list[str]:
        """Return the columns of all rows, in order of appearance."""
        names = (name for row in self.rows if isinstance(row, Row) for name in row.values)
        return list(dict.fromkeys(names))


def read_source(where: str | list[str], split: str = "train", limit: int | None = None) -> DataRows:
    """Read at most `limit` rows of `where` (see `DataConfig.train`).

    `split` is the split of a hub or built-in data set, or several joined by a plus. Files ignore it.

    Raises:
        DataError: A file or data set is missing, unreadable or empty.
    """
    entries = [where] if isinstance(where, str) else list(where)
    if not entries or not all(isinstance(entry, str) and entry.strip() for entry in entries):
        raise DataError(f"data is {where!r}; name at least one file or data set")
    parts = []
    for entry in entries:
        with storage.reading(entry, DataError):
            parts += _parts(entry, split)
    for part, count in Counter(part.name for part in parts).items():
        if count > 1:
            raise DataError(
                f"{part} is named {count} times in {where!r}; name it once, or its rows are repeated"
            )
    rows: list[Row | Problem] = []
    splits: list[str] = []
    for part in parts:
        before = len(rows)
        rows += islice(_bounded(part.rows()), None if limit is None else limit - before)
        if len(rows) == before:
            raise DataError(f"{part.name} is empty: it has no rows")
        splits += [part.split] * (len(rows) - before)
        if len(rows) == limit:
            break
    name = ", ".join(entries)
    if not any(isinstance(row, Row) for row in rows):
        raise DataError(
            f"{name}: none of its {len(rows):,} rows can be read; the first problem is {rows[0]}"
        )
    digests = [part.sha256 for part in parts]
    joint_digest = hashlib.sha256("".join(digests).encode()).hexdigest()
    class_names: dict[str, tuple[str, ...]] = {}
    for part in parts:
        for column, names in part.class_names.items():
            class_names[column] = tuple(dict.fromkeys((*class_names.get(column, ()), *names)))
    data = DataRows(
        name=name,
        rows=rows,
        sha256=digests[0] if len(digests) == 1 else joint_digest,
        class_names=class_names,
        splits=splits,
    )
    if len(data.columns) > MAX_COLUMNS:
        raise DataError(
            f"{name}: its rows have {len(data.columns):,} different columns, and the limit is {MAX_COLUMNS:,}; name "
            "the same columns in every row"
        )
    return data


def _bounded(rows: Rows) -> Rows:
    """Yield rows until too many of them are problems: a file of another format can have millions."""
    problems = 0
    for row in rows:
        problems += isinstance(row, Problem)
        if problems > MAX_PROBLEMS:
            raise DataError(
                f"{row}. This is unreadable row {problems:,}, and the limit is {MAX_PROBLEMS:,}; is the suffix that "
                "of the file's format?"
            )
        yield row


def joined(split: str) -> list[str]:
    """Split a name like `a+b` into the names of its splits, as the hub does."""
    return split.split("+")


def stem(file: Path) -> str:
    """Return the file name up to its first dot."""
    return file.name.split(".")[0]


@dataclass(frozen=True)
class _Part:
    """One file, or one split of a data set."""

    name: str
    split: str
    rows: Callable[[], Rows]
    sha256: str
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)


def _parts(entry: str, split: str) -> list[_Part]:
    """Return the files or splits of one entry of `DataConfig.train`; a glob pattern has several."""
    if entry in BUILT_IN:
        values = BUILT_IN[entry](split)
        return [_rows_part(entry, split, lambda: values)]
    path = Path(os.path.expanduser(entry))
    if path.is_file():
        return [_file(path)]
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if reader_for(p))
        raise DataError(
            f"{entry} is a folder; name its files, for example {entry.rstrip('/')}/*.jsonl "
            f"(data files in it: {', '.join(names[:5]) or 'none'})"
        )
    if glob.has_magic(entry):
        found = map(Path, glob.glob(str(path), recursive=True))
        files = sorted(filter(Path.is_file, found))
        if not files:
            raise DataError(f"no file matches {entry}; check the path and the pattern")
        return [_file(file) for file in files]
    if hub := _hub_id(entry):
        return [_hub(hub, part) for part in joined(split)]
    nearby = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
    raise DataError(
        f"there is no file or data set {entry!r}; expected a file ({', '.join(READERS)}), a hub data set "
        f"(owner/name) or a built-in one ({', '.join(BUILT_IN)})."
        + (nearest(path.name, nearby) or nearest(entry, BUILT_IN))
    )


def has_splits(entry: str) -> bool:
    """Return whether an entry of `DataConfig.train` is a data set with splits; a file has none. Reads no file."""
    return entry in BUILT_IN or _hub_id(entry) is not None


def _hub_id(entry: str) -> re.Match[str] | None:
    return HUB_ID.fullmatch(entry) if reader_for(Path(entry)) is None else None


def _file(path: Path) -> _Part:
    reader = reader_for(path)
    if reader is None:
        raise DataError(
            f"{path}: unknown format {path.suffix or '(no suffix)'!r}; data files end in "
            f"{', '.join(READERS)} (text formats also in .gz)"
        )
    return _Part(
        name=str(path),
        split=stem(path),
        rows=lambda: reader(path),
        sha256=storage.sha256(path),
    )


def _hub(hub: re.Match[str], split: str) -> _Part:
    entry, name, config = hub[0], hub["id"], hub["config"]
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{entry}: reading hub data sets needs datasets: pip install datasets"
        ) from None
    try:
        try:
            data = datasets.load_dataset(name, config, split=split, revision=hub["revision"])
        except RuntimeError as error:
            # The hub's Parquet export is of the newest revision.
            if "scripts are no longer supported" not in str(error) or hub["revision"] is not None:
                raise
            # Load that export; the script is not run.
            folder = f"hf://datasets/{name}@refs%2Fconvert%2Fparquet/{config or 'default'}/{split}"
            data = datasets.load_dataset(
                "parquet", data_files={split: f"{folder}/*.parquet"}, split=split
            )
    except Exception as error:  # datasets, the hub and the network raise many types
        raise DataError(
            f"{entry}: the hub data set cannot be loaded, split {split!r} ({type(error).__name__}: {error}). "
            "Check its name (owner/name:config), its splits and the network. A local file, or the folder of a named "
            "task (data.root), needs no network."
        ) from error
    # No task reads media. Decoding them takes long, and their objects have no stable digest.
    media = [name for name, feature in (data.features or {}).items() if _is_media(feature)]
    data = data.remove_columns(media)
    classes = {
        column: tuple(feature.names)
        for column, feature in (data.features or {}).items()
        if isinstance(feature, datasets.ClassLabel)
    }
    structs = lists_of_structs(data.features.arrow_schema) if data.features else ()

    def values() -> Iterator[dict[str, Any]]:
        for row in data:
            # -1 is the hidden label of a test set, or that of a text on which the annotators disagree (SNLI).
            class_of = {
                column: names[row[column]] if 0 <= row[column] < len(names) else None
                for column, names in classes.items()
                if isinstance(row[column], int)
            }
            cleaned = {
                column: without_nulls(value) if column in structs else value
                for column, value in dict(row).items()
            }
            yield {**cleaned, **class_of}

    return _rows_part(entry, split, values, classes)


def _is_media(feature: Any) -> bool:
    """Return whether a feature of `datasets`, or a part of it, is decoded from a file: an image, audio, video ..."""
    if isinstance(feature, dict):
        return any(map(_is_media, feature.values()))
    if isinstance(feature, list):
        return any(map(_is_media, feature))
    inner = getattr(feature, "feature", None)  # of a List
    if inner is not None:
        return _is_media(inner)
    return hasattr(feature, "decode_example") and type(feature).__name__ != "Json"


def _rows_part(
    entry: str,
    split: str,
    values: Callable[[], Iterable[dict[str, Any]]],
    class_names: dict[str, tuple[str, ...]] | None = None,
) -> _Part:
    """Return a part whose rows do not come from a file. Calls `values` twice: for the digest and for the rows."""
    name = f"{entry}[{split}]"

    def rows() -> Rows:
        for number, row in enumerate(values(), start=1):
            yield Row(row, f"{name}:row {number}")

    digest = hashlib.sha256()
    for row in values():
        # default=str: JSON has no dates.
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return _Part(name, split, rows, digest.hexdigest(), class_names or {})

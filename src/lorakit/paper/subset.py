"""Part of a training set, drawn at random once and written down, so that every run sees the same."""

from __future__ import annotations

import json
import random
from pathlib import Path

from lorakit import storage
from lorakit.data import DataConfig
from lorakit.data.readers import Row
from lorakit.data.sources import read_source
from lorakit.errors import DataError

SEED = 0


def write_subset(data: DataConfig, count: int, path: Path) -> int:
    """Write `count` rows of a training set to a file, in random order; of a smaller set, all.

    The draw depends on the data alone: a smaller subset is the beginning of a larger one. A file that is there
    already is left as it is.

    Returns:
        The number of rows in the file.

    Raises:
        DataError: The data cannot be read, or a row of it.
        RunFolderError: The file cannot be written.
    """
    if path.exists():
        with storage.reading(path, DataError):
            return sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line)
    where = data.source("train")
    if where is None:
        raise DataError(f"task {data.task} has no training data")
    source = read_source(where, data.hub_split("train"))
    for row in source.rows:
        if not isinstance(row, Row):
            raise DataError(f"{row}\nMend it before part of {source.name} is drawn")
    rows = [row.values for row in source.rows if isinstance(row, Row)]
    random.Random(SEED).shuffle(rows)
    with storage.atomic_file(path) as temporary:
        lines = (json.dumps(row) + "\n" for row in rows[:count])
        temporary.write_text("".join(lines), encoding="utf-8")
    return min(count, len(rows))

"""Draw a random part of a training set."""

from __future__ import annotations

import random
from typing import Any

from lorakit.data import DataConfig
from lorakit.data.readers import Row
from lorakit.data.sources import read_source
from lorakit.errors import DataError

SEED = 0


def draw_rows(data: DataConfig, count: int) -> list[dict[str, Any]]:
    """Return `count` rows of a training set in random order; all rows of a smaller set.

    The draw depends on the data only, so a smaller subset is the beginning of a larger one.

    Raises:
        DataError: The data or one of its rows cannot be read.
    """
    location = data.source("train")
    if location is None:
        raise DataError(f"Task {data.task} has no training data. Choose another task with --tasks.")
    source = read_source(location, data.hub_split("train"))
    rows = []
    for row in source.rows:
        if not isinstance(row, Row):
            raise DataError(str(row), f"Fix this row: every row of {source.name} must be readable.")
        rows.append(row.values)
    random.Random(SEED).shuffle(rows)
    return rows[:count]

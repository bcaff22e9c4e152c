"""Draw the training data of a table at random, once for all runs."""

from __future__ import annotations

import random
from typing import Any

from lorakit import storage
from lorakit.data import DataConfig
from lorakit.data.rows import Row
from lorakit.data.sources import read_source
from lorakit.errors import DataError
from lorakit.paper.log import GridSetup
from lorakit.paper.paper_config import PaperConfig
from lorakit.paper.runs import HELD_OUT_SHARE
from lorakit.paper.study import StudyData

MOST_HELD_OUT, LEAST_HELD_OUT = 1_000, 200
"""Bounds on the held-out examples that are drawn in addition to limited training data."""
SEED = 0


def draw_training_data(
    config: PaperConfig, data_set: StudyData, setup: GridSetup, *, write: bool = True
) -> None:
    """Draw the training data of a limited grid into the output folder, unless it is there, and set the held-out share.

    Without `write`, only count the rows that would be drawn.
    """
    key = data_set.key
    limits = [limit for limit in (config.limit, data_set.limit) if limit is not None]
    if not limits:
        if data_set.holds_out:
            setup.held_out.setdefault(key, HELD_OUT_SHARE)
        return
    limit = min(limits)
    held_out = min(max(limit, LEAST_HELD_OUT), MOST_HELD_OUT) if data_set.holds_out else 0
    count = limit + held_out
    path = config.drawn_data / f"{data_set.task}-{count}.jsonl"
    if key in setup.rows and (path.exists() or not write):
        return
    data = DataConfig(task=data_set.task, root=config.data.root)
    rows = draw_rows(data, count)
    if write:  # so that every run trains on the same rows
        storage.write_rows(path, rows)
        setup.training[key] = path.name
    if data_set.holds_out:
        # A smaller set supplies `limit` rows as long as a tenth of it can be held out.
        share = max(1 - limit / len(rows), min(held_out / count, HELD_OUT_SHARE))
        setup.held_out.setdefault(key, round(share, 6))
    setup.rows[key] = len(rows) - round(len(rows) * setup.held_out.get(key, 0.0))


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

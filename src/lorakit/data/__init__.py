"""Load files, hub data sets and built-in data sets as examples. Only `batches` and `packing` import torch."""

from __future__ import annotations

from lorakit.data.data_config import DataConfig
from lorakit.data.examples import (
    DataTask,
    ExampleSet,
    RowReader,
    load_examples,
    task_class_of,
    task_of,
)
from lorakit.data.preview import preview

__all__ = [
    "DataConfig",
    "DataTask",
    "ExampleSet",
    "RowReader",
    "load_examples",
    "preview",
    "task_class_of",
    "task_of",
]

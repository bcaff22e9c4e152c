"""Load files, hub data sets and built-in data sets as examples. Only `batches` and `packing` import torch."""

from __future__ import annotations

from lorakit.data.data_config import DataConfig, Split
from lorakit.data.examples import (
    DataTask,
    ExampleSet,
    Report,
    RowReader,
    load_examples,
    task_class_of,
    task_of,
)
from lorakit.data.preview import Preview, preview
from lorakit.data.readers import Problem
from lorakit.data.templates import Template

__all__ = [
    "DataConfig",
    "DataTask",
    "ExampleSet",
    "Preview",
    "Problem",
    "Report",
    "RowReader",
    "Split",
    "Template",
    "load_examples",
    "preview",
    "task_class_of",
    "task_of",
]

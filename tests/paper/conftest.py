from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from made_data import pairs, write

from lorakit.paper.paper_config import PaperConfig
from lorakit.paper.run_table import run_table


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_runs.save_base(tmp_path_factory.mktemp("encoder"), "bert")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write MRPC and RTE with a few synthetic rows, in the layout of data.root."""
    root = tmp_path_factory.mktemp("data")
    for task in ("mrpc", "rte"):
        write(root / task / "train.jsonl", pairs(60, seed=1))
        write(root / task / "validation.jsonl", pairs(20, seed=2))
    return root


@pytest.fixture
def table2(encoder: str, data: Path, tmp_path: Path) -> Callable[..., PaperConfig]:
    """Return a factory of table 2 configurations: two methods on MRPC, each run under a second."""

    def make(**changes: Any) -> PaperConfig:
        settings: dict[str, Any] = {
            "table": "table2",
            "base": {"name": encoder, "dtype": "float32", "device": "cpu"},
            "tasks": ("mrpc",),
            "methods": ("bitfit", "lora"),
            "seeds": 2,
            "trials": 2,
            "epochs": 1,
            "data": {"root": str(data)},
            "output": str(tmp_path / "out"),
        }
        return PaperConfig(**{**settings, **changes})

    return make


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tables that several tests read: only the first of them makes the runs."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def logged_table(table2: Callable[..., PaperConfig], kept: Path) -> PaperConfig:
    """A finished table that keeps a log and no weights."""
    log, output = str(kept / "log"), str(kept / "out")
    config = table2(log=log, output=output, keep_weights=False, limit=30)
    run_table(config, lambda _: None)
    return config


@pytest.fixture(autouse=True)
def _plans(instant_products: None) -> None:
    """Nothing here looks at the times of a plan."""

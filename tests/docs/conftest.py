from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import datasets
import huggingface_hub.constants
import made
import pytest

from lorakit.models.packaged import PackagedModel

PLANNED = {"seconds": 1.0, "tokens_per_second": 1e3, "peak_memory": 5e8, "adapter_bytes": 1e6}
"""Stands for the prediction of every run."""
DEEP = {"docs/guides/what-was-learned.md": 15}
"""Layers of the bases on pages that select a layer by its number; elsewhere two."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Return a folder of tiny models with a number of layers: a cache of the hub, and those with a short name."""

    @cache
    def write(layers: int) -> Path:
        folder = tmp_path_factory.mktemp("models")
        for hub_id, arch in made.HUB.items():
            made.save_to_cache(folder / "hub", hub_id, arch, layers)
        for name, arch in made.PACKAGED.items():
            made.save_base(folder / name, arch, layers)
        return folder

    return write


@pytest.fixture
def reader(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    instant_products: None,
    models: Callable[[int], Path],
) -> Callable[[str], Path]:
    """Enter an empty folder as the reader of a page, with tiny models and data sets under the names of real ones."""

    def enter(page: str) -> Path:
        bases = models(DEEP.get(page, 2))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(bases / "hub"))
        monkeypatch.setattr(PackagedModel, "path", lambda model: bases / model.alias)
        monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
        # Every run would be planned, and METEOR would start Java: tests of the command and of metrics do.
        monkeypatch.setattr("lorakit.cli.train._planned", lambda *_: ("planned  not here", PLANNED))
        monkeypatch.setattr("lorakit.metrics.data_to_text.find_java", lambda _: None)
        # On a CPU with bfloat16 the analyses of the float32 bases print one note more.
        monkeypatch.setattr("lorakit.models.dtypes._cpu_multiplies_bfloat16", lambda: False)
        monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
        folder = tmp_path / "reader"
        folder.mkdir()
        monkeypatch.chdir(folder)
        return folder

    return enter

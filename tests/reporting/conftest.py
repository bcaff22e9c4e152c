"""Fixtures: a run, an unfinished run and a browser."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_runs
from browser import HOSTILE

from lorakit.training.config import HeldOutConfig
from lorakit.training.loop import train


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny model, with samples that include a hostile prompt."""
    folder = tmp_path_factory.mktemp("reports")
    base = tiny_runs.save_base(folder / "base", max_position_embeddings=256)
    hostile = {"prompt": HOSTILE, "completion": f" {HOSTILE}"}
    tiny_runs.write_rows(folder / "train.jsonl", tiny_runs.pairs(72))
    rows = [hostile, *tiny_runs.pairs(11, seed=1)]
    tiny_runs.write_rows(folder / "validation.jsonl", rows)
    config = tiny_runs.config(
        folder,
        base,
        output=str(folder / "first"),
        max_steps=44,
        evaluation=HeldOutConfig(every=11, samples=4, max_new_tokens=6),
    )
    return train(config).folder


@pytest.fixture(scope="session")
def unfinished(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run after 20 steps, with its last line still being written."""
    folder = tmp_path_factory.mktemp("unfinished") / "<i>second"
    folder.mkdir()
    for name in ("config.yaml", "environment.json", "samples.jsonl"):
        shutil.copy(run / name, folder / name)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    early = [line for line in lines if int(line.split(",")[0].split(":")[1]) <= 20]
    (folder / "metrics.jsonl").write_text("".join(early) + '{"step": 21, "spl')
    return folder

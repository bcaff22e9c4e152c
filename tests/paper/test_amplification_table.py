"""Table 7: its numbers equal `lorakit analyze amplification` on the adapters of its runs."""

from __future__ import annotations

import pytest
from made_data import pairs, write

from lorakit.analysis import adapter_amplification
from lorakit.analysis.base_weights import open_weights
from lorakit.analysis.deltas import read
from lorakit.cli.paper import _amplification
from lorakit.paper.run_table import run_table


@pytest.mark.slow
def test_a_row_is_the_amplification_of_the_query_in_the_middle(table2, tmp_path):
    rows = [
        {
            "premise": r["sentence1"],
            "hypothesis": r["sentence2"],
            "label": r["idx"] % 3,
            "idx": r["idx"],
        }
        for r in pairs(30, seed=3)
    ]
    write(tmp_path / "data" / "mnli" / "train.jsonl", rows)
    write(tmp_path / "data" / "mnli" / "validation_matched.jsonl", rows[:8])
    config = table2(
        table="table7",
        tasks=None,
        methods=("r4",),
        seeds=1,
        trials=1,
        data={"root": str(tmp_path / "data")},
    )
    found = run_table(config, lambda text: None, amplification=_amplification)
    (row,) = found.comparison.own
    (best,) = config.folder.glob("runs/mnli/r4/*/best")
    stored = read(best)
    layers = adapter_amplification(stored, open_weights(config.base, stored), only="query").layers
    middle = list(layers.values())[len(layers) // 2 - 1]
    assert row.cells["norm of ΔW"].value == pytest.approx(middle.change_norm)
    assert row.cells["amplification"].value == pytest.approx(middle.factor)
    (published,) = found.comparison.published
    assert published.cells["amplification"].text == "21.5"

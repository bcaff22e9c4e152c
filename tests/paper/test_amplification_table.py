"""Table 7: its numbers equal `lorakit analyze amplification` on the adapters of its runs."""

from __future__ import annotations

import pytest
import tiny_runs
import torch
from made_data import pairs, write

from lorakit import LoRA, attach
from lorakit.analysis import adapter_amplification, table7_row
from lorakit.analysis.base_weights import open_weights
from lorakit.analysis.deltas import read
from lorakit.errors import ConfigurationError
from lorakit.models.base_config import BaseConfig
from lorakit.models.loading import load_base
from lorakit.paper.reproduction import reproduce
from lorakit.paper.run_table import run_table


@pytest.mark.parametrize(
    ("arch", "layers", "middle"),
    [
        ("gpt2", "n_layer", "transformer.h.1.attn.c_attn rows 0:32"),
        ("gpt-neox", "num_hidden_layers", "gpt_neox.layers.1.attention.query_key_value rows 0:8 of every 24"),
        ("mpnet", "num_hidden_layers", "mpnet.encoder.layer.1.attention.attn.q"),
    ],
)  # fmt: skip
def test_the_query_of_the_middle_block_is_found_by_its_role(tmp_path, arch, layers, middle):
    config = BaseConfig(name=tiny_runs.save_base(tmp_path / arch, arch, **{layers: 4}))
    base = load_base(config.name, task="sequence-classification", num_labels=3, dtype="float32")
    adapters = attach(base.model, LoRA(rank=2, targets=("attention.qv",)), name="a")
    for parameter in adapters.trainable_parameters("a"):
        torch.nn.init.normal_(parameter)
    adapters.save(tmp_path / "adapter")
    stored = read(tmp_path / "adapter")
    expected = adapter_amplification(stored, open_weights(config, stored)).layers[middle]
    found = table7_row(tmp_path / "adapter", config)
    assert found["amplification"] == pytest.approx(expected.factor)
    assert found["norm of ΔW"] == pytest.approx(expected.change_norm)


@pytest.mark.parametrize("reproduce_or_run", [run_table, reproduce])
def test_the_measure_is_required_before_anything_is_trained(table2, reproduce_or_run):
    config = table2(table="table7", tasks=None, methods=("r4",), seeds=1, trials=1)
    with pytest.raises(
        ConfigurationError,
        match=r"is not set.* lorakit\.analysis\.table7_row.* lorakit paper table7",
    ):
        reproduce_or_run(config, lambda text: None)
    assert not config.folder.exists()


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
    found = run_table(config, lambda text: None, amplification=table7_row)
    (row,) = found.comparison.own
    (best,) = config.folder.glob("runs/mnli/r4/*/best")
    stored = read(best)
    layers = adapter_amplification(stored, open_weights(config.base, stored), only="query").layers
    middle = list(layers.values())[len(layers) // 2 - 1]
    assert row.cells["norm of ΔW"].value == pytest.approx(middle.change_norm)
    assert row.cells["amplification"].value == pytest.approx(middle.factor)
    (published,) = found.comparison.published
    assert published.cells["amplification"].text == "21.5"

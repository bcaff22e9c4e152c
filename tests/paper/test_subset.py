"""Random subsets of a training set: nested, deterministic and drawn once for all runs."""

import json
from dataclasses import replace

import pytest

from lorakit import load_base
from lorakit.cli.paper import _predicted
from lorakit.data import DataConfig, load_examples
from lorakit.errors import DataError
from lorakit.paper.comparison import compare
from lorakit.paper.grid import open_grid, preview
from lorakit.paper.log import GridSetup
from lorakit.paper.report import markdown
from lorakit.paper.subset import draw_rows, draw_training_data


def test_a_smaller_draw_is_the_beginning_of_a_larger_one(data):
    config = DataConfig(task="mrpc", root=str(data))
    drawn = draw_rows(config, 30)
    assert drawn[:10] == draw_rows(config, 10)
    lines = (data / "mrpc" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    whole = [json.loads(line) for line in lines]
    assert all(row in whole for row in drawn)
    assert len({row["idx"] for row in drawn}) == 30
    assert [row["idx"] for row in drawn] != sorted(row["idx"] for row in drawn)


def test_of_a_smaller_set_all_rows_are_drawn(data):
    assert len(draw_rows(DataConfig(task="mrpc", root=str(data)), 1000)) == 60


@pytest.mark.parametrize(("limit", "trained"), [(50, 50), (57, 54), (500, 54)])
def test_a_limit_near_the_size_of_the_set_is_kept_and_told(table2, data, limit, trained):
    """Of 60 rows, at least a tenth is held out."""
    config = table2(limit=limit, methods=("lora",))
    with open_grid(config, lambda _: None) as grid:
        ((data_set, variant),) = grid.cells()
        settings = grid.runner.train_config(grid.trials(data_set, variant)[0]).data
        tokenizer = load_base(
            config.base.name, task="sequence-classification", num_labels=2
        ).tokenizer
        assert len(load_examples(settings, "train", tokenizer)) == trained
        page = markdown(compare(grid))
    assert f"train on the same rows, drawn at random once: {trained} of mrpc." in page
    planned = preview(replace(config, output=f"{config.output}-new")).setup
    assert (planned.rows, planned.held_out) == (grid.setup.rows, grid.setup.held_out)


def test_a_log_keeps_its_held_out_share(table2):
    config = table2(limit=50, methods=("lora",))
    setup = GridSetup(held_out={"mrpc": 0.1}, training={"mrpc": "mrpc-250.jsonl"})
    draw_training_data(config, config.study.data_sets[0], setup)
    assert (setup.held_out, setup.rows) == ({"mrpc": 0.1}, {"mrpc": 54})


@pytest.mark.slow
def test_a_dry_run_predicts_the_steps_of_a_set_smaller_than_the_limit(table2):
    grid = preview(table2(limit=500, epochs=3, methods=("lora",)))
    assert _predicted(grid, *next(grid.cells()))[0] == str(3 * 4)  # 54 rows, in batches of 16


def test_a_row_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "mrpc").mkdir()
    (tmp_path / "mrpc" / "train.jsonl").write_text('{"a": 1}\nnot json\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"train.jsonl:2.*not valid JSON"):
        draw_rows(DataConfig(task="mrpc", root=str(tmp_path)), 5)

"""A budget: the same steps for every method, computed once and kept by a resumed grid."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny_runs
from made_data import write

from lorakit import storage
from lorakit.errors import ConfigurationError, RunFolderError
from lorakit.evaluation.decoding import Decoding
from lorakit.models.base_config import BaseConfig
from lorakit.paper import budget
from lorakit.paper import grid as grid_module
from lorakit.paper.grid import open_grid
from lorakit.paper.log import GRID, GridSetup
from lorakit.paper.paper_config import PaperConfig, PaperDataConfig
from lorakit.paper.run_table import run_table
from lorakit.paper.runs import Runner


def silent(text: str) -> None:
    """Discard progress."""


def test_steps_are_settled_once_and_the_same_for_every_method(table2, tmp_path, monkeypatch):
    config = table2(budget="60s", epochs=None, seeds=1, trials=1)
    with open_grid(config, silent) as grid:
        steps = dict(grid.setup.steps)
        runs = [grid.trials(*cell)[0] for cell in grid.cells()]
        assert {grid.runner.train_config(run).max_steps for run in runs} == {steps["mrpc"]}
    assert steps["mrpc"] >= budget.FEWEST
    monkeypatch.setattr(budget, "_time", lambda *a: pytest.fail("timed again"))
    with open_grid(config, silent) as grid:
        assert grid.setup.steps == steps
    written = storage.read_record(tmp_path / "out" / GRID, RunFolderError)
    assert written["plan"]["timing"]["mrpc"]["methods"].keys() == {"bitfit", "lora"}
    assert not (tmp_path / "out" / "timing").exists()
    with (
        pytest.raises(ConfigurationError, match="seeds was 1 and is 2"),
        open_grid(table2(budget="60s", epochs=None, seeds=2, trials=1), silent),
    ):
        pass


def timed(step: float, held_out: int = 0, most: int | None = None) -> dict:
    return {
        "methods": {
            "bitfit": {"step": step, "overhead": 2.0},
            "lora": {"step": 2 * step, "overhead": 2.0},
        },
        "scoring": 1.0,
        "held_out": held_out,
        "most_steps": most,
    }


def divided(monkeypatch, config, timing, seconds):
    cells = [(d, v) for d in config.study.data_sets for v in config.study.variants]
    monkeypatch.setattr(budget, "_time", lambda runner, data_set, *rest: timing[data_set.key])
    return budget.divide(seconds, SimpleNamespace(config=config), cells, silent)[0]


def test_the_planned_time_is_that_of_the_budget(table2, monkeypatch):
    config = table2(tasks=("mrpc", "rte"), seeds=2, trials=3, batch_size=20)
    timing = {"mrpc": timed(0.1, held_out=300), "rte": timed(0.2)}
    # Five evaluations of 300 examples in batches of 20, each batch at a third of a step's time.
    evaluations = {"mrpc": 25, "rte": 0}
    steps = divided(monkeypatch, config, timing, 1000)
    for key, measured in timing.items():
        runs = 4  # three rates with the first seed, and one run with the second
        took = sum(
            runs * (cost["overhead"] + (steps[key] + evaluations[key]) * cost["step"])
            + 2 * measured["scoring"]
            for cost in measured["methods"].values()
        )
        assert took == pytest.approx(budget.RESERVE * 1000 / 2, rel=0.01)


def test_methods_are_timed_on_one_data_set_and_scaled_on_the_others(table2, monkeypatch):
    config = table2(tasks=("mrpc", "rte"), seeds=1, trials=1)
    cells = [(d, v) for d in config.study.data_sets for v in config.study.variants]
    asked = []

    def time(runner, data_set, variants):
        asked.append((data_set.key, [variant.key for variant in variants]))
        costs = {"bitfit": {"step": 0.1, "overhead": 2.0}, "lora": {"step": 0.3, "overhead": 4.0}}
        slower = 2 if data_set.key == "rte" else 1
        methods = {
            v.key: {name: slower * cost for name, cost in costs[v.key].items()} for v in variants
        }
        return {"methods": methods, "scoring": 1.0, "held_out": 0, "most_steps": None}

    monkeypatch.setattr(budget, "_time", time)
    _, timing = budget.divide(1000, SimpleNamespace(config=config), cells, silent)
    assert asked == [("mrpc", ["bitfit", "lora"]), ("rte", ["bitfit"])]
    assert timing["rte"]["methods"]["lora"] == pytest.approx({"step": 0.6, "overhead": 8.0})


def test_epochs_cap_what_a_budget_gives(table2, monkeypatch):
    config = table2(seeds=1, trials=1)
    assert divided(monkeypatch, config, {"mrpc": timed(0.01, most=50)}, 1000) == {"mrpc": 50}


@pytest.mark.slow
def test_a_row_with_several_texts_counts_as_several_examples(tmp_path, monkeypatch):
    texts = {"text": ["A is B.", "B is what A is.", "It is A that is B."], "comment": ["good"] * 3}
    for split, count in (("train", 20), ("validation", 4), ("test", 4)):
        rows = [
            {"category": "City", "modified_triple_sets": {"mtriple_set": [[f"A{i} | is | B"]]}}
            for i in range(count)
        ]
        write(tmp_path / "webnlg" / f"{split}.jsonl", [{**row, "lex": texts} for row in rows])
    config = PaperConfig(
        table="table14",
        base=BaseConfig(name=tiny_runs.save_base(tmp_path / "base"), dtype="float32", device="cpu"),
        methods=("lora",),
        epochs=2,
        batch_size=4,
        data=PaperDataConfig(root=str(tmp_path)),
        output=str(tmp_path / "out"),
    )
    monkeypatch.setattr(budget, "evaluate", lambda _: None)
    ((data_set,), variants) = config.study.data_sets, config.study.variants
    measured = budget._time(Runner(config, GridSetup()), data_set, variants)
    assert (measured["most_steps"], measured["held_out"]) == (2 * 20 * 3 // 4, 4 * 3)


def test_a_budget_that_is_too_small_says_what_would_do(table2, monkeypatch):
    config = table2(budget="30s", seeds=1, trials=1)
    with pytest.raises(
        ConfigurationError, match=r"30s is too small for 2 runs.*would take about \d+m"
    ):
        divided(monkeypatch, config, {"mrpc": timed(1.0)}, 30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "ten minutes"}, "write a number of seconds, minutes or hours"),
        ({"budget": "0m"}, "budget is '0m'"),
        ({"table": "table22"}, "table is 'table22'.*Did you mean 'table2'"),
        ({"trials": 9}, "at most 7 learning rates"),
        ({"seeds": 0}, "seeds is 0"),
        ({"limit": 3}, "limit is 3"),
        ({"methods": ("lorra",)}, "Did you mean 'lora'"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        PaperConfig(**{"table": "table2", **changes})


def test_the_command_says_what_was_asked_for():
    config = PaperConfig(
        table="2",
        tasks=("mrpc", "rte"),
        seeds=1,
        budget="10m",
        data=PaperDataConfig(root="/home/me/data"),
    )
    expected = "lorakit paper table2 --tasks mrpc,rte --seeds 1 --budget 10m --data.root DATA"
    assert config.command == expected
    assert json.loads(json.dumps(config.seconds)) == 600


def test_the_command_can_be_pasted_and_holds_what_numbers_depend_on():
    config = PaperConfig(
        table="2",
        base=BaseConfig(name="my models/x", dtype="float32", device="cpu"),
        decoding=Decoding(beams=1),
        batch_size=8,
        output="/tmp/x",
    )
    options = "--base.name 'my models/x' --base.dtype float32 --decoding.beams 1 --batch_size 8"
    assert config.command == f"lorakit paper table2 {options}"


@pytest.mark.parametrize("budget", [None, "10m"])
def test_a_grid_none_of_whose_methods_fits_says_why(table2, monkeypatch, budget):
    def refusing(model, method):
        raise ConfigurationError("it has no biases")

    monkeypatch.setattr(grid_module, "count_parameters", refusing)
    with pytest.raises(ConfigurationError, match=r"No method.*bitfit: it has no biases.*--methods"):
        run_table(table2(methods=("bitfit",), budget=budget), silent)

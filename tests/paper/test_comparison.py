"""What a page says about the seeds of a cell, from made records."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import RunFolderError
from lorakit.paper.comparison import Comparison, _published_difference, compare
from lorakit.paper.figures import comparison_figure, table_page
from lorakit.paper.grid import Grid
from lorakit.paper.log import GridSetup, ParameterCount
from lorakit.paper.paper_config import PaperConfig
from lorakit.paper.record import Record, recorded_settings
from lorakit.paper.report import markdown
from lorakit.paper.runs import TableRun
from lorakit.paper.studies import STUDIES


@pytest.fixture
def compared(tmp_path: Path) -> Callable[..., Comparison]:
    """Return a function that compares methods on MRPC, with given accuracies by seed, or on another data set."""

    def make(
        values: Mapping[str, Sequence[float]],
        *,
        table: str = "table2",
        task: str = "mrpc",
        score: str = "accuracy",
        **changes: Any,
    ) -> Comparison:
        config = PaperConfig(
            table=table,
            tasks=(task,),
            methods=tuple(values),
            seeds=len(values["lora"]),
            output=str(tmp_path),
            **changes,
        )
        counts = {method: ParameterCount(trained=1) for method in values}
        grid = Grid(config, GridSetup(counts={task: counts}))
        for data_set, variant in grid.cells():
            for run in grid.trials(data_set, variant):
                grid.runner._write(run, _record(run, {}))
            for run in grid.scored_runs(data_set, variant):
                scores = {score: values[variant.key][run.seed]}
                grid.runner._write(run, _record(run, scores))
        return compare(grid)

    return make


def _record(run: TableRun, scores: dict[str, float]) -> Record:
    return Record(
        data_set=run.data_set.key,
        variant=run.variant.key,
        rate=run.rate,
        seed=run.seed,
        held_out={run.data_set.metric: 0.5},
        scores=scores,
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trials": 1}, None),
        ({"trials": 3, "epochs": 2, "trial_epochs": 1}, None),
        ({"trials": 3}, "The scored runs also chose the learning rate,"),
        ({"trials": 3, "budget": "1h"}, "The run with seed 0 also chose the learning rate,"),
    ],
)
def test_a_page_tells_which_scores_also_chose_the_rate(compared, changes, told):
    accuracies = {"full": [0.79, 0.78, 0.76], "lora": [0.79, 0.73, 0.75]}
    page = markdown(compared(accuracies, **changes))
    (note,) = [line for line in page.splitlines() if "also chose" in line] or [None]
    if told is None:
        assert note is None
    else:
        assert note.startswith(f"- {told}")
        assert note.endswith("Means of the other seeds: FT 77.0 on MRPC, LoRA 74.0 on MRPC.")


def test_one_other_seed_has_no_mean(compared):
    page = markdown(compared({"lora": [0.79, 0.73]}, trials=3))
    assert "most of all that of seed 0, with which every rate was tried.\n" in page


@pytest.mark.parametrize(
    ("lora", "interval", "verdict"),
    [
        ([0.79, 0.77], None, "open"),  # both are 0.01 above: two equal differences prove nothing
        ([0.78, 0.76], (0.0, 0.0), "undecided"),
        ([0.88, 0.8601], (9.9463, 10.0737), "ahead"),
    ],
)
def test_equal_differences_give_no_verdict(compared, lora, interval, verdict):
    (difference,) = compared({"full": [0.78, 0.76], "lora": lora}).differences
    assert difference.verdict == verdict
    assert difference.interval == (interval and pytest.approx(interval, abs=0.2))


@pytest.mark.parametrize(
    ("table", "task", "score", "column", "published"),
    [
        ("table13", "dart", "TER", "TER", 0.10),
        ("table14", "webnlg", "TER unseen", "TER U", 0.53),
        ("table14", "webnlg", "TER seen", "TER S", 0.16),
        ("table14", "webnlg", "TER", "TER A", 0.33),
    ],
)
def test_a_lower_edit_rate_is_ahead(compared, table, task, score, column, published):
    rates = {"full-top2": [0.50, 0.53], "lora": [0.40, 0.42]}
    (difference,) = compared(rates, table=table, task=task, score=score).differences
    assert (difference.column, difference.verdict) == (column, "ahead")
    assert difference.value == pytest.approx(0.105)
    assert difference.published == ("gpt2-medium", pytest.approx(published))


def test_the_figure_has_the_published_spreads(compared):
    figure = comparison_figure(compared({"lora": [0.78, 0.76]}))
    assert figure is not None
    spreads = {
        value["label"].split(", trained")[0]: value["high"] - value["low"]
        for value in figure.charts[0].spec["data"]["values"]
        if value["hollow"]
    }
    assert spreads["roberta-base, LoRA"] == pytest.approx(2 * 0.7)
    assert spreads["roberta-base, FT*"] == 0  # the paper prints none


@pytest.mark.parametrize(("others", "told"), [(("full",), False), (("full", "bitfit"), True)])
def test_several_intervals_are_counted(compared, others, told):
    """One of many intervals excludes zero by chance."""
    comparison = compared({**{key: [0.78, 0.76] for key in others}, "lora": [0.88, 0.8601]})
    note = "at least one would exclude zero with a chance of up to 10 %."
    assert (note in markdown(comparison)) == told
    assert any(note in line for line in table_page(comparison).summary) == told


@pytest.mark.parametrize(
    ("tasks", "averages", "noted"),
    [
        (None, {"AdapterD*": "85.4", "LoRA": "87.2"}, False),
        (("mrpc", "rte"), {"LoRA": "88.2"}, True),
    ],
)
def test_the_published_average_is_as_printed_or_noted(tmp_path, tasks, averages, noted):
    config = PaperConfig(
        table="table2", tasks=tasks, methods=("full", "lora"), output=str(tmp_path)
    )
    count = ParameterCount(trained=1)
    counts = {d.key: {"full": count, "lora": count} for d in config.study.data_sets}
    comparison = compare(Grid(config, GridSetup(counts=counts)))
    found = {row.label: str(row.cells["Avg"]) for row in comparison.published[:5]}
    assert averages.items() <= found.items()
    page = markdown(comparison)
    assert ("- Avg of a published row is the mean of the columns shown here" in page) == noted


@pytest.mark.parametrize(
    ("source", "target", "told"),
    [
        (
            "lora/rate-0.0005-seed-0",
            "lora/rate-0.0005-seed-1",
            "mrpc/lora with rate 0.0005 and seed 0",
        ),
        (
            "full/rate-5e-05-seed-0",
            "lora/rate-0.0005-seed-0",
            "mrpc/full with rate 5e-05 and seed 0",
        ),
    ],
)
def test_a_record_of_another_run_is_refused(compared, tmp_path, source, target, told):
    grid = compared({"full": [0.78, 0.76], "lora": [0.75, 0.73]}).grid
    folder = tmp_path / "runs" / "mrpc"
    shutil.copy(folder / f"{source}.json", folder / f"{target}.json")
    with pytest.raises(RunFolderError, match=f"{target}.json' holds the record of {told}"):
        compare(grid)


@pytest.mark.parametrize(
    ("table", "method", "column", "difference"),
    [
        ("table2", "adapter_h", "RTE", 85.2 - 72.9),  # the rows with 0.8M parameters
        ("table2", "adapter_p", "RTE", 85.2 - 80.1),
        ("table2", "full", "RTE", 86.6 - 78.7),
        ("table4", "adapter_h", "WikiSQL", 73.4 - 71.9),
        ("table4", "adapter_h-8", "WikiSQL", 73.4 - 73.2),
        ("table3", "adapter_l", "BLEU", 70.4 - 66.3),
    ],
)
def test_the_published_difference_is_that_of_the_same_size(table, method, column, difference):
    study = STUDIES[table]
    (variant,) = [variant for variant in study.variants if variant.key == method]
    found = _published_difference(study.table.rows, variant, column, 1)
    assert found is not None
    assert found[1] == pytest.approx(difference)


@pytest.mark.parametrize("table", STUDIES)
def test_every_published_size_is_in_its_table(table):
    study = STUDIES[table]
    printed = {(row.method, row.parameters) for row in study.table.rows}
    assert {(v.method, v.published) for v in study.variants if v.published} <= printed


def _lines(right: int, count: int = 100) -> dict[str, list[str]]:
    return {"accuracy": [" ".join(["1"] * right + ["0"] * (count - right)), " ".join("1" * count)]}


@pytest.fixture
def with_sums(compared, tmp_path: Path) -> Callable[..., Comparison]:
    """Return a function that compares one seed of full fine-tuning and LoRA, with sums in the records."""

    def make(full: dict[str, list[str]] | None = None, **lora: Any) -> Comparison:
        grid = compared({"full": [0.6], "lora": [0.75]}).grid
        for data_set, variant in grid.cells():
            for run in grid.scored_runs(data_set, variant):
                record = grid.runner.record(run)
                changes: dict[str, Any] = {"scored": "a", "sums": full or _lines(60)}
                if variant.key == "lora":
                    changes = {"scored": "a", "sums": _lines(75), **lora}
                grid.runner._write(run, replace(record, **changes))
        return compare(grid)

    return make


def test_one_seed_has_an_interval_over_the_examples(with_sums):
    comparison = with_sums()
    (difference,) = comparison.differences
    low, high = difference.over_examples
    # LoRA is right where full fine-tuning is, and on 15 examples of 100 more.
    assert low == pytest.approx(15 - 1.96 * 100 * (0.15 * 0.85 / 100) ** 0.5, abs=1)
    assert high == pytest.approx(15 + 1.96 * 100 * (0.15 * 0.85 / 100) ** 0.5, abs=1)
    assert (difference.interval, difference.verdict) == (None, "open")
    page = markdown(comparison)
    assert f"| FT | +15.0 {{{low:+.1f}, {high:+.1f}}} (paper" in page
    assert "In braces is the 95 % interval" in page
    assert "In square brackets" not in page
    (table,) = table_page(comparison).sections[1].blocks
    assert f"{low:+.1f} to {high:+.1f}" in table.rows[0]


@pytest.mark.parametrize("lora", [{"scored": "b"}, {"sums": {}}])
def test_runs_that_scored_other_examples_have_no_such_interval(with_sums, lora):
    (difference,) = with_sums(**lora).differences
    assert difference.over_examples is None


@pytest.mark.parametrize(
    ("full", "lora"),
    [(_lines(0, 1), _lines(1, 1)), (_lines(1, 1), _lines(1, 1)), (_lines(0), _lines(100))],
)
def test_an_interval_of_width_zero_is_none(with_sums, full, lora):
    (difference,) = with_sums(full, sums=lora).differences
    assert difference.over_examples is None


@pytest.mark.parametrize("lines", [["1 0"], ["1 0", "1"], ["1 x", "1 1"], []])
def test_damaged_sums_are_refused(with_sums, lines):
    with pytest.raises(
        RunFolderError, match=r"mrpc/lora with rate .* is damaged: sums.accuracy: .* Restore"
    ):
        with_sums(sums={"accuracy": lines})


def test_sums_of_other_numbers_of_examples_are_refused(with_sums):
    with pytest.raises(RunFolderError, match=r"A record of mrpc is damaged: .* sums.accuracy"):
        with_sums(sums=_lines(75, 90))


def test_the_page_has_the_settings_of_both_methods_of_a_combination(tmp_path):
    key = "lora+pe-8"
    config = PaperConfig(
        table="table15", tasks=("mnli",), methods=(key,), seeds=1, output=str(tmp_path)
    )
    counts = {"mnli": {key: ParameterCount(trained=1)}}
    grid = Grid(config, GridSetup(counts=counts))
    ((data_set, variant),) = grid.cells()
    for run in grid.trials(data_set, variant):
        settings = recorded_settings(grid.runner.train_config(run))
        assert settings["lora.targets"] == ["attention.qv"]
        assert settings["lora.init"] == "kaiming"
        grid.runner._write(run, replace(_record(run, {"accuracy": 0.5}), settings=settings))
    page = markdown(compare(grid))
    (line,) = [line for line in page.splitlines() if line.startswith("- Settings of LoRA+PE")]
    assert "lora.rank 8, " in line
    assert "lora.dropout 0.0" in line
    assert "prefix_embedding.prefix_length 8" in line


def test_the_page_says_how_every_run_is_trained(compared):
    page = markdown(compared({"lora": [0.75]}))
    assert "after a warm-up over 6 % of the steps" in page
    assert "truncated to 128 tokens on mrpc." in page


@pytest.mark.parametrize("limit", [None, 100])
def test_the_commonest_class_is_that_of_all_examples(compared, limit):
    page = markdown(compared({"lora": [0.75]}, eval_limit=limit))
    assert ("commonest class scores 68.4 on MRPC" in page) == (limit is None)

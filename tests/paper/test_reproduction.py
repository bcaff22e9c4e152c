"""A row of a log is repeated with its recorded settings, and compared score by score."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lorakit import storage
from lorakit.cli import main
from lorakit.errors import ConfigurationError, RunFolderError
from lorakit.models.base_config import BaseConfig
from lorakit.paper import runs
from lorakit.paper.log import GRID
from lorakit.paper.paper_config import PaperConfig
from lorakit.paper.record import Record
from lorakit.paper.reproduction import (
    RepeatedScore,
    Reproduction,
    _compared,
    _differences,
    _recorded,
    reproduce,
    spread_of,
)
from lorakit.paper.run_table import run_table
from lorakit.paper.runs import TableRun
from lorakit.paper.studies import STUDIES

LOGS = Path(__file__).parents[2] / "docs" / "results" / "runs"


def silent(text: str) -> None:
    """Discard progress."""


@pytest.fixture
def logged(logged_table, tmp_path):
    """A copy of the log of a finished table, and the call that repeats one of its rows."""
    shutil.copytree(logged_table.log_folder, tmp_path / "log")

    def call(row: str, **changes) -> PaperConfig:
        # Only the table, the log and the place of the data are named; all else is recorded.
        return PaperConfig(
            table="table2",
            log=str(tmp_path / "log"),
            reproduce=row,
            data=logged_table.data,
            output=str(tmp_path / "again"),
            **changes,
        )

    return call


@pytest.mark.slow
def test_the_same_machine_gives_equal_scores(logged, tmp_path):
    result = reproduce(logged("mrpc/lora"), silent)
    assert not result.differences
    assert {score.verdict for score in result.scores} == {"equal"}
    assert len({score.run for score in result.scores}) == 2
    one = reproduce(logged("mrpc/bitfit/1"), silent)
    assert {score.run.rpartition("-")[2] for score in one.scores} == {"1"}


@pytest.mark.slow
def test_a_record_says_what_was_scored_and_how_each_example_was_answered(logged, tmp_path):
    data = Path(logged("mrpc/lora").data.root or "") / "mrpc" / "validation.jsonl"
    gold = [json.loads(line)["label"] for line in data.read_text().splitlines()]
    for path in (tmp_path / "log" / "runs" / "mrpc" / "lora").glob("*.json"):
        record = storage.read_record(path, RunFolderError)
        if not record["scores"]:
            continue  # a rate that was not chosen
        assert record["scored"] == storage.sha256(data)
        right, ones = record["sums"]["accuracy"]
        assert len(right.split()) == len(gold)
        assert {*ones.split()} == {"1"}
        assert record["scores"]["accuracy"] == right.split().count("1") / len(gold)
        assert record["settings"]["lora.rank"] == 8
        assert record["settings"]["optimizer.weight_decay"] == 0.0


@pytest.mark.slow
def test_a_repetition_counts_for_the_conditions_under_which_it_was_made(
    logged, tmp_path, monkeypatch
):
    call = logged("mrpc/bitfit/1")
    first = reproduce(call, silent)
    monkeypatch.setattr(runs, "train", lambda config: pytest.fail("trained again"))
    assert reproduce(call, silent) == first
    (path,) = (tmp_path / "again" / "runs" / "mrpc" / "bitfit").glob("*.json")
    made = storage.read_record(path, RunFolderError)
    for changes, told in (
        ({"source": "abc"}, "source files of lorakit: abc, here"),
        ({"versions": {**made["versions"], "torch": "1.0"}}, "torch: 1.0, here 2"),
        ({"inputs": {**made["inputs"], "train data": "abc"}}, "train data: other content"),
        ({"threads": [99]}, "threads: 99, here"),
    ):
        storage.write_record(path, {**made, **changes})
        with pytest.raises(ConfigurationError, match=f"made under other conditions: {told}"):
            reproduce(call, silent)


@pytest.mark.slow
def test_a_log_with_a_budget_and_the_default_dtype(table2, tmp_path):
    """The log fixes dtype and steps; a row is a part of its methods."""
    base = BaseConfig(name=table2().base.name, device="cpu")  # dtype auto
    config = table2(base=base, methods=("lora", "full"), seeds=1, trials=1, budget="10m", epochs=1)
    run_table(replace(config, log=str(tmp_path / "log")), silent)
    call = PaperConfig(
        table="table2",
        log=str(tmp_path / "log"),
        reproduce="mrpc/lora/0",
        data=config.data,
        output=str(tmp_path / "again"),
    )
    assert reproduce(call, silent).holds


def test_equal_conditions_require_equal_scores():
    def score(repeated):
        return RepeatedScore(run="", score="", recorded=0.75, repeated=repeated, spread=None)

    assert Reproduction(scores=(score(0.75),), differences=()).holds
    assert not Reproduction(scores=(score(0.75), score(0.76)), differences=()).holds
    assert Reproduction(scores=(score(0.76),), differences=("processor",)).holds
    assert not Reproduction(scores=(score(float("nan")),), differences=("processor",)).holds


RECORD = Record(
    data_set="mrpc",
    variant="lora",
    rate=1e-3,
    seed=0,
    processor="EPYC",
    device="cpu (AVX512)",
    threads=[2],
    source="abc",
)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"threads": [3]}, "threads: 3, here 2"),
        ({"threads": []}, "threads: not recorded, here 2"),
        ({"device": "cpu (AVX2)"}, "device: cpu (AVX2), here cpu (AVX512)"),
        ({"scored": "def"}, "scored data: other content than recorded"),
        ({"source": ""}, "source files of lorakit: not recorded, here abc"),
    ],
)
def test_what_differs_is_told(changes, told):
    assert not list(_differences(RECORD, RECORD, ()))
    assert list(_differences(replace(RECORD, **changes), RECORD, ())) == [told]


def test_settings_that_differ_are_told():
    told = list(_differences(RECORD, RECORD, [("optimizer.warmup", 0.1, None)]))
    assert told == ["optimizer.warmup: 0.1, here None"]


def test_several_numbers_of_threads_are_told_though_equal():
    """A repeated run can change from one to the other at another step."""
    record = replace(RECORD, threads=[1, 2])
    assert list(_differences(record, record, ())) == ["threads: 1, 2, here 1, 2"]


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [
        (" (without Java)", "", "Java: not used, here used; not compared: METEOR"),
        ("", " (without Java)", "Java: used, here not used; not compared: METEOR"),
    ],
)
def test_scores_with_and_without_java_are_not_compared(then, now, told):
    recorded, repeated = (
        replace(RECORD, scores={"BLEU": 40.0, f"METEOR{suffix}": value})
        for suffix, value in ((then, 0.4), (now, 0.5))
    )
    run = TableRun(
        data_set=STUDIES["table3"].data_sets[0],
        variant=STUDIES["table3"].variants[0],
        rate=1e-3,
        seed=0,
    )
    scores = tuple(_compared(run, recorded, repeated, [recorded]))
    differences = tuple(_differences(recorded, repeated, ()))
    assert [score.score for score in scores] == ["BLEU"]
    assert differences == (told,)
    assert Reproduction(scores=scores, differences=differences).holds


@pytest.mark.slow
def test_an_edited_score_and_another_processor_are_told(logged, tmp_path, capsys):
    (path,) = (tmp_path / "log" / "runs" / "mrpc" / "lora").glob("*-seed-1.json")
    record = storage.read_record(path, RunFolderError)
    record["scores"]["accuracy"] += 0.9
    record["processor"] = "Another CPU"
    assert record["threads"] == [torch.get_num_threads()]
    assert record["device"].startswith("cpu (")
    del (
        record["threads"],
        record["device"],
        record["source"],
    )  # as in a record of an earlier version
    storage.write_record(path, record)
    config = logged("mrpc/lora/1")
    words = ["--log", config.log, "--reproduce", "mrpc/lora/1", "--data.root", config.data.root]
    main(["paper", "table2", *words, "--output", config.output])
    printed = " ".join(capsys.readouterr().out.split())
    assert "processor: Another CPU, here" in printed
    assert "threads: not recorded, here" in printed
    assert "within the spread" in printed  # that of two seeds, one of which is the edited score


@pytest.mark.slow
def test_a_row_that_is_not_in_the_log(logged, tmp_path):
    with pytest.raises(
        ConfigurationError, match=r"no scored run mrpc/lora/7\..*mrpc/lora 0, 1[;.]"
    ):
        reproduce(logged("mrpc/lora/7"), silent)
    with pytest.raises(ConfigurationError, match=r"tasks names 'mrcp'.*mrpc"):
        reproduce(logged("mrcp/lora"), silent)
    with pytest.raises(ConfigurationError, match="is the folder of a table"):
        reproduce(replace(logged("mrpc/lora"), output=str(tmp_path / "log")), silent)
    other = PaperConfig(table="table3", log=str(tmp_path / "log"), reproduce="mrpc/lora")
    with pytest.raises(ConfigurationError, match="is of table2, not of table3"):
        reproduce(other, silent)


@pytest.mark.parametrize("row", ["mrpc/bitfit/0", "rte/lora/0", "mrpc/full/0"])
def test_a_row_of_the_table_that_the_log_lacks(tmp_path, row):
    log = tmp_path / "log"
    shutil.copytree(LOGS / "table2-minilm-l6", log)
    content = storage.read_record(log / GRID, RunFolderError)
    content["plan"]["counts"]["mrpc"]["full"]["left_out"] = "does not fit the base"
    storage.write_record(log / GRID, content)
    config = PaperConfig(
        table="table2", log=str(log), reproduce=row, output=str(tmp_path / "again")
    )
    with pytest.raises(ConfigurationError, match=f"no scored run {row}. .*: mrpc/lora 0, 1, 2[.]"):
        reproduce(config, silent)


def test_the_folder_is_named_after_the_base_of_the_log(tmp_path, monkeypatch):
    """The runs of two logs have equal names: in one folder, those of one base would pass for the other's."""
    monkeypatch.chdir(tmp_path)
    log = str(LOGS / "table2-mpnet-base")
    config = PaperConfig(table="table2", log=log, reproduce="rte/lora/0")
    assert _recorded(config).folder.as_posix() == "out/paper/table2-mpnet-base-reproduced"
    assert _recorded(replace(config, output="again")).folder.name == "again"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dry_run": True}, "dry_run"),
        ({"seeds": 1, "limit": 100}, "seeds, limit"),
        ({"base": BaseConfig(name="bert-tiny")}, "base.name"),
    ],
)
def test_a_setting_that_a_repetition_does_not_use_is_refused(changes, named):
    with pytest.raises(ConfigurationError, match=f"recorded settings. Leave {named} out"):
        PaperConfig(table="table2", log="log", reproduce="rte/lora", **changes)


def test_reproduce_without_a_log_or_with_a_wrong_row(tmp_path):
    with pytest.raises(ConfigurationError, match="reproduce needs the log of a table"):
        reproduce(PaperConfig(table="table2", reproduce="rte/lora"), silent)
    with pytest.raises(ConfigurationError, match="write DATA/METHOD or DATA/METHOD/SEED"):
        PaperConfig(table="table2", reproduce="rte")


@pytest.mark.parametrize(
    ("repeated", "spread", "verdict"),
    [
        (0.75, 0.01, "equal"),
        (0.76, 0.02, "within the spread"),
        (0.78, 0.02, "outside the spread"),
        (0.76, None, "differs"),
        (float("nan"), 0.01, "outside the spread"),
        (float("nan"), None, "outside the spread"),
    ],
)
def test_verdicts(repeated, spread, verdict):
    score = RepeatedScore(run="", score="", recorded=0.75, repeated=repeated, spread=spread)
    assert score.verdict == verdict


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_honest_repeats_are_within_the_spread(seeds: int) -> None:
    """A repeat under other conditions is another draw: of 2,000 of them, 95 % or a little more are within."""
    draws = np.random.default_rng(seeds).normal(size=(2000, seeds + 1))
    within = [abs(d[0] - d[1]) <= spread_of(list(d[1:])) for d in draws]
    assert 0.94 < np.mean(within) < 0.98
    assert spread_of([1.0]) is None

"""Named tasks in training, warm start and evaluation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny_runs
import torch

from lorakit.adapters import formats
from lorakit.data import DataConfig
from lorakit.errors import ConfigurationError, LorakitError, WrongBaseError
from lorakit.evaluation.evaluate import evaluate
from lorakit.evaluation.evaluate_config import EvaluateConfig
from lorakit.models.base_config import BaseConfig
from lorakit.reporting.run_record import read_run
from lorakit.training.config import HeldOutConfig, OptimizerConfig, TrainConfig
from lorakit.training.loop import train


def write_pairs(folder: Path, first: str, second: str, classes: int) -> None:
    """Write pairs of words; the label is the one of `classes` words that the second one contains."""
    folder.mkdir(parents=True)
    for split, count in (("train", 48), ("validation", 12), ("validation_matched", 12)):
        rows = [
            {
                first: "river park",
                second: f"{tiny_runs.WORDS[3 + i % 9]} {tiny_runs.WORDS[i % classes]}",
                "label": i % classes,
            }
            for i in range(count)
        ]
        tiny_runs.write_rows(folder / f"{split}.jsonl", rows)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("named")
    write_pairs(folder / "data" / "mnli", "premise", "hypothesis", 3)
    write_pairs(folder / "data" / "mrpc", "sentence1", "sentence2", 2)
    write_pairs(folder / "data" / "stsb", "sentence1", "sentence2", 6)
    tiny_runs.save_base(folder / "base", "roberta", "base")
    train(config(folder, "mnli", epochs=4))
    return folder


def config(folder: Path, task: str, **overrides) -> TrainConfig:
    settings = {
        "data": DataConfig(task=task, root=str(folder / "data")),
        "output": str(folder / f"run-{task}"),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "evaluation": HeldOutConfig(),
        "overwrite": True,
        **overrides,
    }
    return tiny_runs.config(folder, str(folder / "base"), **settings)


@pytest.mark.slow
def test_a_run_is_scored_as_the_task_is(root: Path) -> None:
    result = json.loads((root / "run-mnli" / "result.json").read_text())
    assert set(result["scores"]) == {"loss", "accuracy"}
    provenance = formats.read(root / "run-mnli" / "adapter").provenance
    assert (provenance["task"], provenance["generic_task"]) == ("mnli", "classification")
    assert provenance["labels"] == ["entailment", "neutral", "contradiction"]
    # The adapter and the root determine task, split and labels.
    scored = EvaluateConfig(
        base=BaseConfig(name=str(root / "base"), dtype="float32", device="cpu"),
        adapter=str(root / "run-mnli" / "adapter"),
        data=DataConfig(task="mnli", root=str(root / "data")),
    )
    evaluation = evaluate(scored)
    assert evaluation.scores == pytest.approx(result["scores"], rel=1e-5)
    assert len(evaluation.outputs) == 12


def test_an_adapter_of_other_labels_does_not_score_a_task(root: Path) -> None:
    scored = EvaluateConfig(
        base=BaseConfig(name=str(root / "base"), dtype="float32", device="cpu"),
        adapter=str(root / "run-mnli" / "adapter"),
        data=DataConfig(task="mrpc", root=str(root / "data")),
    )
    with pytest.raises(ConfigurationError, match=r"mrpc \(not_equ.*trained for mnli \(entailment"):
        evaluate(scored)


@pytest.mark.parametrize("task", ["mrpc", "stsb"])
def test_warm_start_carries_over_what_fits_and_says_so(root: Path, task: str, capsys) -> None:
    start = str(root / "run-mnli" / "adapter")
    train(
        config(
            root,
            task,
            from_adapter=start,
            max_steps=1,
            optimizer=OptimizerConfig(learning_rate=1e-12, weight_decay=0),
        )
    )
    shown = " ".join(capsys.readouterr().err.split() + capsys.readouterr().out.split())
    before = formats.read(start)
    after = formats.read(root / f"run-{task}" / "adapter")
    classes = 2 if task == "mrpc" else 1
    # The factors and the head's first layer are the old adapter's.
    for path, layer in before.layers.items():
        torch.testing.assert_close(after.layers[path].B, layer.B)
        assert layer.B.abs().max() > 0
    for name in ("classifier.dense.weight", "classifier.dense.bias"):
        torch.testing.assert_close(after.trained[name], before.trained[name])
    # Its last layer is new, in the shape of this task, and is trained.
    assert before.trained["classifier.out_proj.weight"].shape[0] == 3
    assert after.trained["classifier.out_proj.weight"].shape[0] == classes
    assert f"classifier.out_proj.weight (3, 32) -> ({classes}, 32)" in shown
    assert "loaded classifier.dense.bias, classifier.dense.weight and the adapter" in shown


@pytest.mark.slow
def test_warm_start_trains_the_new_layer(root: Path) -> None:
    start = str(root / "run-mnli" / "adapter")
    short = config(root, "mrpc", from_adapter=start, max_steps=1, output=str(root / "one"))
    train(short)
    longer = config(root, "mrpc", from_adapter=start, max_steps=6, output=str(root / "six"))
    train(longer)
    one, six = (formats.read(root / name / "adapter").trained for name in ("one", "six"))
    for name in ("classifier.out_proj.weight", "classifier.dense.weight"):
        assert (one[name] - six[name]).abs().max() > 1e-4


def test_warm_start_still_needs_the_base(root: Path, tmp_path: Path) -> None:
    tiny_runs.save_base(tmp_path / "base", "roberta", "base", seed=3)
    with pytest.raises(WrongBaseError):
        train(
            config(
                root,
                "mrpc",
                base=BaseConfig(name=str(tmp_path / "base"), dtype="float32", device="cpu"),
                from_adapter=str(root / "run-mnli" / "adapter"),
                output=str(tmp_path / "run"),
            )
        )


def test_the_metric_is_one_of_the_tasks(root: Path) -> None:
    train(config(root, "mrpc", max_steps=2, evaluation=HeldOutConfig(metric="f1")))
    with pytest.raises(
        ConfigurationError, match=r"task mnli, evaluation\.metric is 'f1'.*loss, accuracy"
    ):
        config(root, "mnli", evaluation=HeldOutConfig(metric="f1"))


def test_a_training_set_is_needed() -> None:
    with pytest.raises(ConfigurationError, match=r"data\.train is not set.*--data\.task mrpc"):
        TrainConfig(base=BaseConfig(name="b"), data=DataConfig(), output="out")


OWN = """
from lorakit.tasks import Classification

class Mine(Classification):
    name = "mine"
    texts = ("sentence1", "sentence2")
    layouts = (("sentence1", "sentence2", "label"),)
    classes = ("no", "yes")
"""


def test_a_score_that_a_task_does_not_return_is_missed_before_the_first_step(
    tmp_path, base
) -> None:
    (tmp_path / "mine.py").write_text("""
from lorakit.tasks import Completion

class Mine(Completion):
    name = "mine"
    scores = quick_scores = ("hit",)

    @classmethod
    def score(cls, outputs, examples, **settings):
        return {"hits": 1.0}
""")
    settings = tiny_runs.config(
        tmp_path, base, evaluation=HeldOutConfig(metric="loss", samples=1, max_new_tokens=1)
    )
    data = dataclasses.replace(settings.data, task=f"{tmp_path / 'mine.py'}:Mine")
    evaluation = dataclasses.replace(settings.evaluation, metric="hit")
    expected = r"loss, perplexity, hits, without hit, .* of task mine, or set evaluation\.metric"
    with pytest.raises(LorakitError, match=expected):
        train(dataclasses.replace(settings, data=data, evaluation=evaluation))


OWN_SCORES = """
import numpy as np
import torch

from lorakit.tasks import Completion

class Mine(Completion):
    name = "mine"
    scores = quick_scores = ("right",)

    @classmethod
    def score(cls, outputs, examples, **settings):
        return {{"right": {score}}}
"""


@pytest.mark.parametrize("kind", ["np.int64", "np.float32", "torch.tensor"])
def test_scores_may_be_numbers_of_numpy_and_torch(kind: str, tmp_path: Path, base: str) -> None:
    (tmp_path / "mine.py").write_text(OWN_SCORES.format(score=f"{kind}(2)"))
    settings = tiny_runs.config(
        tmp_path, base, max_steps=1, evaluation=HeldOutConfig(samples=1, max_new_tokens=1)
    )
    data = dataclasses.replace(settings.data, task=f"{tmp_path / 'mine.py'}:Mine")
    result = train(dataclasses.replace(settings, data=data))
    records = tiny_runs.metrics(tmp_path / "run", "validation")
    assert [record["right"] for record in records] == [2, 2]
    assert result.scores["right"] == 2


def test_a_score_that_is_no_number_is_refused_before_the_first_step(
    tmp_path: Path, base: str
) -> None:
    (tmp_path / "mine.py").write_text(OWN_SCORES.format(score="None"))
    settings = tiny_runs.config(
        tmp_path, base, evaluation=HeldOutConfig(samples=1, max_new_tokens=1)
    )
    data = dataclasses.replace(settings.data, task=f"{tmp_path / 'mine.py'}:Mine")
    with pytest.raises(LorakitError, match=r"score right of task mine is None; it must be a num"):
        train(dataclasses.replace(settings, data=data))


@pytest.mark.parametrize(
    ("less_is_better", "change", "verdict"),
    [('("right",)', 1, "worse"), ("()", 1, "better"), ("()", -1, "worse")],
)
def test_a_report_judges_the_scores_of_a_task_of_ones_own_as_training_did(
    less_is_better: str, change: int, verdict: str, tmp_path: Path, base: str, capsys
) -> None:
    """Without the code of the task, which may be missing by then."""
    code = OWN_SCORES.format(score=f"10 + {change} * cls.calls, 'other': cls.calls")
    code = code.replace(
        "        return", "        cls.calls = getattr(cls, 'calls', 0) + 1\n        return"
    )
    (tmp_path / "mine.py").write_text(f"{code}\nMine.less_is_better = {less_is_better}\n")
    evaluation = HeldOutConfig(samples=1, max_new_tokens=1)
    settings = tiny_runs.config(tmp_path, base, max_steps=1, evaluation=evaluation)
    settings = dataclasses.replace(
        settings,
        data=dataclasses.replace(settings.data, task=f"{tmp_path / 'mine.py'}:Mine"),
        evaluation=dataclasses.replace(evaluation, metric="right"),
    )
    folder = train(settings).folder
    assert ("worse than before training" in capsys.readouterr().err) == (verdict == "worse")
    (tmp_path / "mine.py").unlink()
    record = read_run(folder)
    assert record.never_improved == (verdict == "worse")
    verdicts = {name: record.better(name, 9.0 + change, 9.0) for name in ("right", "other")}
    assert verdicts == {"right": verdict == "better", "other": None}  # the task does not list other


@pytest.mark.slow
def test_a_run_does_not_go_on_with_a_changed_task_file(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    rows = str(root / "data" / "mrpc" / "train.jsonl")
    settings = config(
        root,
        "mrpc",
        data=DataConfig(task=f"{file}:Mine", train=rows),
        output=str(tmp_path / "run"),
        max_steps=2,
        overwrite=False,
    )
    train(settings)
    (
        tmp_path / "run" / "result.json"
    ).unlink()  # as if the run had been killed before it wrote its result
    resumed = dataclasses.replace(settings, resume=True)
    file.write_text(OWN.replace('"no", "yes"', '"yes", "no"'))
    with pytest.raises(LorakitError, match=r"The task has changed.*mine\.py"):
        train(resumed)
    file.write_text(OWN)
    train(resumed)

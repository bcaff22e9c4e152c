"""The GLUE tasks: encoding, scores and the real data sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from sklearn.metrics import f1_score, matthews_corrcoef
from tiny_tokenizer import CLS, SEP, tiny_encoder_tokenizer

from lorakit.data import DataConfig, DataTask, load_examples, task_of
from lorakit.errors import ConfigurationError, DataError
from lorakit.tasks import TASKS, LabelledExample

# Text columns and classes in index order, as declared by the hub's data set.
LAYOUTS = {
    "cola": (["sentence"], ["unacceptable", "acceptable"]),
    "sst2": (["sentence"], ["negative", "positive"]),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"]),
}
TEXTS = ("The river pub.", "A cheap park.")


def write(folder: Path, name: str, rows: list[dict]) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("task", LAYOUTS)
def test_a_row_is_encoded_as_the_tokenizer_encodes_the_pair(task: str, tmp_path: Path) -> None:
    columns, classes = LAYOUTS[task]
    texts = dict(zip(columns, TEXTS, strict=False))
    rows = [{**texts, "label": i, "idx": i} for i in range(len(classes))]
    rows += [{**texts, "label": name, "idx": -1} for name in classes]  # as on the hub
    write(tmp_path / task, "train.jsonl", rows)
    config = DataConfig(task=task, root=str(tmp_path))
    tokenizer = tiny_encoder_tokenizer()
    examples = load_examples(config, "train", tokenizer)
    expected = tokenizer(*TEXTS[: len(columns)])
    assert all(e.input_ids == expected["input_ids"] for e in examples)
    assert all(e.token_type_ids == expected["token_type_ids"] for e in examples)
    assert [e.label for e in examples] == [*range(len(classes))] * 2
    assert [e.completion for e in examples] == classes * 2
    assert tokenizer.decode(examples[0].input_ids).count(SEP) == len(columns)
    assert tokenizer.decode(examples[0].input_ids).startswith(CLS)


@pytest.mark.parametrize("label", ["2", "²", "-1"])
def test_a_label_without_a_class_is_named(label: str, tmp_path: Path) -> None:
    write(tmp_path / "cola", "train.jsonl", [{"sentence": TEXTS[0], "label": label}])
    config = DataConfig(task="cola", root=str(tmp_path))
    with pytest.raises(DataError, match=f"'label' is '{label}', which task cola does not have"):
        load_examples(config, "train", tiny_encoder_tokenizer())


def test_the_classes_are_known_without_data() -> None:
    """The index of a class does not depend on the labels in a split."""
    for task, (_, classes) in LAYOUTS.items():
        assert task_of(DataConfig(task=task, root="nowhere")) == DataTask(
            name=task, labels=tuple(classes)
        )
    assert task_of(DataConfig(task="stsb")) == DataTask(name="stsb")


@pytest.mark.parametrize("label", [-1, 2, "same", "2"])
def test_a_label_that_is_none_of_the_tasks(label: object, tmp_path: Path) -> None:
    write(tmp_path / "mrpc", "train.jsonl", [{"sentence1": "a", "sentence2": "b", "label": label}])
    config = DataConfig(task="mrpc", root=str(tmp_path))
    with pytest.raises(DataError, match=r"train\.jsonl:1.*not_equivalent, equivalent, or its ind"):
        load_examples(config, "train", tiny_encoder_tokenizer())


def test_stsb_is_a_regression_whose_labels_may_be_whole(tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "label": x, "idx": 0} for x in (5, 2.5, 0)]
    write(tmp_path / "stsb", "train.jsonl", rows)
    examples = load_examples(
        DataConfig(task="stsb", root=str(tmp_path)), "train", tiny_encoder_tokenizer()
    )
    assert [e.label for e in examples] == [5.0, 2.5, 0.0]


def labelled(labels: list) -> list[list[LabelledExample]]:
    return [
        [LabelledExample(input_ids=[1], prompt="", completion="", label=label)] for label in labels
    ]


def test_scores_are_those_of_the_paper() -> None:
    predictions, labels = [1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0]
    examples = labelled(labels)
    assert TASKS["mrpc"].score(predictions, examples) == pytest.approx(
        {"accuracy": 4 / 6, "f1": f1_score(labels, predictions)}
    )
    assert TASKS["cola"].score(predictions, examples) == pytest.approx(
        {"matthews": matthews_corrcoef(labels, predictions)}
    )
    assert TASKS["stsb"].score([1.0, 2.0, 3.0], labelled([1.0, 2.0, 3.0])) == pytest.approx(
        {"pearson": 1, "spearman": 1}
    )
    for task in (*LAYOUTS, "stsb"):
        assert TASKS[task].metric == TASKS[task].scores[0]
        assert TASKS[task].scored_split == "validation"


@pytest.mark.parametrize("task", [*LAYOUTS, "stsb"])
def test_real_sets(shared: Path, task: str) -> None:
    tokenizer = tiny_encoder_tokenizer()
    for split in ("train", "validation"):
        config = DataConfig(task=task, root=str(shared / "data"), limit=100, max_length=2048)
        examples = load_examples(config, split, tokenizer)
        assert (len(examples), examples.report.skipped) == (100, 0)
        kind = float if task == "stsb" else int
        assert all(type(e.label) is kind for e in examples)
        assert len({e.label for e in examples}) > 1


@pytest.mark.slow
def test_real_mrpc_has_the_counts_of_its_readme(shared: Path) -> None:
    config = DataConfig(task="mrpc", root=str(shared / "data"), max_length=2048)
    for split, count, positive in (("train", 3668, 2474), ("validation", 408, 279)):
        examples = load_examples(config, split, tiny_encoder_tokenizer())
        assert (len(examples), sum(e.label for e in examples)) == (count, positive)


def test_settings_that_do_not_fit_a_task() -> None:
    with pytest.raises(ConfigurationError, match=r"'mprc'.*Did you mean 'mrpc'"):
        DataConfig(task="mprc")
    with pytest.raises(ConfigurationError, match="task mrpc has no encodings; remove it"):
        DataConfig(task="mrpc", encoding="paper")
    with pytest.raises(ConfigurationError, match="prompt_template is set, but task mrpc has no"):
        DataConfig(task="mrpc", prompt_template="{sentence1}")
    with pytest.raises(ConfigurationError, match=r"data.root is 'x'.*but data.task is auto"):
        DataConfig(train="t.jsonl", root="x")
    with pytest.raises(ConfigurationError, match=r"unknown field 'text'.*sentence, label"):
        DataConfig(task="cola", columns={"text": "sentence"})


def mnli_rows(*labels: int) -> list[dict]:
    return [{"premise": "a", "hypothesis": f"b {i}", "label": x} for i, x in enumerate(labels)]


def test_both_development_sets_of_mnli_are_scored_as_one(tmp_path: Path) -> None:
    classes = TASKS["mnli"].classes
    matched, mismatched = [0, 1, 2, 0], [2, 1]
    write(tmp_path / "mnli", "validation_matched.jsonl", mnli_rows(*matched))
    write(tmp_path / "mnli", "validation_mismatched.jsonl", mnli_rows(*mismatched))
    config = DataConfig(task="mnli", root=str(tmp_path))
    loaded = load_examples(config, "validation", tiny_encoder_tokenizer(), labels=classes)
    assert [e.label for e in loaded] == matched + mismatched
    groups = [[e] for e in loaded]
    # 3 of 4 and 0 of 2 are correct: the accuracy is that of all rows, not the mean of the sets.
    scores = TASKS["mnli"].score([0, 1, 2, 1, 0, 0], groups)
    assert scores == {"accuracy": 0.5, "accuracy matched": 0.75, "accuracy mismatched": 0.0}
    assert TASKS["mnli"].scores == tuple(scores)
    assert TASKS["mnli"].quick_scores == ("accuracy",)

    one = DataConfig(
        task="mnli", root=str(tmp_path), validation_split="validation_mismatched", limit=1
    )
    loaded = load_examples(one, "validation", tiny_encoder_tokenizer(), labels=classes)
    assert [e.label for e in loaded] == [2]
    assert TASKS["mnli"].score([2], [[e] for e in loaded]) == {"accuracy": 1.0}


def test_mnli_without_its_mismatched_set(tmp_path: Path) -> None:
    classes = TASKS["mnli"].classes
    write(tmp_path / "mnli", "validation_matched.jsonl", mnli_rows(0, 1))
    config = DataConfig(task="mnli", root=str(tmp_path))
    loaded = load_examples(config, "validation", tiny_encoder_tokenizer(), labels=classes)
    assert len(loaded) == 2
    assert TASKS["mnli"].score([0, 0], [[e] for e in loaded]) == {"accuracy": 0.5}
    both = "validation_matched+validation_mismatched"
    chosen = DataConfig(task="mnli", root=str(tmp_path), validation_split=both)
    message = r"validation_matched\.jsonl with validation_mismatched\.jsonl.*found validation_match"
    with pytest.raises(DataError, match=message):
        load_examples(chosen, "validation", tiny_encoder_tokenizer(), labels=classes)


def test_both_development_sets_are_read_from_the_hub(monkeypatch) -> None:
    classes = TASKS["mnli"].classes
    calls = []

    def load_dataset(name: str, config: str, *, split: str, revision: str | None) -> Dataset:
        calls.append((name, config, split))
        return Dataset.from_list(mnli_rows(len(calls)))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    loaded = load_examples(
        DataConfig(task="mnli"), "validation", tiny_encoder_tokenizer(), labels=classes
    )
    parts = ["validation_matched", "validation_mismatched"]
    assert calls == [("nyu-mll/glue", "mnli", part) for part in parts]
    assert [(e.split, e.label) for e in loaded] == list(zip(parts, (1, 2), strict=True))

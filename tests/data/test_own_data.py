"""How a named task locates its rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest
from tiny_tokenizer import tiny_encoder_tokenizer

from lorakit.data import DataConfig, load_examples, preview
from lorakit.errors import DataError

ROW = {"premise": "A river.", "hypothesis": "A park.", "label": 1}


def write(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "mnli" / "train_subset.jsonl.gz", ROW)
    write(tmp_path / "mnli" / "validation_matched.jsonl", ROW, {**ROW, "label": 0})
    write(tmp_path / "mnli" / "validation_mismatched.jsonl", {**ROW, "label": "contradiction"})
    write(tmp_path / "qqp" / "train.jsonl", {"question1": "a", "question2": "b", "label": 0})
    return tmp_path


def labels(config: DataConfig, split: str) -> list:
    return [e.label for e in load_examples(config, split, tiny_encoder_tokenizer())]


def test_splits_are_found_by_the_names_of_their_files(root: Path) -> None:
    config = DataConfig(task="mnli", root=str(root))
    assert config.source("train") == str(root / "mnli" / "train_subset.jsonl.gz")
    assert labels(config, "train") == [1]
    assert labels(config, "validation") == [1, 0, 2]  # both sets, as in published scores
    matched = DataConfig(task="mnli", root=str(root), validation_split="validation_matched")
    assert labels(matched, "validation") == [1, 0]
    other = DataConfig(task="mnli", root=str(root), validation_split="validation_mismatched")
    assert labels(other, "validation") == [2]
    # The whole training set takes precedence over a subset.
    write(root / "mnli" / "train.jsonl", {**ROW, "label": 2})
    assert labels(config, "train") == [2]


def test_named_files_override_the_task_data(root: Path) -> None:
    write(root / "mine.jsonl", {**ROW, "label": 2})
    config = DataConfig(task="mnli", root=str(root), validation=str(root / "mine.jsonl"))
    assert labels(config, "validation") == [2]
    assert labels(config, "train") == [1]


def test_part_of_the_tasks_training_set_can_be_held_out(tmp_path: Path) -> None:
    rows = [{"sentence": f"text {i}", "label": i % 2} for i in range(20)]
    write(tmp_path / "cola" / "train.jsonl", *rows)
    write(tmp_path / "cola" / "validation.jsonl", {"sentence": "other", "label": 0})
    config = DataConfig(task="cola", root=str(tmp_path), validation_fraction=0.25)
    sides = [load_examples(config, s, tiny_encoder_tokenizer()) for s in ("train", "validation")]
    assert [len(side) for side in sides] == [15, 5]
    assert {e.prompt for e in sides[0]}.isdisjoint(e.prompt for e in sides[1])


def test_a_preview_shows_the_splits_that_are_there(root: Path) -> None:
    shown = preview(DataConfig(task="mnli", root=str(root)), tiny_encoder_tokenizer())
    assert (shown.task, list(shown.splits)) == ("mnli", ["train", "validation"])
    assert shown.splits["validation"].labels == {
        "entailment": 1,
        "neutral": 1,
        "contradiction": 1,
    }


@pytest.mark.parametrize(
    ("settings", "split", "message"),
    [
        ({"root": "nowhere"}, "train", r"no such folder.*holds mnli/train\.jsonl, or omit"),
        ({"task": "rte"}, "train", r"no folder 'rte'.*rte/train\.jsonl\. Folders in it: mnli, qqp"),
        (
            {"task": "qqp"},
            "validation",
            r"validation\.jsonl or heldout_from_train\.jsonl.*found tr",
        ),
        ({"task": "qqp"}, "test", "no test data with public labels; score its validation set"),
        ({"validation_split": "dev"}, "validation", r"looked for dev\.jsonl .*found train_subset"),
        ({"train": "gone.jsonl"}, "train", r"no file or data set 'gone\.jsonl'"),
        ({"columns": {"premise": "first"}}, "train", r"no column 'first', which data.columns maps"),
    ],
)
def test_missing_data_is_reported(root, monkeypatch, settings, split, message) -> None:
    monkeypatch.chdir(root)
    config = DataConfig(**{"task": "mnli", "root": str(root), **settings})
    with pytest.raises(DataError, match=message):
        load_examples(config, split, tiny_encoder_tokenizer())


def test_two_files_of_one_split_are_an_error(root: Path) -> None:
    write(root / "mnli" / "train_subset.jsonl", ROW)
    with pytest.raises(DataError, match=r"train_subset\.jsonl and train_subset\.jsonl\.gz, which"):
        DataConfig(task="mnli", root=str(root)).source("train")


def test_a_row_without_a_tasks_column_is_named(root: Path) -> None:
    write(root / "mnli" / "train.jsonl", {"sentence1": "a", "sentence2": "b", "label": 0})
    with pytest.raises(
        DataError, match=r"sentence2, label; .*:\n.* premise \+ hyp.*\n.*{premise: COL"
    ):
        load_examples(DataConfig(task="mnli", root=str(root)), "train", tiny_encoder_tokenizer())


def test_without_a_root_the_hub_is_read(monkeypatch) -> None:
    calls = []
    features = datasets.Features(
        premise=datasets.Value("string"),
        hypothesis=datasets.Value("string"),
        label=datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
        idx=datasets.Value("int32"),
    )
    content = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [2, 0], "idx": [0, 1]}

    def load_dataset(name, config, *, split, revision):
        calls.append((name, config, split))
        return datasets.Dataset.from_dict(content, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig(task="mnli")
    assert labels(config, "train") == [2, 0]
    assert labels(config, "validation") == [2, 0, 2, 0]
    assert labels(DataConfig(task="mnli", validation_split="validation_mismatched"), "validation")
    assert calls == [
        ("nyu-mll/glue", "mnli", "train"),
        ("nyu-mll/glue", "mnli", "validation_matched"),
        ("nyu-mll/glue", "mnli", "validation_mismatched"),
        ("nyu-mll/glue", "mnli", "validation_mismatched"),
    ]


def test_a_hub_that_cannot_be_reached_is_said_with_the_way_out() -> None:
    with pytest.raises(DataError, match=r"nyu-mll/glue:rte.*cannot be loaded.*data\.root"):
        load_examples(DataConfig(task="rte"), "train", tiny_encoder_tokenizer())

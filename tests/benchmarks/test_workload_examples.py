"""Every system of a row gets the same examples, in any order."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import torch
from tiny_tokenizer import tiny_encoder_tokenizer, tiny_tokenizer

from benchmarks.examples import IGNORED, Prepared, prepare, prepare_whole
from benchmarks.workloads import WORKLOADS, Workload

WORDS = [
    "cheap",
    "food",
    "near",
    "the",
    "river",
    "by",
    "a",
    "park",
    "with",
    "children",
    "and",
    "a",
    "pub",
]
ROWS = {workload.name: workload for workload in WORKLOADS}


@pytest.fixture
def data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write small data sets in the layout of the real ones, with three completions per E2E prompt."""
    e2e, mrpc = tmp_path / "data/e2e_nlg", tmp_path / "data/mrpc"
    e2e.mkdir(parents=True)
    mrpc.mkdir()
    pairs = [
        {
            "meaning_representation": f"name[{i}]",
            "human_reference": " ".join(WORDS[: 1 + (7 * i + j) % 12]),
        }
        for i in range(200)
        for j in range(3)
    ]
    with gzip.open(e2e / "train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in pairs)
    (e2e / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs[:90]))
    sentences = [
        {"sentence1": " ".join(WORDS[: 1 + i % 13]), "sentence2": f"{i}", "label": i % 2, "idx": i}
        for i in range(900)
    ]
    for split in ("train", "validation", "test"):
        (mrpc / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sentences))
    monkeypatch.setenv("LORAKIT_SHARED", str(tmp_path))


def prepared_row(tmp_path: Path, name: str, updates: int = 5) -> Prepared:
    workload: Workload = dataclasses.replace(ROWS[name], batch_size=4)
    encodes = workload.task == "classification"
    base = tmp_path / "tokenizer"
    (tiny_encoder_tokenizer() if encodes else tiny_tokenizer()).save_pretrained(base)
    (base / "config.json").write_text("{}")  # marks the folder as a model folder
    return prepare(workload, tmp_path / "examples", base=str(base), updates=updates)


@pytest.mark.usefixtures("data_sets")
@pytest.mark.parametrize("name", ["e2e", "e2e-grouped", "mrpc"])
def test_every_order_holds_the_same_examples(tmp_path: Path, name: str) -> None:
    prepared = prepared_row(tmp_path, name)
    size = prepared.workload.batch_size
    count = prepared.workload.warmup + prepared.updates
    assert prepared.updates == 5
    assert set(prepared.batches) == set(prepared.workload.orders)
    for order, batches in prepared.batches.items():
        assert [len(batch) for batch in batches] == [size] * count
        assert sorted(i for batch in batches for i in batch) == list(range(size * count))
        assert sum(prepared.tokens(order)) == sum(len(e["input_ids"]) for e in prepared.examples)


@pytest.mark.usefixtures("data_sets")
def test_an_interrupted_preparation_begins_again(tmp_path: Path) -> None:
    whole = prepared_row(tmp_path, "mrpc")
    (whole.folder / "examples.json").unlink()
    (whole.folder / "train.jsonl").write_text("half")
    assert prepared_row(tmp_path, "mrpc") == whole


def padded_tokens(prepared: Prepared, order: str) -> int:
    batches = prepared.in_order(order)  # type: ignore[arg-type]
    return sum(len(batch) * max(len(e["input_ids"]) for e in batch) for batch in batches)


@pytest.mark.usefixtures("data_sets")
def test_batches_of_like_lengths_hold_less_padding(tmp_path: Path) -> None:
    prepared = prepared_row(tmp_path, "e2e")
    needed = sum(prepared.tokens("plain"))
    bucketed = padded_tokens(prepared, "bucketed")
    assert needed <= bucketed < 0.8 * padded_tokens(prepared, "plain")


@pytest.mark.usefixtures("data_sets")
def test_grouped_batches_share_prompts(tmp_path: Path) -> None:
    prepared = prepared_row(tmp_path, "e2e-grouped")
    for batch in prepared.in_order("grouped"):
        prompts = {
            tuple(t for t, label in zip(e["input_ids"], e["labels"], strict=True) if label < 0)
            for e in batch
        }
        assert len(prompts) <= 2  # four examples per batch, three completions per prompt


@pytest.mark.usefixtures("data_sets")
def test_what_was_prepared_is_read_again_whole(tmp_path: Path) -> None:
    prepared = prepared_row(tmp_path, "e2e")
    assert Prepared.read(prepared.folder) == prepared


@pytest.mark.usefixtures("data_sets")
def test_whole_epochs_take_every_example_and_every_held_out_one(tmp_path: Path) -> None:
    tiny_encoder_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text("{}")
    workload = dataclasses.replace(
        ROWS["mrpc"], base=str(tmp_path / "base"), batch_size=16, epochs=2
    )
    prepared = prepare_whole(workload, tmp_path / "examples")
    whole = 900 // 16
    batches = prepared.batches["bucketed"]
    for epoch in (batches[:whole], batches[whole:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(whole * 16))
    assert batches[:whole] != batches[whole:]
    assert len(prepared.held_out) == 2 * 900  # validation and test


@pytest.mark.usefixtures("data_sets")
def test_padding_is_neither_seen_nor_a_target(tmp_path: Path) -> None:
    prepared = prepared_row(tmp_path, "e2e")
    for examples in prepared.in_order("plain"):
        batch = prepared.collate(examples)
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        assert torch.equal(batch["attention_mask"].sum(1), lengths)
        assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            assert batch["input_ids"][row, :length].tolist() == example["input_ids"]
            assert batch["labels"][row, :length].tolist() == example["labels"]

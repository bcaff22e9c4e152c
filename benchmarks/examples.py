"""The examples of a workload, sampled, tokenised and ordered once for all systems.

A folder holds ``train.jsonl`` and ``held_out.jsonl``, the rows as text, and ``examples.json``, the same
rows as tokens with the batches of each order. The orders imitate those of the full data set: random batches, or
batches of similar length out of every fifty (lorakit's default, "group by length" in Trainer). Every order
holds the same examples.

python -m benchmarks.examples e2e FOLDER    prepare a row for single runs (benchmarks.run)
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from benchmarks.workloads import SEED, WORKLOADS, Order, Workload
from lorakit import storage
from lorakit.data import DataConfig, docstrings, load_examples
from lorakit.data.batches import MEGABATCH, BatchSampler
from lorakit.models.loading import load_tokenizer
from lorakit.tasks import Example, LabelledExample, LanguageExample

IGNORED = -100
MAX_LENGTH = 512
"""Maximum tokens of an example. Longer prompts are truncated at the start, for every system."""
MRPC = ("sentence1", "sentence2", "label")
"""Columns to read from MRPC."""
HELD_OUT = {"completion": 32, "classification": 256}

INSTRUCTION = """\
You write short texts for the web site of a city guide. Below is a list of what is known about one place \
to eat: its name, what kind of place it is, what it serves, what it costs, how guests rate it, where it is, \
and whether children are welcome. Write one or two plain sentences that say all of it and nothing else. Do \
not invent dishes, prices, streets or opening hours, and do not praise the place beyond its rating.
"""

Row = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """The examples of a workload, as every system reads them."""

    workload: Workload
    folder: Path
    base: str
    source: str
    """Name of the data set, for the tables."""
    examples: list[dict[str, Any]]
    """Each with input_ids, labels (one per token, -100 without a target; or one class), and token_type_ids."""
    held_out: list[dict[str, Any]]
    batches: dict[Order, list[list[int]]]
    pad_id: int

    @classmethod
    def read(cls, folder: Path) -> Prepared:
        """Read the files that :func:`prepare` wrote."""
        record = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
        return cls(**{**record, "workload": Workload(**record["workload"]), "folder": folder})

    @property
    def data(self) -> DataConfig:
        """Configuration of the rows as text, for a system that tokenises them itself."""
        return DataConfig(
            train=str(self.folder / "train.jsonl"),
            test=str(self.folder / "held_out.jsonl"),
            task=self.workload.task,
            max_length=MAX_LENGTH,
            too_long="truncate",
        )

    @property
    def updates(self) -> int:
        """Number of counted updates."""
        return len(next(iter(self.batches.values()))) - self.workload.warmup

    def in_order(self, order: Order) -> list[list[dict[str, Any]]]:
        """Return the batches of an order."""
        return [[self.examples[i] for i in batch] for batch in self.batches[order]]

    def tokens(self, order: Order) -> list[int]:
        """Return the number of tokens in each batch of an order, without padding."""
        return [sum(len(e["input_ids"]) for e in batch) for batch in self.in_order(order)]

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return a batch padded on the right to its longest example."""

        def padded(name: str, value: int) -> Tensor:
            rows = [torch.tensor(example[name]) for example in examples]
            return pad_sequence(rows, batch_first=True, padding_value=value)

        batch = {"input_ids": padded("input_ids", self.pad_id)}
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        columns = torch.arange(batch["input_ids"].shape[1])
        batch["attention_mask"] = (columns < lengths[:, None]).long()
        if self.workload.task == "completion":
            batch["labels"] = padded("labels", IGNORED)
        else:
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        if "token_type_ids" in examples[0]:
            batch["token_type_ids"] = padded("token_type_ids", 0)
        return batch


def prepare(workload: Workload, folder: Path, *, base: str, updates: int) -> Prepared:
    """Sample the examples for `updates` counted updates and the held-out examples, and write them to `folder`."""
    generator = random.Random(SEED)
    rows, held_out, source = _rows(workload, generator)
    folder.mkdir(parents=True, exist_ok=True)
    count = workload.warmup + updates
    if workload.grouped:
        rows = _grouped(rows, count * workload.batch_size, generator)
    else:
        rows = _bucketed(rows, workload, base, count, generator, folder)
    _write(folder / "train.jsonl", rows)
    _write(folder / "held_out.jsonl", generator.sample(held_out, HELD_OUT[workload.task]))
    prepared = Prepared(workload, folder, base, source, [], [], {}, 0)
    tokenizer = load_tokenizer(base)
    train = load_examples(prepared.data, "train", tokenizer)
    size = workload.batch_size
    if workload.grouped:
        prompts = [example.prompt for example in train.examples]
        orders = {"grouped": BatchSampler(train.lengths, size, workload.seed, groups=prompts)(0)}
    else:
        plain = [list(range(i, i + size)) for i in range(0, len(train), size)]
        orders = {"plain": plain, "bucketed": BatchSampler(train.lengths, size, workload.seed)(0)}
    return _tokenised(prepared, train.examples, orders, tokenizer)


def prepare_whole(workload: Workload, folder: Path) -> Prepared:
    """Write all examples of a row to `folder`, in the batches of its epochs, without a last short batch."""
    rows, held_out, source = _rows(workload, random.Random(SEED))
    root = shared_data()
    if root is not None and workload.data == "mrpc":  # the test labels of MRPC are public
        tests = _read(root / "mrpc" / "test.jsonl")
        held_out = [*held_out, *({name: row[name] for name in MRPC} for row in tests)]
        source = f"{source}, validation and test together"
    folder.mkdir(parents=True, exist_ok=True)
    size = workload.batch_size
    _write(folder / "train.jsonl", rows[: len(rows) // size * size])
    _write(folder / "held_out.jsonl", held_out)
    prepared = Prepared(workload, folder, workload.base, source, [], [], {}, 0)
    tokenizer = load_tokenizer(workload.base)
    train = load_examples(prepared.data, "train", tokenizer)
    sampler = BatchSampler(train.lengths, size, workload.seed)
    batches = [batch for epoch in range(workload.epochs) for batch in sampler(epoch)]
    return _tokenised(prepared, train.examples, {"bucketed": batches}, tokenizer)


def _tokenised(
    prepared: Prepared,
    examples: Sequence[Example],
    batches: dict[Order, list[list[int]]],
    tokenizer: PreTrainedTokenizerBase,
) -> Prepared:
    """Write the tokens of the sampled rows, and return them read back."""
    record = {
        "workload": dataclasses.asdict(prepared.workload),
        "base": prepared.base,
        "source": prepared.source,
        "examples": [_plain(example) for example in examples],
        "held_out": [_plain(e) for e in load_examples(prepared.data, "test", tokenizer).examples],
        "batches": batches,
        "pad_id": tokenizer.pad_token_id,
    }
    # Last and atomically: this file says that the preparation was not interrupted.
    with storage.atomic_file(prepared.folder / "examples.json") as file:
        file.write_text(json.dumps(record), encoding="utf-8")
    return Prepared.read(prepared.folder)


def _plain(example: Example) -> dict[str, Any]:
    if isinstance(example, LanguageExample):
        pairs = zip(example.input_ids, example.loss_mask, strict=True)
        labels = [token if target else IGNORED for token, target in pairs]
        return {"input_ids": example.input_ids, "labels": labels}
    assert isinstance(example, LabelledExample)
    types = {} if example.token_type_ids is None else {"token_type_ids": example.token_type_ids}
    return {"input_ids": example.input_ids, "labels": example.label, **types}


def _bucketed(
    rows: list[Row],
    workload: Workload,
    base: str,
    count: int,
    generator: random.Random,
    folder: Path,
) -> list[Row]:
    """Sample `count` batches at equal distances from a megabatch sorted by length.

    This gives few examples the length distribution, and the padding of buckets, of the whole data set.
    """
    size = workload.batch_size
    pool = generator.sample(rows, min(MEGABATCH * size, len(rows)))
    _write(folder / "pool.jsonl", pool)
    config = DataConfig(
        train=str(folder / "pool.jsonl"),
        task=workload.task,
        max_length=MAX_LENGTH,
        too_long="truncate",
    )
    lengths = load_examples(config, "train", load_tokenizer(base)).lengths
    order = sorted(range(len(pool)), key=lengths.__getitem__)
    stretch = len(order) // size
    chosen = [
        pool[order[(2 * k + 1) * stretch // (2 * count) * size + i]]
        for k in range(count)
        for i in range(size)
    ]
    generator.shuffle(chosen)
    return chosen


def _grouped(rows: list[Row], count: int, generator: random.Random) -> list[Row]:
    """Sample prompts with all their completions, until they give `count` examples."""
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    prompts = list(by_prompt)
    generator.shuffle(prompts)
    chosen = [row for prompt in prompts for row in by_prompt[prompt]]
    return chosen[:count]


def _rows(workload: Workload, generator: random.Random) -> tuple[list[Row], list[Row], str]:
    """Return training rows, held-out rows, and the name of the data set."""
    folder = shared_data()
    if folder is None:
        return _docstring_rows(workload, generator)
    if workload.data == "mrpc":
        files, title = ("mrpc/train.jsonl", "mrpc/validation.jsonl"), "MRPC"

        def as_row(row: Row) -> Row:
            return {name: row[name] for name in MRPC}

    elif workload.data == "samsum":
        files, title = ("samsum/train.jsonl.gz", "samsum/validation.jsonl"), "SAMSum"

        def as_row(row: Row) -> Row:
            return {"prompt": f"{row['dialogue']}\n\nSummary: ", "completion": row["summary"]}

    else:
        files, title = ("e2e_nlg/train.jsonl.gz", "e2e_nlg/validation.jsonl"), "E2E NLG"
        instruction = INSTRUCTION if workload.data == "instruction" else ""

        def as_row(row: Row) -> Row:
            prompt = f"{instruction}{row['meaning_representation']}\n"
            return {"prompt": prompt, "completion": row["human_reference"]}

    train, held_out = ([as_row(row) for row in _read(folder / name)] for name in files)
    return train, held_out, title


def _docstring_rows(
    workload: Workload, generator: random.Random
) -> tuple[list[Row], list[Row], str]:
    """Return the built-in data set, in the format of the missing one."""
    source = f"the standard library's docstrings ({workload.data} is not on this machine)"
    instruction = INSTRUCTION if workload.data == "instruction" else ""
    sets = []
    for split in ("train", "validation"):
        rows = docstrings.load(split)
        if workload.task == "classification":  # label: the text describes the function
            others = generator.sample(rows, len(rows))
            pairs = [(row, row, 1) for row in rows]
            pairs += [(row, other, 0) for row, other in zip(rows, others, strict=True)]
            sets.append(
                [
                    {"sentence1": a["prompt"], "sentence2": b["completion"], "label": label}
                    for a, b, label in pairs
                ]
            )
        else:
            sets.append(
                [{"prompt": instruction + r["prompt"], "completion": r["completion"]} for r in rows]
            )
    return sets[0], sets[1], source


def shared_data() -> Path | None:
    """Return the folder of data sets: data/ in $LORAKIT_SHARED or ../shared, or None if it does not exist."""
    root = Path(os.environ.get("LORAKIT_SHARED") or Path(__file__).parents[2] / "shared")
    return root / "data" if (root / "data").is_dir() else None


def _read(path: Path) -> list[Row]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    rows = {workload.name: workload for workload in WORKLOADS}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", choices=rows)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--updates", type=int, help="counted updates; default: those of the row")
    args = parser.parse_args()
    workload = rows[args.row]
    prepare(workload, args.folder, base=workload.base, updates=args.updates or workload.updates)


if __name__ == "__main__":
    main()

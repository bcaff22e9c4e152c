"""What a reader has before a page begins: models, data sets, adapters and runs, all small and made up."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
import torch
import walk
from pages import blocks, read, steps
from random_adapters import randomise
from safetensors.torch import load_file
from tiny_tokenizer import tiny_encoder_tokenizer, tiny_tokenizer

import lorakit

WORDS = ("river", "pub", "park", "food", "cheap", "plane", "flute", "index", "list", "cookies")

# --- models ---------------------------------------------------------------------------------------

HUB = {
    "HuggingFaceTB/SmolLM2-135M": "llama",
    "meta-llama/Llama-3.1-8B": "llama",
    "openai-community/gpt2": "gpt2",
    "FacebookAI/roberta-base": "roberta",
}
"""Architectures of the models of the hub that the pages name."""

PACKAGED = {"smollm2-135m": "llama", "minilm-l6": "bert", "mpnet-base": "mpnet"}
"""Architectures of the models with a short name."""

COMMIT = "0" * 40


def save_base(folder: Path, arch: str, layers: int) -> None:
    """Write a tiny model, 128 wide so that rank 64 fits, and its tokenizer as a model folder."""
    encoder = arch in tiny_models.ENCODERS
    tokenizer = tiny_encoder_tokenizer() if encoder else tiny_tokenizer()
    sizes = {
        "hidden_size": 128,
        "num_hidden_layers": layers,
        "max_position_embeddings": 2048,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": None if encoder else tokenizer.eos_token_id,
    }
    if arch == "llama":
        sizes["head_dim"] = 32
    head = "base" if encoder else "causal-lm"
    model = tiny_models.build(arch, head, vocab_size=len(tokenizer), **sizes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_to_cache(cache: Path, hub_id: str, arch: str, layers: int) -> None:
    """Write a tiny model to a cache of the hub, where every library finds it without a network."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    save_base(repository / "snapshots" / COMMIT, arch, layers)


# --- data -----------------------------------------------------------------------------------------


def _pair(draw: random.Random, words: str) -> dict[str, Any]:
    other = " ".join(draw.sample(WORDS, 3))
    label = draw.randint(0, 1)
    return {"sentence1": words, "sentence2": words if label else other, "label": label}


def _conditions(words: str) -> dict[str, list[Any]]:
    return {"column_index": [1], "operator_index": [0], "condition": [words]}


ROWS: dict[str, Callable[[random.Random, str], dict[str, Any]]] = {
    "prompts": lambda draw, words: {"prompt": f"{words} =>", "completion": f" {words}."},
    "texts": lambda draw, words: {"text": words, "label": words.split()[0]},
    "mrpc": _pair,
    "rte": _pair,
    "stsb": lambda draw, words: {**_pair(draw, words), "label": draw.random() * 5},
    "sst2": lambda draw, words: {"sentence": words, "label": draw.randint(0, 1)},
    "cola": lambda draw, words: {"sentence": words, "label": draw.randint(0, 1)},
    "mnli": lambda draw, words: {
        "premise": words,
        "hypothesis": words.split()[0],
        "label": draw.randint(0, 2),
    },
    "qqp": lambda draw, words: {
        "question1": words,
        "question2": words.split()[0],
        "label": draw.randint(0, 1),
    },
    "qnli": lambda draw, words: {
        "question": words.split()[0],
        "sentence": words,
        "label": draw.randint(0, 1),
    },
    "e2e_nlg": lambda draw, words: {
        "meaning_representation": f"name[The {words}], food[Thai]",
        "human_reference": f"The {words} serves Thai food.",
    },
    "spelling": lambda draw, words: {"digits": words, "words": words},
    "wikisql": lambda draw, words: {
        "question": f"Which {words}?",
        "table": {"header": ["Name", "Town"], "types": ["text", "text"], "rows": [[words, "x"]]},
        "sql": {"sel": 0, "agg": 0, "conds": _conditions(words)},
    },
}
"""A row of each data set, with the columns of the real one."""


def make_rows(data_set: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of a data set, with different words in each."""
    draw = random.Random(seed)
    return [ROWS[data_set](draw, " ".join(draw.sample(WORDS, 3))) for _ in range(count)]


def write_rows(path: str, rows: list[dict[str, Any]]) -> None:
    """Write rows to a JSONL file, compressed if its name ends in .gz."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    content = text.encode()
    Path(path).write_bytes(gzip.compress(content) if path.endswith(".gz") else content)


def data(path: str, data_set: str = "prompts", count: int = 24, seed: int = 0) -> None:
    """Write a file with rows of a data set."""
    write_rows(path, make_rows(data_set, count, seed))


def like(page: str, path: str, count: int = 24) -> None:
    """Write a file of rows like the first JSON block of a page."""
    (row,) = (
        json.loads(block.text) for block in blocks(page, read(page)) if block.language == "json"
    )
    write_rows(path, [{**row, "prompt": f"{number} {row['prompt']}"} for number in range(count)])


def table(path: str, rows: list[dict[str, Any]]) -> None:
    """Write rows without commas to a CSV file."""
    write(path, [",".join(map(str, row)) for row in (rows[0], *(row.values() for row in rows))])


def write(path: str, lines: list[str]) -> None:
    """Write a text file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def page_file(page: str, name: str) -> None:
    """Write a file whose content another page shows."""
    (step,) = (step for step in steps(page, read(page)) if step.file == name)
    write(name, step.text.splitlines())


def example(name: str) -> None:
    """Copy a script of the examples."""
    write(name, read(f"examples/{name}").splitlines())


def command(line: str) -> None:
    """Run a command of lorakit that succeeds."""
    status, _, messages = walk.run(line)
    assert status == 0, messages


def load_dataset(name: str, config: str | None = None, *, split: str, **_: Any) -> Any:
    """Return a split of a made-up data set in place of the hub's."""
    from datasets import Dataset

    data_set = config or name.split("/")[1].lower()
    return Dataset.from_list(make_rows(data_set, 24, seed=len(split)))


# --- adapters and runs ----------------------------------------------------------------------------


def adapter(
    folder: str, base: str = "smollm2-135m", *, rank: int = 8, seed: int = 0, **options: Any
) -> None:
    """Save an adapter with random weights, in the format of PEFT."""
    model = lorakit.load_base(base, **options).model
    handle = lorakit.attach(model, lorakit.LoRA(rank=rank, alpha=16))
    randomise(handle, scale=0.05, seed=seed)
    handle.save(folder)


def loralib(path: str, base: str) -> None:
    """Save random weights as loralib does, with torch.save."""
    adapter("made/adapter", base, task="sequence-classification")
    command("lorakit convert made/adapter made/loralib.safetensors --to loralib")
    torch.save(load_file("made/loralib.safetensors"), path)


def run(folder: str, *options: str, base: str = "smollm2-135m") -> None:
    """Train for two steps, with a checkpoint after each."""
    data("made/train.jsonl")
    command(
        f"lorakit train --base.name {base} --data.train made/train.jsonl --data.validation_fraction 0.2 --max_steps 2 "
        f"--batch_size 4 --checkpoints.every 1 --output {folder} {' '.join(options)}"
    )

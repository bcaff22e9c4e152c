"""Training runs that take a fraction of a second: a tiny model in a folder, a tiny data file, a configuration."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from tiny_tokenizer import tiny_encoder_tokenizer, tiny_tokenizer

from lorakit.data import DataConfig
from lorakit.models.base_config import BaseConfig
from lorakit.training import step as optimizer_steps
from lorakit.training.config import (
    CheckpointConfig,
    HeldOutConfig,
    OptimizerConfig,
    TrainConfig,
)

WORDS = [
    *("river", "pub", "park", "food", "cheap", "English", "plane", "flute"),
    *("index", "list", "Amanda", "Jerry", "cookies"),
]


def save_base(folder: Path, arch: str = "llama", head: str | None = None, **settings: Any) -> str:
    """Write the tiny model of `arch` and its tokenizer as a model folder."""
    encoder = arch in tiny_models.ENCODERS
    tokenizer = tiny_encoder_tokenizer() if encoder else tiny_tokenizer()
    model = tiny_models.build(arch, head, vocab_size=len(tokenizer), **settings)
    model.config.pad_token_id = tokenizer.pad_token_id
    if not encoder:
        model.config.eos_token_id = tokenizer.eos_token_id
        if model.can_generate():
            model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write `rows` as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Write prompts of a few words; the completion repeats the first word, which a model can learn."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(1, 5))]
        rows.append({"prompt": " ".join(words) + ":", "completion": f" {words[0]}"})
    return rows


def labelled(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Write texts whose label is the one of two words that they contain."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.randint(0, 1)
        words = [draw.choice(WORDS[2:]) for _ in range(4)]
        words[draw.randrange(4)] = WORDS[label]
        rows.append({"text": " ".join(words), "label": label})
    return rows


def config(folder: Path, base_folder: str, **overrides: Any) -> TrainConfig:
    """Two epochs of 9 steps, two batches of 4 each; `overrides` replace whole fields."""
    data = folder / "train.jsonl"
    if not data.exists():
        write_rows(data, pairs(72))
        write_rows(folder / "validation.jsonl", pairs(12, seed=1))
    settings: dict[str, Any] = {
        "base": BaseConfig(name=base_folder, dtype="float32", device="cpu"),
        "data": DataConfig(train=str(data), validation=str(folder / "validation.jsonl")),
        "output": str(folder / "run"),
        "epochs": 2,
        "batch_size": 4,
        "accumulation": 2,
        "optimizer": OptimizerConfig(learning_rate=2e-2),
        "evaluation": HeldOutConfig(every=4),
        "checkpoints": CheckpointConfig(every=3),
    }
    return TrainConfig(**{**settings, **overrides})


class Crash(Exception):
    """An exception that ends a run like a crash."""


def crash_at(patch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    """Make the `call`-th call of a function of `module` raise."""
    original, calls = getattr(module, name), itertools.count(1)

    def crashing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise Crash
        return original(*args, **kwargs)

    patch.setattr(module, name, crashing)


def crash_in_step(patch: pytest.MonkeyPatch, step: int) -> None:
    """Crash in a step (from 1), between its gradients and its update."""
    crash_at(patch, optimizer_steps, "clip_gradients", step)


def random_states() -> tuple[Any, ...]:
    """Return the states of the global generators of Python, NumPy and PyTorch's CPU."""
    numpy = np.random.get_state(legacy=False)["state"]
    return random.getstate(), numpy["key"].tolist(), numpy["pos"], torch.get_rng_state().tolist()


def summed_loss(model: Any, example: Any) -> tuple[torch.Tensor, int]:
    """Return the summed cross-entropy of a text by its definition, computed alone, and its number of targets."""
    ids, targets = torch.tensor(example.input_ids), torch.tensor(example.loss_mask)[1:]
    logits = model(input_ids=ids[None]).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits[targets], ids[1:][targets], reduction="sum")
    return loss, int(targets.sum())


def metrics(run: Path, split: str) -> list[dict[str, Any]]:
    """Return the lines of a split in metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def adapter_bytes(run: Path, which: str = "adapter") -> bytes:
    """Return the weights files of a run's adapter: PEFT's, lorakit's own, or both."""
    files = sorted((run / which).glob("*.safetensors"))
    assert files
    return b"".join(file.read_bytes() for file in files)


def require_same_bytes(run: Path, other: Path) -> None:
    """Require that two runs have the same adapters, and that the first left nothing half-written."""
    for which in ("adapter", "best"):
        same = adapter_bytes(run, which) == adapter_bytes(other, which)
        assert same, f"{run.name}: {which} differs"
    leftovers = [p for p in run.rglob("*") if ".tmp-" in p.name]
    assert not leftovers, f"{run.name}: {leftovers} were left behind"

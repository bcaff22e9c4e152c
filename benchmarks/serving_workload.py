"""The requests and the adapters of the serving benchmark, from fixed seeds."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from benchmarks.serving_load import Request
from lorakit.data import docstrings
from lorakit.models.loading import load_base

PROMPT = (32, 256)
ANSWER = (16, 64)
"""Fewest and most tokens."""
CORPUS = 50_000
"""Tokens that prompts are cut from."""
RANK = 8
TARGETS = ("q_proj", "v_proj")


def prompts(
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    length: tuple[int, int] = PROMPT,
    seed: int = 0,
) -> list[tuple[int, ...]]:
    """Return passages of the documentation of Python's standard library, of random lengths in tokens.

    They begin at random tokens. So prompts of different seeds share no prefix, and no system finds one in its cache.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(length[0], length[1] + 1, count).tolist()
    corpus = _corpus(tokenizer)
    starts = rng.integers(0, len(corpus) - length[1], count).tolist()
    return [corpus[start : start + n] for start, n in zip(starts, lengths, strict=True)]


@functools.lru_cache(1)
def _corpus(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    ids: list[int] = []
    for row in docstrings.load("train"):
        if len(ids) >= CORPUS:
            break
        ids += tokenizer(row["prompt"] + row["completion"], add_special_tokens=False)["input_ids"]
    return tuple(ids)


def requests(
    passages: Sequence[tuple[int, ...]],
    adapters: Sequence[str],
    *,
    answer: tuple[int, int] = ANSWER,
    seed: int = 0,
) -> list[Request]:
    """Return a request for each passage: adapters by Zipf's law, answers of random lengths.

    Args:
        passages: Prompts.
        adapters: Names, the most popular first; none is the base alone.
        answer: Fewest and most tokens of an answer.
        seed: Prompts and lengths depend on it in the same way for any adapters, so that trials compare.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(answer[0], answer[1] + 1, len(passages)).tolist()
    names: list[str | None] = [None] * len(passages)
    if adapters:
        chosen = rng.choice(len(adapters), len(passages), p=zipf(len(adapters)))
        names = [adapters[int(i)] for i in chosen]
    return [
        Request(prompt, name, tokens)
        for prompt, name, tokens in zip(passages, names, lengths, strict=True)
    ]


def zipf(count: int, s: float = 1.0) -> np.ndarray:
    """Return the probabilities of `count` items by Zipf's law: the k-th is proportional to ``k ** -s``."""
    weights = np.arange(1, count + 1, dtype=float) ** -s
    return weights / weights.sum()


def poisson(rate: float, count: int, *, seed: int = 0) -> list[float]:
    """Return `count` arrival times of a Poisson process of `rate` per second, in seconds."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count)).tolist()


# --- adapters ----------------------------------------------------------------------------------------


def adapter_names(count: int) -> list[str]:
    """Return the names of adapters, the most popular first."""
    return [f"a{i:04}" for i in range(count)]


def write_adapters(
    root: Path,
    names: Sequence[str],
    config: Any,
    *,
    rank: int = RANK,
    scale: float = 0.02,
    targets: Sequence[str] = TARGETS,
) -> None:
    """Write a random adapter of a Llama as a PEFT folder for each name. Equal names have equal content.

    Args:
        root: Folder of the adapter folders.
        names: Folders to write; those that exist are kept.
        config: Configuration of the base.
        rank: Rank; alpha is twice as large.
        scale: Standard deviation of B.
        targets: Projections of the attention.
    """
    for name in names:
        if (root / name / "adapter_config.json").exists():
            continue
        seed = int.from_bytes(name.encode(), "big") % 2**63
        write_adapter(root / name, config, seed=seed, rank=rank, scale=scale, targets=targets)


def write_adapter(
    folder: Path,
    config: Any,
    *,
    seed: int,
    rank: int = RANK,
    scale: float = 0.02,
    targets: Sequence[str] = TARGETS,
) -> None:
    """Write one random adapter. See :func:`write_adapters`."""
    rng = np.random.default_rng(seed)
    hidden = config.hidden_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    width = {
        "q_proj": config.num_attention_heads * head,
        "k_proj": config.num_key_value_heads * head,
        "v_proj": config.num_key_value_heads * head,
    }
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for target in targets:
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            a = rng.uniform(-1, 1, (rank, hidden)) / np.sqrt(hidden)
            b = rng.normal(0, scale, (width[target], rank))
            tensors[f"{prefix}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = b.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "inference_mode": True,
    }
    # Last, because its presence marks a whole folder.
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")


# --- the base ----------------------------------------------------------------------------------------


def endless_base(name: str, folder: Path) -> Path:
    """Write the model folder of a base without end tokens, so that each answer has its full length in every system."""
    if (folder / "config.json").exists():
        return folder
    base = load_base(name, dtype="float32")
    assert base.tokenizer is not None
    base.model.config.eos_token_id = None
    base.tokenizer.pad_token = base.tokenizer.pad_token or base.tokenizer.eos_token
    base.tokenizer.eos_token = None
    if base.model.generation_config is not None:
        base.model.generation_config.eos_token_id = None
    temporary = folder.with_name(f"{folder.name}-{os.getpid()}")
    base.model.save_pretrained(temporary, max_shard_size="1TB")
    base.tokenizer.save_pretrained(temporary)
    os.replace(temporary, folder)
    return folder

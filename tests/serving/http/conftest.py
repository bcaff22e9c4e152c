from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from playground_site import Site, site_of
from served import live, serve
from tiny_tokenizer import tiny_encoder_tokenizer, tiny_tokenizer
from whole import LABELS, save, write

import lorakit

__all__ = ["live", "serve"]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    sizes = {"vocab_size": len(tiny_tokenizer()), "max_position_embeddings": 256}
    base = save(folder / "base", tiny_models.build("llama", **sizes), tiny_tokenizer())
    for seed, name in enumerate(("e2e", "sql"), start=1):
        method = lorakit.LoRA(rank=4, alpha=8, targets="all-linear")
        write(
            base,
            folder / "adapters" / name,
            method,
            seed=seed,
            head={},
            task="completion",
            labels=[],
        )
    return folder


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    tokenizer = tiny_encoder_tokenizer()
    base = save(
        folder / "base", tiny_models.build("bert", "base", vocab_size=len(tokenizer)), tokenizer
    )
    for seed, (name, labels) in enumerate(LABELS.items(), start=1):
        head = (
            {"task": "sequence-classification", "num_labels": len(labels)}
            if labels
            else {"task": "regression"}
        )
        method = lorakit.LoRA(rank=4, alpha=8, targets="attention.qv", train_modules=["classifier"])
        task = "classification" if labels else "regression"
        write(
            base, folder / "adapters" / name, method, seed=seed, head=head, task=task, labels=labels
        )
    return folder


@pytest.fixture
def site(text: Path, live: Any, tmp_path: Path) -> Iterator[Site]:
    """A server of its own, since some tests unload adapters."""
    folder = shutil.copytree(text, tmp_path / "text")
    with site_of(folder, live, allow_loading=True) as found:
        yield found

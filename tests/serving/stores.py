"""Stores of adapters on a tiny model, and the answers that their leases must give."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from random_adapters import randomise
from tiny_tokenizer import tiny_tokenizer

import lorakit
from lorakit.methods.method import Method
from lorakit.models.loading import Base
from lorakit.models.sources import ModelSource
from lorakit.serving.store import AdapterStore, Lease

TENSORS = "adapter_model.safetensors"
LORA = lorakit.LoRA(rank=2, alpha=4, targets="attention.qv")
LARGE = 10**9
VOCABULARY = len(tiny_tokenizer())
IDS = torch.tensor([[5, 6, 7, 8]])


def open_base(arch: str = "llama", head: str | None = None, **fields: Any) -> Base:
    """Return a base as `load_base` does."""
    new = fields.pop("new_weights", [])
    model = tiny_models.build(arch, head, vocab_size=VOCABULARY, **fields)
    return Base(
        model,
        tiny_tokenizer(),
        ModelSource(name="tiny", path_or_id="tiny", kind="folder"),
        new_weights=new,
    )


def write_adapter(
    folder: Path,
    *,
    seed: int = 0,
    method: Method = LORA,
    tokenizer: Any = None,
    base: Base | None = None,
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Write a random adapter of the tiny base; a present folder is replaced in one step."""
    model = (base or open_base()).model
    handle = lorakit.attach(model, method, name="x", seed=seed)
    randomise(handle, seed=seed)
    handle.save(folder, tokenizer=tokenizer, provenance=provenance, overwrite=True)
    handle.detach()
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four adapters, a to d, of one size."""
    root = tmp_path_factory.mktemp("made")
    for i, name in enumerate("abcd"):
        write_adapter(root / name, seed=i)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A folder of its own with these adapters."""
    shutil.copytree(made, tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def store(root: Path) -> AdapterStore:
    return AdapterStore(open_base(), root, budget=LARGE)


def size_of_one(root: Path) -> int:
    store = AdapterStore(open_base(), root, budget=LARGE)
    store.acquire("a").release()
    return store.stats().bytes


@torch.no_grad()
def answer(store: AdapterStore, lease: Lease) -> torch.Tensor:
    """Return the logits under a lease, in a packed batch."""
    ((name, weight),) = lease.blend or (("", 0),)
    with store.handle.per_token([({name: weight} if name else None, 4)]):
        return store.base.model(IDS).logits


@torch.no_grad()
def alone(folder: Path) -> torch.Tensor:
    """Return the logits of the adapter in a folder, on a base of its own."""
    model = open_base().model
    lorakit.load(model, folder, name="x")
    return model(IDS).logits


def tensors_on_model(store: AdapterStore, lease: Lease) -> dict[str, torch.Tensor]:
    """Return the tensors of the lease's one adapter, by their names in PEFT's file."""
    ((name, _),) = lease.blend
    return {
        f"base_model.model.{path}.{part}.weight": getattr(module, part).detach().clone()
        for path, module in store.handle.modules(name).items()
        for part in ("lora_A", "lora_B")
    }


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def join_collector(store: AdapterStore) -> None:
    """Wait until the thread that removes adapters from the model has ended, if one runs."""
    if (collector := store._loaded._collector) is not None:
        collector.join()


def settle(store: AdapterStore) -> None:
    """Wait until the adapters that no name and no lease refers to have left the model."""
    join_collector(store)
    store._loaded.collect()


@contextmanager
def engine_thread() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Yield a function that runs an action in another thread, as an engine does between its steps."""
    with ThreadPoolExecutor(1) as thread:
        yield lambda action: thread.submit(action).result(30)

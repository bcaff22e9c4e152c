"""Invalid stored adapters are rejected."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from at_rest import (
    adapter,
    contiguous,
    convolution,
    embedding,
    fused,
    interleaved,
    linear,
    numbers,
)

from lorakit.adapters import formats
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.errors import AdapterFileError
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora import LoRA


@pytest.mark.parametrize(
    ("layer", "rank"),
    [
        (linear(rank=2), 2),
        (fused(*contiguous(4, 0, 2), rank=2), 2),
        (fused(*interleaved(2, 3, 1), rank=2), 2),
        (embedding(rank=3), 3),
        (convolution(rank=4), 4),
        (convolution(rank=4, groups=2), 4),
    ],
)
def test_rank(layer: StoredLayer, rank: int):
    assert layer.rank == rank


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "dense"}, "kind of layer is 'dense'"),
        ({"B": numbers(8, 3)}, r"A has shape \(2, 6\) and B has shape \(8, 3\)"),
        ({"A": numbers(2, 6, 1)}, "linear layer needs A"),
        ({"A": numbers(2, 6)[0]}, "linear layer needs A"),
        ({"scaling": 0.0}, "scaling is 0.0"),
        ({"scaling": float("inf")}, "scaling is inf"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"A": numbers(2, 6) * float("nan")}, "A holds 12 values that are NaN"),
        ({"B": numbers(8, 2).masked_fill(torch.eye(8, 2) > 0, float("inf"))}, "B holds 2 values"),
        ({"A": torch.ones(2, 6, dtype=torch.int64)}, "A holds int64 numbers"),
        ({"A": torch.ones(0, 6)}, r"A is empty: its shape is \(0, 6\)"),
        ({"A": torch.ones(2, 6).to_sparse()}, "not a dense tensor"),
        ({"A": [[1.0]]}, "A is a list"),
        ({"magnitude": numbers(7)}, r"magnitude has shape \(7,\); \(8,\)"),
        ({"initial_A": numbers(2, 6)}, "is missing; both or neither were expected"),
        ({"initial_A": numbers(2, 6), "initial_B": numbers(8, 1)}, "initial_B has shape"),
        ({"base_norms": numbers(8)}, "base_norms has shape"),
        ({"slices": contiguous(8, 0)}, None),
        ({"slices": contiguous(4, 0, 1)}, r"needs A \(2 \* rank, in\) and B \(8, rank\)"),
        ({"slices": (*contiguous(4, 0), *contiguous(2, 0, 1))}, "linear layer needs A"),
    ],
)
def test_what_a_layer_refuses(change: dict, message: str | None):
    layer = linear()
    if message is None:
        replace(layer, **change)
        return
    with pytest.raises(AdapterFileError, match=message):
        replace(layer, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": numbers(6, 2, 3, 3)}, "conv layer needs A"),
        ({"B": numbers(6, 2, 1)}, "conv layer needs A"),
        ({"A": numbers(3, 4, 3, 3)}, "conv layer needs A"),
        ({"A": numbers(2, 4), "B": numbers(6, 2)}, "conv layer needs A"),
    ],
)
def test_what_a_convolution_refuses(change: dict, message: str):
    with pytest.raises(AdapterFileError, match=message):
        replace(convolution(), **change)


def test_an_adapter_holds_something():
    with pytest.raises(AdapterFileError, match="no lora_A and lora_B"):
        StoredAdapter(method=LoRA())
    with pytest.raises(AdapterFileError, match="no tensors"):
        StoredAdapter(method=FullFineTuning())
    with pytest.raises(AdapterFileError, match=r"'head\.weight' holds 1 values that are NaN"):
        adapter({"a": linear()}, trained={"head.weight": torch.tensor([1.0, float("nan")])})


@pytest.mark.parametrize("name", ["", "adapter"])
def test_an_unfinished_run_is_named_with_the_command_that_finishes_it(tmp_path, name) -> None:
    run = tmp_path / "a run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    command = f"lorakit train --config '{run}/config.yaml' --resume --output '{run}'"
    unfinished = "is a run without an adapter: it is unfinished, or its adapter was deleted."
    expected = f"'{run}' {unfinished} Finish it: {command}"
    with pytest.raises(AdapterFileError, match=f"^{re.escape(expected)}.$"):
        formats.read(run / name)
    (run / "best").mkdir()  # empty: neither the best adapter nor a reason to name one
    with pytest.raises(AdapterFileError, match=f"^{re.escape(expected)}.$"):
        formats.read(run / name)
    formats.write(adapter({"a": linear(6, 8, 2)}), run / "best")
    best = f"{expected}, or use its best adapter, '{run}/best'."
    with pytest.raises(AdapterFileError, match=f"^{re.escape(best)}$"):
        formats.read(run / name)

"""The limit: operations and bytes counted by hand and by PyTorch, and rates that slow samples do not change."""

from __future__ import annotations

import dataclasses
import random

import pytest
import tiny_models
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import limit
from benchmarks.limit import (
    Counts,
    Shapes,
    counts_of,
    moved_bytes,
    operations,
    sample_bandwidth,
    sample_rate,
    settled,
    shapes_of,
)
from lorakit.compute.last_block import last_block


def example(tokens: list[int], targets: int) -> dict[str, list[int]]:
    """Return an example whose last tokens are targets."""
    labels = [-100] * (len(tokens) - targets) + tokens[-targets:]
    return {"input_ids": tokens, "labels": labels}


def test_a_shared_prefix_is_counted_once() -> None:
    batch = [example([5, 6, 7, 8], 2), example([5, 6, 9], 1), example([4, 6, 7], 1)]
    # 5 6 7 (8), then 5 6 (9), then 4 6 (7). Tokens are shared only with the same prefix. The targets in parentheses
    # end their example, so they do not count.
    assert counts_of(batch, "completion") == Counts(
        tokens=3 + 2,
        read=2 + 1,  # 5 6 predicts both 7 and 9
        pairs=(1 + 2 + 3) + (1 + 2),
        read_pairs=2 + 3 + 2,
    )


def test_the_same_example_twice_is_one() -> None:
    once = [example([5, 6, 7, 8], 2)]
    assert counts_of(once * 2, "completion") == counts_of(once, "completion")


def test_a_classifier_shares_nothing_and_sees_both_ways() -> None:
    batch = [{"input_ids": [1, 2, 3], "labels": 0}, {"input_ids": [1, 2], "labels": 1}]
    assert counts_of(batch, "classification") == Counts(
        tokens=5, read=2, pairs=9 + 4, read_pairs=3 + 2
    )


SHAPES = Shapes(
    linear={(2, 3): 4, (3, 2): 1},
    first=6,
    last=9,
    head=(2, 7),
    last_outputs=5,
    attention_width=5,
    blocks=2,
)
COUNTS = Counts(tokens=5, read=3, pairs=15, read_pairs=8)


def test_operations_by_hand() -> None:
    # 4 x 30 weights x 5 tokens, minus 2 x 6 x 5, minus 4 x 9 x 2 tokens that are not read
    linear = 600 - 60 - 72
    # 4 x 14 weights of the head x 3 tokens, plus 12 x 5 x the pairs of the first and the last block
    assert operations(SHAPES, COUNTS) == linear + 168 + 12 * 5 * (15 + 8)


def test_bytes_by_hand() -> None:
    # 30 weights of the blocks and 14 of the head twice, except for the 6 that only the forward pass reads
    weights = 2 * (30 + 14) - 6
    # 4 x 3 + 2 outputs x 5 tokens, minus 5 of the last block x 2 tokens that are not read; written and read
    outputs = 2 * (14 * 5 - 5 * 2)
    assert moved_bytes(SHAPES, COUNTS, torch.float32) == 4 * (weights + outputs)
    assert moved_bytes(SHAPES, COUNTS, torch.bfloat16) == 2 * (weights + outputs)
    assert moved_bytes(SHAPES, COUNTS, torch.bfloat16, checkpointing=True) == 2 * weights


@pytest.fixture
def llama():
    return tiny_models.build("llama").requires_grad_(False)


def counted(model, read: torch.Tensor | None = None) -> int:
    """Return PyTorch's count, forward and backward, for a row of tokens whose embeddings need a gradient."""
    inputs = torch.randn(1, LENGTH, model.config.hidden_size, requires_grad=True)
    at = torch.arange(LENGTH) if read is None else read
    with (
        FlopCounterMode(display=False) as counter,
        last_block(model).restricted_to(lambda: at, (1, LENGTH)),
    ):
        hidden = model.model(inputs_embeds=inputs).last_hidden_state
        model.lm_head(hidden[:, at]).sum().backward()
    return counter.get_total_flops()


LENGTH = 7


def test_operations_are_those_that_pytorch_counts(llama) -> None:
    """Every token is read and attends to all tokens, and its embedding needs a gradient."""
    shapes = dataclasses.replace(shapes_of(llama, "completion"), first=0)
    pairs = LENGTH**2
    counts = Counts(tokens=LENGTH, read=LENGTH, pairs=pairs, read_pairs=pairs)
    # PyTorch also counts the small product of rotary embeddings, which is below 1 %.
    assert operations(shapes, counts) == pytest.approx(counted(llama), rel=0.01)


def test_what_is_not_read_is_not_computed(llama) -> None:
    """lorakit skips the same operations as the limit, except the queries of the last block."""
    shapes = dataclasses.replace(shapes_of(llama, "completion"), first=0)
    pairs = LENGTH**2
    counts = Counts(tokens=LENGTH, read=2, pairs=pairs, read_pairs=pairs)
    queries = 4 * llama.model.layers[-1].self_attn.q_proj.weight.numel() * (LENGTH - 2)
    found = counted(llama, read=torch.tensor([3, 5]))
    assert operations(shapes, counts) + queries == pytest.approx(found, rel=0.01)


def test_below_the_first_block_nothing_needs_a_gradient(llama) -> None:
    attention = llama.model.layers[0].self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    assert shapes_of(llama, "completion").first == sum(p.weight.numel() for p in projections)


def test_the_outputs_are_those_of_the_blocks_linear_layers(llama) -> None:
    """Every token is read: the bytes are the weights, twice, and what the linear layers write."""
    written = 0

    def count(module, inputs, output) -> None:
        nonlocal written
        written += output.numel()

    layers = [m for m in llama.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(count)
    llama.model(torch.zeros(1, LENGTH, dtype=torch.long))
    shapes = shapes_of(llama, "completion")
    counts = Counts(tokens=LENGTH, read=LENGTH, pairs=0, read_pairs=0)
    weights = sum(layer.weight.numel() for layer in [*layers, llama.lm_head])
    expected = 2 * weights - shapes.first + 2 * written
    assert moved_bytes(shapes, counts, torch.float32) == 4 * expected


def test_tokens_that_are_not_read_need_keys_and_values_of_the_last_block_only(llama) -> None:
    last = llama.model.layers[-1]
    layers = [m for m in last.modules() if isinstance(m, torch.nn.Linear)]
    kept = {last.self_attn.k_proj, last.self_attn.v_proj}
    outputs = sum(layer.out_features for layer in layers if layer not in kept)
    assert shapes_of(llama, "completion").last_outputs == outputs


def test_a_sample_is_a_positive_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sample_rate(SHAPES, COUNTS, torch.float32) > 0
    monkeypatch.setattr(limit, "ARRAY_BYTES", 2**16)
    assert sample_bandwidth() > 0


def test_busy_moments_do_not_move_the_rate() -> None:
    quiet = [random.Random(0).uniform(99, 101) for _ in range(12)]
    assert settled([*quiet, *[20.0] * 10]) == pytest.approx(100, abs=2)
    assert settled([7.0]) == 7
    assert settled([3.0, 9.0, 5.0]) == 7  # the median of the two faster samples

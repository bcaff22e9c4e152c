"""The limit: operations counted by hand and by PyTorch, and a rate that a busy moment does not move."""

from __future__ import annotations

import random

import pytest
import tiny_models
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.limit import Counts, Shapes, counts_of, operations, sample_rate, settled, shapes_of


def example(tokens: list[int], targets: int) -> dict[str, list[int]]:
    """An example whose last tokens are its targets."""
    labels = [-100] * (len(tokens) - targets) + tokens[-targets:]
    return {"input_ids": tokens, "labels": labels}


def test_a_shared_prefix_is_counted_once() -> None:
    batch = [example([5, 6, 7, 8], 2), example([5, 6, 9], 1), example([4, 6, 7], 1)]
    # 5 6 7 8, then 9 behind 5 6, then all of 4 6 7: a token is the same only behind the same ones.
    assert counts_of(batch, "completion") == Counts(
        tokens=4 + 1 + 3, targets=2 + 1 + 1, pairs=(1 + 2 + 3 + 4) + 3 + (1 + 2 + 3)
    )


def test_the_same_example_twice_is_one() -> None:
    once = [example([5, 6, 7, 8], 2)]
    assert counts_of(once * 2, "completion") == counts_of(once, "completion")


def test_a_classifier_shares_nothing_and_sees_both_ways() -> None:
    batch = [{"input_ids": [1, 2, 3], "labels": 0}, {"input_ids": [1, 2], "labels": 1}]
    assert counts_of(batch, "classification") == Counts(tokens=5, targets=2, pairs=9 + 4)


def test_operations_by_hand() -> None:
    shapes = Shapes(linear={(2, 3): 4, (3, 2): 1}, head=(2, 7), attention_width=10)
    assert shapes.weights == 30
    # 4 x 30 weights x 5 tokens + 4 x 14 weights of the head x 2 targets + 12 x 10 x 15 pairs
    assert operations(shapes, Counts(tokens=5, targets=2, pairs=15)) == 600 + 112 + 1800


def test_operations_are_those_that_pytorch_counts() -> None:
    """Forward and backward through frozen weights, every token a target that attends to all."""
    length = 7
    model = tiny_models.build("llama").requires_grad_(False)
    inputs = torch.randn(1, length, model.config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=inputs).logits.sum().backward()
    everything = Counts(tokens=length, targets=length, pairs=length**2)
    counted = counter.get_total_flops()
    # Rotary embeddings are a product too, of two numbers a position: less than one in a hundred.
    assert operations(shapes_of(model, "completion"), everything) == pytest.approx(
        counted, rel=0.01
    )


def test_a_sample_is_a_positive_rate() -> None:
    shapes = Shapes(linear={(8, 8): 2}, head=(8, 16), attention_width=8)
    assert sample_rate(shapes, Counts(tokens=4, targets=2, pairs=10), torch.float32) > 0


def test_busy_moments_do_not_move_the_rate() -> None:
    quiet = [random.Random(0).uniform(99, 101) for _ in range(12)]
    assert settled([*quiet, *[20.0] * 10]) == pytest.approx(100, abs=2)
    assert settled([7.0]) == 7
    assert settled([3.0, 9.0, 5.0]) == 7  # of three the faster two

"""Every backward pass adds the gradients of a repeated row in the same order, also with several threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny_models
import torch
from torch import Tensor

from lorakit.compute.objective import HeadPath, LanguageModellingLoss
from lorakit.methods.prefix_modules import VirtualPositions
from lorakit.methods.virtual_tokens import PREFIX_START

COUNT = 1200
"""Rows to add. PyTorch uses one thread for fewer than 32,768 numbers."""


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def assert_same(loss: Tensor, tensor: Tensor) -> None:
    first, *others = (torch.autograd.grad(loss, tensor, retain_graph=True)[0] for _ in range(8))
    assert first.abs().max() > 0
    assert all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize(
    ("arch", "path"),
    [("llama", "fused"), ("gemma2", "own head"), ("llama", "whole logits")],
)
def test_targets_of_one_position(arch: str, path: HeadPath) -> None:
    """Several references of one prompt."""
    model = tiny_models.build(arch)
    at = torch.arange(COUNT) % 7
    batch = {
        "input_ids": torch.arange(3, 11)[None],
        "target_at": at,
        "read_at": at.unique(),
        "targets": at,
        "target_weights": torch.ones(COUNT),
    }
    logits = LanguageModellingLoss(path=path).logits(model, batch)
    assert_same((logits * torch.randn_like(logits)).sum(), model.get_input_embeddings().weight)


def test_a_virtual_token_in_many_rows() -> None:
    ids = torch.arange(PREFIX_START, PREFIX_START + 8).repeat(COUNT // 8, 1)
    vectors = torch.randn(8, 32, requires_grad=True)
    hidden = VirtualPositions.of(ids).put(torch.zeros(*ids.shape, 32), vectors, prefix=8)
    assert_same((hidden * torch.randn_like(hidden)).sum(), vectors)

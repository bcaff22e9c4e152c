"""Digests of weights that were computed before are only used while the weights are the same."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lorakit.models import digests as module
from lorakit.models.digests import digests, known_digests, remember


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(3,), (64, 48), (7, 5, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_digests_are_known_while_a_weight_is_unchanged(
    dtype: torch.dtype, shape: tuple[int, ...], transposed: bool
) -> None:
    weight = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    weight = weight.mT if transposed and weight.ndim > 1 else weight
    assert known_digests([weight]) is None
    remember([weight], digests(weight))
    assert known_digests([weight]) == digests(weight)
    assert known_digests([weight.clone()]) is None


def _step(weight: Tensor) -> None:
    parameter = nn.Parameter(weight)
    parameter.grad = torch.ones_like(weight)
    torch.optim.AdamW([parameter], fused=True).step()


def _move(weight: Tensor) -> None:
    weight.data = weight.data.clone()


CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda w: w.view(-1)[1].add_(1),
    "through data": lambda w: w.data.mul_(1.001),
    "through numpy": lambda w: w.numpy().__imul__(2),
    "by a fused optimizer": _step,
    "to other memory": _move,
}


@pytest.mark.parametrize("name", CHANGES)
def test_digests_are_unknown_after_a_change(name: str) -> None:
    weight = torch.randn(64, 48)
    remember([weight], digests(weight))
    CHANGES[name](weight)
    assert known_digests([weight]) is None


def test_digests_of_a_deleted_weight_are_forgotten() -> None:
    weight = torch.randn(8)
    remember([weight], digests(weight))
    assert weight in module._KNOWN
    gc.collect()  # weights of other tests
    count = len(module._KNOWN)
    del weight
    gc.collect()
    assert len(module._KNOWN) == count - 1


def test_inference_tensors_are_never_known() -> None:
    with torch.inference_mode():
        weight = torch.randn(8)
    remember([weight], digests(weight))
    assert known_digests([weight]) is None

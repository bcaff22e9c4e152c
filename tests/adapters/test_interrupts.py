"""A KeyboardInterrupt at any point leaves a model that can be restored."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from random_adapters import randomise
from torch import nn

from lorakit.adapters import Adapters, attach
from lorakit.methods.lora.method import LoRA

# Python ignores the error of a generator that is interrupted while it is closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def interrupted_at(point: int, action: Callable[[], object]) -> bool:
    """Raise KeyboardInterrupt inside `action`, and return False if it has fewer points.

    The points are those where Python handles signals: the start of a function and the end of a built-in one. Only those
    of lorakit, of contextlib, and of the functions that lorakit calls count. Those of threading do not: it is Python
    itself that leaves a Condition locked, for all tests after it.
    """
    count = 0

    def is_ours(frame: FrameType | None) -> bool:
        name = "" if frame is None else frame.f_code.co_filename
        return "/src/lorakit/" in name or name.endswith("contextlib.py")

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        if frame.f_code.co_filename.endswith("threading.py"):
            return
        if event in ("call", "c_return") and (is_ours(frame) or is_ours(frame.f_back)):
            count += 1
            if count == point:
                sys.setprofile(None)
                raise KeyboardInterrupt

    # An interrupt in torch.no_grad leaves gradients off.
    with torch.set_grad_enabled(torch.is_grad_enabled()), contextlib.suppress(KeyboardInterrupt):
        sys.setprofile(profile)
        try:
            action()
        finally:
            sys.setprofile(None)
    return count >= point


def adapted() -> tuple[nn.Module, Adapters]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    adapters = attach(model, LoRA(rank=2, targets="0", bias="all", train_modules="1"))
    randomise(adapters)
    return model, adapters


@pytest.mark.slow
@pytest.mark.parametrize("change", ["merge", "unmerge", "activate None", "activate"])
def test_an_interrupted_change_can_be_undone(change: str) -> None:
    model, adapters = adapted()
    expected = model(X)
    adapters.activate(None)
    base = model(X)
    adapters.activate("default")
    point = 1
    while True:
        if change == "unmerge":
            adapters.merge()
        if change == "activate":
            adapters.activate(None)
        action = {
            "merge": adapters.merge,
            "unmerge": adapters.unmerge,
            "activate None": lambda: adapters.activate(None),
            "activate": lambda: adapters.activate("default"),
        }[change]
        if not interrupted_at(point, action):
            break
        with torch.no_grad():
            if change == "unmerge":
                torch.testing.assert_close(model(X), expected)
            if adapters.merged:
                adapters.unmerge()
            torch.testing.assert_close(model(X), expected if adapters.active else base)
            adapters.activate(None)
            assert torch.equal(model(X), base)
            assert not any("holds_merged_weights" in key for key in model.state_dict())
            adapters.activate("default")
            assert torch.equal(model(X), expected)
        point += 1
    assert point > 20
    adapters.detach()
    assert torch.equal(model(X), base)


def test_an_interrupted_block_does_not_stay_open() -> None:
    model, adapters = adapted()
    expected = model(X)

    def block() -> None:
        with adapters.disabled():
            pass

    point = 1
    while interrupted_at(point, block):
        assert torch.equal(model(X), expected)
        adapters.activate("default")
        adapters._refuse_open_blocks("test")
        point += 1
    assert point > 20
    with contextlib.suppress(KeyboardInterrupt), adapters.disabled():
        raise KeyboardInterrupt
    adapters.detach()

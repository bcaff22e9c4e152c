"""The private names of PyTorch that detect running checkpoints: these tests fail first when they move."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorakit.errors import AdapterStateError
from lorakit.models.checkpoints import Checkpoint, forbid_recomputation, running_checkpoints

BOTH = pytest.mark.parametrize("use_reentrant", [False, True])


def input_tensor() -> Tensor:
    return torch.ones(2, requires_grad=True)


@BOTH
def test_both_runs_have_the_same_key(use_reentrant: bool) -> None:
    runs: list[list[Checkpoint]] = []

    def block(x: Tensor) -> Tensor:
        runs.append(running_checkpoints())
        return x.sin()

    checkpoint(block, input_tensor(), use_reentrant=use_reentrant).sum().backward()
    (first,), (second,) = runs
    assert not first.is_recomputation
    assert second.is_recomputation
    assert first.key is second.key


@BOTH
def test_keys_of_two_checkpoints_differ_and_die_with_them(use_reentrant: bool) -> None:
    keys: list = []

    def block(x: Tensor) -> Tensor:
        keys.append(running_checkpoints()[0].key)
        return x.sin()

    outputs = [checkpoint(block, input_tensor(), use_reentrant=use_reentrant) for _ in range(2)]
    assert keys[0] is not keys[1]
    references = [weakref.ref(key) for key in keys]
    assert all(reference() is not None for reference in references)
    keys.clear()
    del outputs
    gc.collect()
    assert all(reference() is None for reference in references)


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_nested_checkpoints(outer: bool, inner: bool) -> None:
    runs: list[list[bool]] = []

    def innermost(x: Tensor) -> Tensor:
        runs.append([run.is_recomputation for run in running_checkpoints()])
        return x.sin()

    def block(x: Tensor) -> Tensor:
        return checkpoint(innermost, x, use_reentrant=inner).cos()

    checkpoint(block, input_tensor(), use_reentrant=outer).sum().backward()
    assert sorted(runs[0]) in ([False], [False, False])  # a reentrant outer one disables gradients
    assert all(any(run) for run in runs[1:])
    assert len(runs) >= 2


def test_no_checkpoint() -> None:
    assert running_checkpoints() == []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):  # of other code
        assert running_checkpoints() == []
    with torch.no_grad():
        assert running_checkpoints() == []
    with torch.inference_mode():
        assert running_checkpoints() == []


def test_hooks_of_other_code_stay_in_their_order() -> None:
    packed: list[str] = []

    def hooks(name: str):
        return torch.autograd.graph.saved_tensors_hooks(
            lambda x: (packed.append(name), x)[1], lambda x: x
        )

    with hooks("outer"), hooks("inner"):
        running_checkpoints()
        input_tensor().sin()
    input_tensor().sin()
    assert packed == ["inner"]


@BOTH
def test_a_forbidden_recomputation_raises_the_error(use_reentrant: bool) -> None:
    keys: list = []

    def block(x: Tensor) -> Tensor:
        keys.append(running_checkpoints()[0].key)
        return x.sin()

    output = checkpoint(block, input_tensor(), use_reentrant=use_reentrant).sum()
    forbid_recomputation(keys[0], ZeroDivisionError("forbidden"))
    with pytest.raises(ZeroDivisionError, match="forbidden"):
        output.backward()


def test_a_checkpoint_of_an_unknown_form_is_an_error() -> None:
    """Without it, a recomputation would use the adapters that are active then."""

    def pack_hook(x: Tensor) -> Tensor:
        return x

    pack_hook.__module__ = "torch.utils.checkpoint"
    hooks = torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda x: x)
    with hooks, pytest.raises(AdapterStateError, match="marks its checkpoints in another way"):
        running_checkpoints()

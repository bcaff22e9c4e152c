"""Tensors in a parameter's place are seen by the call that they are for, and by no other."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.models.parameter_swaps import (
    hidden_parameters,
    hide_parameters,
    show_parameters,
    with_parameters,
)

TIMEOUT = 10.0
"""Seconds after which a thread counts as waiting for ever."""


class Scale(nn.Module):
    """Returns its weight after `inside` has run, which a test uses to act during the call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, hide: Tensor | None, inside: Callable[[], Any] = lambda: None) -> Tensor:
        inside()
        return self.weight.detach().clone()


def before(layer: nn.Module, args: tuple) -> None:
    hide_parameters(layer, lambda _: {} if args[0] is None else {"weight": args[0]})


def after(layer: nn.Module, args: tuple, output: Any) -> None:
    show_parameters(layer)


def hooked() -> Scale:
    layer = Scale()
    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after, always_call=True)
    return layer


def interrupt() -> None:
    raise KeyboardInterrupt


TWO, THREE = torch.tensor([2.0]), torch.tensor([3.0])


class Thread(threading.Thread):
    """A thread that returns the result of its function, or raises if it has none in time."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.function = function
        self.result: list[Any] = []
        self.start()

    def run(self) -> None:
        self.result.append(self.function())

    def wait(self) -> Any:
        self.join(TIMEOUT)
        assert self.result, "the thread still waits, or has failed"
        return self.result[0]


def in_thread(function: Callable[[], Any]) -> Any:
    return Thread(function).wait()


def assert_own(layer: nn.Module) -> None:
    """Nothing is hidden, and nothing but the module's own attributes is left on it."""
    assert vars(layer).keys() == vars(Scale()).keys()
    assert layer.weight is layer._parameters["weight"]


# --- hooks ------------------------------------------------------------------------------------------


def test_the_call_sees_the_tensor_and_nothing_stays() -> None:
    layer = hooked()
    assert layer(TWO).item() == 2
    assert_own(layer)
    assert layer(None).item() == 1


def test_the_tensors_are_computed_from_the_own_parameters() -> None:
    layer = Scale()
    layer.register_forward_pre_hook(
        lambda m, args: hide_parameters(m, lambda m: {"weight": 2 * m.weight})
    )
    layer.register_forward_hook(after, always_call=True)
    inner = []
    assert layer(None, lambda: inner.append(layer(None))).item() == 2
    assert inner[0].item() == 2
    assert_own(layer)


def test_a_call_inside_a_call_has_its_own_tensors() -> None:
    layer, inner = hooked(), []
    outer = layer(TWO, lambda: inner.extend([layer(THREE), layer(None), layer.weight]))
    assert [tensor.item() for tensor in inner] == [3, 1, 2]
    assert outer.item() == 2
    assert_own(layer)


def test_a_call_inside_a_call_that_fails_leaves_the_outer_tensors() -> None:
    """Also if it fails before its own pre-hook has run."""
    layer = hooked()

    def refuse(layer: nn.Module, args: tuple) -> None:
        if args[0] is THREE:
            raise ValueError("refused")

    layer.register_forward_pre_hook(refuse, prepend=True)
    layer.register_forward_pre_hook(lambda *_: None)

    def fail() -> None:
        with pytest.raises(ValueError, match="refused"):
            layer(THREE)

    assert layer(TWO, fail).item() == 2
    assert_own(layer)


@pytest.mark.parametrize("hides", [TWO, None], ids=["hides", "hides nothing"])
def test_another_thread_waits_for_the_call(hides: Tensor | None) -> None:
    layer = hooked()
    inside, others = threading.Event(), []

    def other() -> Tensor:
        inside.wait(TIMEOUT)
        return layer(THREE)

    thread = Thread(other)

    def meanwhile() -> None:
        inside.set()
        thread.join(0.05)
        others.extend(thread.result)

    assert layer(hides, meanwhile).item() == (1 if hides is None else 2)
    assert not others
    assert thread.wait().item() == 3
    assert_own(layer)


def test_many_calls_in_two_threads() -> None:
    layer = hooked()
    work = torch.randn(16, 16)

    def calls(hide: Tensor | None) -> set[float]:
        return {layer(hide, lambda: work @ work).item() for _ in range(300)}

    threads = [Thread(lambda hide=hide: calls(hide)) for hide in (TWO, None)]
    assert [thread.wait() for thread in threads] == [{2.0}, {1.0}]
    assert_own(layer)


def test_an_exception_in_another_thread_leaves_the_tensors_of_this_call() -> None:
    """Its `always_call` hook runs, although its pre-hook has not."""
    layer = hooked()

    def refuse(layer: nn.Module, args: tuple) -> None:
        if args[0] is THREE:
            raise ValueError("refused")

    layer.register_forward_pre_hook(refuse, prepend=True)

    def fail() -> bool:
        with pytest.raises(ValueError, match="refused"):
            layer(THREE)
        return True

    assert layer(TWO, lambda: in_thread(fail)).item() == 2
    assert_own(layer)


@pytest.mark.parametrize("where", ["the call", "a hook after it", "a pre-hook after it"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_held_after_an_exception(where: str, error: type[BaseException]) -> None:
    layer = hooked()

    def fail(*_: Any) -> None:
        raise error

    handle = None
    if where == "a hook after it":
        handle = layer.register_forward_hook(fail, prepend=True)
    elif where == "a pre-hook after it":
        handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(error) as caught:  # its traceback keeps the frames of the call
        layer(TWO, fail if where == "the call" else lambda: None)
    if handle is not None:
        handle.remove()
    assert in_thread(lambda: layer(None)).item() == 1
    assert layer(THREE).item() == 3
    assert_own(layer)
    assert caught.tb is not None


def test_this_thread_cleans_up_after_an_interrupted_call() -> None:
    layer = hooked()
    with pytest.raises(KeyboardInterrupt):
        layer(TWO, lambda: layer(THREE, interrupt))
    assert layer(None).item() == 1
    assert_own(layer)


def test_an_interrupted_call_inside_a_call() -> None:
    layer = hooked()

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            layer(THREE, interrupt)
        assert layer(None).item() == 1

    assert layer(TWO, interrupted).item() == 2
    assert_own(layer)


def test_a_waiting_thread_continues_when_the_call_is_interrupted() -> None:
    layer = hooked()
    inside = threading.Event()

    def other() -> Tensor:
        inside.wait(TIMEOUT)
        return layer(None)

    thread = Thread(other)

    def meanwhile() -> None:
        inside.set()
        thread.join(0.05)
        assert not thread.result
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        layer(TWO, meanwhile)
    assert thread.wait().item() == 1
    assert_own(layer)


def test_an_interrupted_module_is_freed() -> None:
    layer = hooked()
    reference = weakref.ref(layer)
    with pytest.raises(KeyboardInterrupt) as caught:
        layer(TWO, interrupt)
    del layer, caught
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_made_during_a_call_is_free(copied: Callable[[nn.Module], nn.Module]) -> None:
    layer, copies = hooked(), []
    layer(TWO, lambda: copies.append(copied(layer)))
    (twin,) = copies
    assert in_thread(lambda: twin(None)).item() == 1
    assert twin(THREE).item() == 3
    assert_own(twin)


# --- a block, and a call with other tensors ------------------------------------------------------------


def test_a_block_hides_and_shows_again() -> None:
    layer = Scale()
    with hidden_parameters(layer, {"weight": TWO}):
        assert layer(None).item() == 2
        with hidden_parameters(layer, {"weight": THREE}):
            assert layer(None).item() == 3
        assert layer(None).item() == 2
    assert_own(layer)
    with pytest.raises(KeyboardInterrupt), hidden_parameters(layer, {"weight": TWO}):
        interrupt()
    assert_own(layer)


def call_with(layer: nn.Module, tensors: dict[str, Tensor], *args) -> Tensor:
    with with_parameters(layer, tensors) as twin:
        return twin.forward(*args)


def test_a_copy_is_seen_by_no_other_thread() -> None:
    layer = Scale()
    during = []
    result = call_with(
        layer, {"weight": TWO}, None, lambda: during.append(in_thread(lambda: layer(None)))
    )
    assert result.item() == 2
    assert during[0].item() == 1
    assert_own(layer)


def test_a_copy_inside_a_block_that_hides_the_same_parameter() -> None:
    layer = Scale()
    with hidden_parameters(layer, {"weight": TWO}):
        assert call_with(layer, {"weight": THREE}, None).item() == 3
        assert layer(None).item() == 2


def test_a_copy_keeps_the_other_parameters_and_buffers() -> None:
    layer = nn.BatchNorm1d(4)
    x, weight = torch.randn(3, 4), torch.randn(4, requires_grad=True)
    twin = copy.deepcopy(layer)
    twin.weight = nn.Parameter(weight.detach().clone())
    output = call_with(layer, {"weight": weight}, x)
    torch.testing.assert_close(output, twin(x))
    assert torch.equal(layer.running_mean, twin.running_mean)
    assert layer.num_batches_tracked == 1
    output.tanh().sum().backward()
    twin(x).tanh().sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, twin.weight.grad)


def test_a_copy_a_forward_of_the_instance() -> None:
    """accelerate binds one to the layer, so only the layer's own parameters are read."""
    layer = nn.Linear(2, 2)
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)  # type: ignore[method-assign]
    x, weight = torch.randn(3, 2), torch.randn(2, 2)
    expected = 2 * (x @ weight.T + layer.bias)
    torch.testing.assert_close(call_with(layer, {"weight": weight}, x), expected)
    assert layer.weight is layer._parameters["weight"]

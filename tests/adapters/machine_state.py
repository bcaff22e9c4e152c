"""The state of `AdapterMachine`: a model, its reference, the choice it must follow, and the comparisons."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from effective_weights import LAYERS, EffectiveWeights, Method, PlainAdapter, SmallModel, Weights
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from lorakit.adapters import Adapters, handle_of
from lorakit.errors import AdapterStateError
from lorakit.methods.bitfit import BitFit
from lorakit.methods.lora.method import LoRA

BATCH = 3
LENGTH = 5
"""No batch by row has as many rows: in a model of unknown layout, such a batch is refused."""
IDS = torch.randint(7, (12, LENGTH), generator=torch.Generator().manual_seed(0))

Choice = str | dict[str, float] | None
T = TypeVar("T")

# --- what the rules draw -----------------------------------------------------------------------------

NAMES = ("a", "b", "c")
LINEARS = ("block.up", "block.down", "scores")
WEIGHTS = st.sampled_from([1.0, 0.5, -1.5])
ANY_CHOICE = (
    st.none()
    | st.sampled_from(NAMES)
    | st.dictionaries(st.sampled_from(NAMES), WEIGHTS, min_size=1, max_size=2)
)
# These depend on the machine's adapters, so that calls have an effect.
USED = st.runner().flatmap(lambda machine: st.sampled_from(sorted(machine.adapters)))
UNUSED = st.runner().flatmap(lambda machine: st.sampled_from(machine.unused()))
CHOICE = st.runner().flatmap(lambda machine: machine.valid_choices())
ROWS = st.lists(CHOICE, min_size=1, max_size=3)
REPEATS = st.sampled_from([1, 1, 2])
SPANS = st.lists(st.tuples(CHOICE, st.integers(1, 2 * LENGTH)), min_size=1, max_size=4)


def _lora(*paths: str, **options: Any) -> st.SearchStrategy[Method]:
    return st.builds(
        LoRA,
        rank=st.integers(1, 3),
        alpha=st.sampled_from([1.0, -2.0, 3.5]),
        scaling=st.sampled_from(["standard", "rslora"]),
        targets=st.lists(st.sampled_from(paths), min_size=1, unique=True).map(tuple),
        **{name: st.just(value) for name, value in options.items()},
    )


METHODS = (  # the first half can be combined by weight
    _lora(*LAYERS)
    | _lora(*LAYERS)
    | _lora("block.up", "scores")
    | _lora("block.down")
    | _lora(*LINEARS, bias="lora_only")
    | _lora("table", "block.up", "block.down", train_modules=("scores",))
    | _lora(*LINEARS, dora=True)
    | st.just(BitFit())
)


def weights_of(choice: Choice) -> Weights:
    if choice is None:
        return ()
    return ((choice, 1.0),) if isinstance(choice, str) else tuple(choice.items())


# --- the state ---------------------------------------------------------------------------------------


@dataclass
class OpenBlock:
    """An open `per_sample` or `per_token` block."""

    context: contextlib.AbstractContextManager[None]
    choices: tuple[Weights, ...]
    """The choice of each token of a batch."""


@dataclass(eq=False)
class Pass:
    """A forward pass that waits for its backward pass."""

    delay: int
    """Number of further operations before the backward pass."""
    other_thread: bool
    """Whether the backward pass runs in a new thread."""
    loss: Tensor
    gradients: list[tuple[Tensor, Tensor]]
    """Live tensors, each with the gradient that the backward pass must give."""
    names: set[str]
    """The adapters that acted in the forward pass, and those that were active."""
    source: object
    """Where it found its choice (`MachineState.source`)."""
    disturbed: bool
    """Whether weights were or have been merged, an adapter has been added, or one of `names` removed."""


def started(function: Callable[[], T]) -> Future[T]:
    """Run a function in a new thread."""
    executor = ThreadPoolExecutor(1)
    future = executor.submit(function)
    executor.shutdown(wait=False)
    return future


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Return what `detach` must restore: types, attributes, number of hooks, keys and requires_grad flags."""
    found: dict[str, object] = {"keys": list(model.state_dict())}
    for path, module in model.named_modules():
        hooks = {name: len(value) for name, value in vars(module).items() if "hooks" in name}
        found[path] = (type(module), list(vars(module)), hooks)
    found.update((name, p.requires_grad) for name, p in model.named_parameters())
    return found


def live_tensors(adapters: Adapters, name: str) -> dict[str, nn.Parameter]:
    """Return an adapter's tensors by the keys of `PlainAdapter`."""
    short = {"lora_A": "A", "lora_B": "B"}
    return {
        f"{path}.{short.get(key, key.removeprefix('trained.'))}": parameter
        for path, module in adapters.modules(name).items()
        for key, parameter in module.named_parameters()
    }


class MachineState(RuleBasedStateMachine):
    """A model with adapters, its reference, and the choice that the model must follow."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.generator = torch.Generator().manual_seed(0)
        self.model = SmallModel(0)
        self.model.scores.bias.requires_grad_(False)
        self.fresh = fingerprint(self.model)
        self.reference = EffectiveWeights({n: p.detach().clone() for n, p in self.base().items()})
        self.identities: dict[str, nn.Parameter] | None = self.base()
        """The base's parameters; None in a copy whose parameters may be replaced."""
        self.active: Weights = ()
        self.merged: Weights | None = None
        self.blocks: list[OpenBlock] = []
        self.passes: list[Pass] = []
        self.tolerance = 1e-10

    def teardown(self) -> None:
        while self.blocks:
            self.blocks.pop().context.__exit__(None, None, None)
        shutil.rmtree(self.folder)

    @property
    def handle(self) -> Adapters:
        adapters = handle_of(self.model)
        assert adapters is not None
        return adapters

    @property
    def adapters(self) -> dict[str, PlainAdapter]:
        return self.reference.adapters

    def base(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if ".adapters." not in n}

    def unused(self) -> list[str]:
        return [name for name in NAMES if name not in self.adapters]

    def valid_choices(self) -> st.SearchStrategy[Choice]:
        """Return the choices that the adapters permit."""
        linear = [name for name, adapter in sorted(self.adapters.items()) if adapter.linear]
        choices: st.SearchStrategy[Choice] = st.none() | st.sampled_from(sorted(self.adapters))
        if not linear:
            return choices
        return choices | st.dictionaries(st.sampled_from(linear), WEIGHTS, min_size=1, max_size=2)

    # Preconditions of the rules.

    def attached(self) -> bool:
        return bool(self.adapters)

    def unmerged(self) -> bool:
        return self.attached() and self.merged is None

    def unmerged_outside(self) -> bool:
        return self.unmerged() and not self.blocks

    def idle(self) -> bool:
        """Whether no pass waits for its backward pass, so that values may change."""
        return self.attached() and not self.passes

    # --- comparing -------------------------------------------------------------------------------------

    def choices(self) -> tuple[Weights, ...]:
        """Return the choice of each token in this thread's next forward pass."""
        return self.blocks[-1].choices if self.blocks else self.everywhere()

    def everywhere(self) -> tuple[Weights, ...]:
        """Return the choice of each token of a pass outside of every block."""
        choice = self.active if self.merged is None else self.merged
        return (choice,) * BATCH * LENGTH

    def source(self) -> object:
        """Return where the next forward pass finds its choice, and what is active beneath the blocks."""
        return bool(self.blocks), self.choices(), self.active

    def acting(self) -> set[str]:
        """Return the adapters of the next forward pass, and the active ones, whose trained copies are in place."""
        return {name for choice in (*self.choices(), self.active) for name, _ in choice}

    def ids(self) -> Tensor:
        return IDS[: len(self.choices()) // LENGTH]

    def check(self, actual: Tensor, choices: tuple[Weights, ...]) -> None:
        """Compare the output of a forward pass with the reference."""
        with torch.no_grad():
            expected = self.reference.forward(IDS[: len(choices) // LENGTH], choices, None)
        self.assert_close(actual, expected)

    def assert_close(self, actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(
            actual, expected, rtol=self.tolerance, atol=self.tolerance, check_dtype=False
        )

    def attempt(self, call: Callable[[], object], *, optional: bool = False) -> bool:
        """Call, and return whether it was done; it may be refused only if it is optional."""
        try:
            call()
        except AdapterStateError:
            assert optional, "refused without a reason"
            return False
        return True

    def assert_refused(self, call: Callable[[], object]) -> None:
        try:
            call()
        except AdapterStateError:
            return
        raise AssertionError("not refused")

    @invariant()
    def outputs_follow_the_choice(self) -> None:
        try:
            with torch.no_grad():
                output = self.model(self.ids())
        except AdapterStateError as error:
            raise AssertionError("forward refused without a reason") from error
        self.check(output, self.choices())

    @invariant()
    def handle_and_base_are_as_recorded(self) -> None:
        if self.adapters:
            assert set(self.handle.names) == set(self.adapters)
            assert self.handle.merged == dict(self.merged or ())
            if not self.blocks:
                assert self.handle.active == ({} if self.merged else dict(self.active))
        else:
            assert handle_of(self.model) is None
            assert fingerprint(self.model) == self.fresh
        if self.merged is not None:
            return
        replaced = {key for name, _ in self.active for key in self.adapters[name].trained}
        for name, parameter in self.base().items():
            if name not in replaced:
                assert torch.equal(parameter, self.reference.base[name]), name
                assert self.identities is None or parameter is self.identities[name], name

    @invariant()
    def backward_passes_have_the_gradients_of_their_forward_pass(self) -> None:
        for waiting in [waiting for waiting in self.passes if not waiting.delay]:
            self.passes.remove(waiting)
            self.check_backward(waiting)
        for waiting in self.passes:
            waiting.delay -= 1

    def check_backward(self, waiting: Pass) -> None:
        """Run a backward pass and compare its gradients; an error needs a reason."""
        for tensor, _ in waiting.gradients:
            tensor.grad = None
        try:
            if waiting.other_thread:
                started(waiting.loss.backward).result(60)
            else:
                waiting.loss.backward()
        except (AdapterStateError, CheckpointError):
            assert self.may_refuse(waiting), "backward refused without a reason"
        else:
            for tensor, expected in waiting.gradients:
                actual = torch.zeros_like(expected) if tensor.grad is None else tensor.grad
                self.assert_close(actual, expected)
        finally:
            for tensor, _ in waiting.gradients:
                tensor.grad = None

    def may_refuse(self, waiting: Pass) -> bool:
        """Return whether a recomputation may raise an error.

        Adapters have come or gone, weights have been merged or unmerged, or tensors trained in full have been swapped.
        """
        if waiting.disturbed:
            return True
        swapped = any(self.adapters[name].trained for name in self.acting() | waiting.names)
        return swapped and self.source() != waiting.source

"""Which adapters a forward pass uses: those of a checkpoint's first run, of an open block, or of `activate`.

A forward pass fixes its choice when it enters the model (`entry.enter`). The adapted layers read it from
`Activation.moment`. In order of precedence, the choice is that of

1. the first run, in the recomputation of a checkpointed block (`models/checkpoints.py`);
2. the innermost open block of this thread or task: `per_sample`, `per_token`, or a running `generate`;
3. `activate`, which every thread sees.

A block lives in a context variable, so tasks beside it do not see it. New threads start with an empty context and
see what `activate` set.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lorakit.adapters.choice import BASE, Choice
from lorakit.adapters.decoding import Decoding, Step
from lorakit.adapters.passes import Pass, RunningPasses
from lorakit.adapters.row_factors import RowFactors
from lorakit.errors import AdapterStateError
from lorakit.models.checkpoints import forbid_recomputation, running_checkpoints


class Moment(NamedTuple):
    """The choice and the state of a forward pass, for its adapted layers."""

    of_pass: Pass
    state: Any
    """See `Activation.state`."""
    active: Choice
    """What `activate` had set: it decides which trained copies replace base tensors."""


@dataclass(eq=False)
class Registered:
    """An adapter of the model. One that is added later under the same name is another object."""

    swaps: bool
    """Whether it has trained copies of base tensors, which replace these tensors while it is active."""
    read_directly: str | None
    """Path of a layer with a trained copy that the model may read without calling the layer."""


@dataclass(eq=False)
class _Block:
    """An open `per_sample` or `per_token` block, or a running `generate`."""

    activation: Activation
    choice: Choice
    adapters: dict[str, Registered]
    """The adapters of the choice when the block began."""
    is_generation: bool = False
    is_open: bool = True


_BLOCKS: ContextVar[tuple[_Block, ...]] = ContextVar("lorakit_blocks", default=())
"""The blocks of this thread or task, of all models, innermost last."""


class _Thread(threading.local):
    """State of one thread. Dynamo can trace it, unlike a context variable."""

    block: _Block | None = None
    """The innermost block that this thread opened outside asyncio tasks; it may have ended in another thread."""


@dataclass(eq=False)
class Activation:
    """The choice of one model's adapters, shared by all of its adapted layers.

    Gradient checkpointing recomputes a block in the backward pass, on a GPU in another thread. By then other adapters
    may be active, so `moment` records the choice of the first run and returns it in the recomputation.
    """

    active: Choice = BASE
    """What `activate` set."""
    adapters: dict[str, Registered] = field(default_factory=dict)
    """The adapters of the model by name."""
    merged: Choice | None = None
    """What is merged into the weights, if anything."""
    of_peft: list[Any] = field(default_factory=list)
    """The configurations that earlier adapters of PEFT have left on the model."""

    before_gradients: Callable[[nn.Module], None] | None = None
    """Called with the model before its next pass with gradients. Restores the hooks that a merge removed, because
    checkpoints need them. It must not refer to the model: a copy of one layer has this object too."""

    def __post_init__(self) -> None:
        self.running = RunningPasses()
        self.decoding = Decoding()
        self._thread = _Thread()
        self._records: WeakKeyDictionary[Any, Moment] = WeakKeyDictionary()
        self._open_blocks: tuple[_Block, ...] = ()
        """The blocks of all threads and tasks. Some may have ended: an interrupt can prevent their removal."""

    def __getstate__(self) -> dict[str, Any]:
        # Running passes, open blocks and checkpoints belong to this model, not to a copy of it.
        left_out = ("running", "decoding", "_thread", "_records", "_open_blocks")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    # --- reading the choice ------------------------------------------------------------------------------

    @property
    def choice(self) -> Choice:
        """The choice of a forward pass that begins now, in this thread or task.

        Raises:
            AdapterStateError: An adapter of the open block was merged or removed.
        """
        if torch.compiler.is_compiling():
            return self._choice_in_graph()
        block = self.block
        if block is None:
            return self.active
        if self.merged is not None:
            raise AdapterStateError(
                "An adapter was merged while a per_sample, per_token, using or disabled block was open. Call "
                "unmerge(), or leave the block."
            )
        for name in block.choice.names:
            if self.adapters.get(name) is not block.adapters[name]:
                raise AdapterStateError(
                    f"'{name}' was removed while a per_sample, per_token or using block that uses it was open. Leave "
                    "the block and choose again."
                )
        if block.choice.whole != self.active.whole:
            for name in block.choice.names | self.active.names:
                adapter = self.adapters.get(name)
                if adapter is not None and adapter.read_directly is not None:
                    raise AdapterStateError(
                        f"'{name}' trains '{adapter.read_directly}' in full, and the model may read it without "
                        f"calling its layer, so a with block cannot replace it. Use activate('{name}') for a whole "
                        "batch, and activate(None) before a block of other adapters."
                    )
        return block.choice

    @property
    def block(self) -> _Block | None:
        """The innermost open block of this thread or task, if any."""
        return next(self._blocks(), None)

    @property
    def users_block(self) -> _Block | None:
        """The innermost `per_sample` or `per_token` block of this thread or task, if any."""
        return next((block for block in self._blocks() if not block.is_generation), None)

    def _blocks(self) -> Iterator[_Block]:
        return (b for b in reversed(_BLOCKS.get()) if b.activation is self and b.is_open)

    @property
    def has_blocks(self) -> bool:
        """Whether a block is open in any thread or task."""
        return any(block.is_open for block in self._open_blocks)

    def _choice_in_graph(self) -> Choice:
        """Return the choice in a compiled graph; Dynamo guards on what this reads."""
        block = self._thread.block
        if block is not None and block.is_open:
            return block.choice
        if self.has_blocks:
            raise AdapterStateError(
                "A compiled model was called while another thread or an asyncio task has an open per_sample or "
                "per_token block, and a compiled graph cannot tell whether the block applies to it. Call the model "
                "uncompiled, or open the block in the thread that calls it."
            )
        return self.active

    @property
    def state(self) -> Any:
        """State of the thread's forward pass, set and cleared by the hooks that adapter modules declare.

        It is immutable, because a checkpoint records it for the recomputation.
        """
        return self.running.of_thread.state

    @state.setter
    def state(self, state: Any) -> None:
        self.running.of_thread.state = state

    @property
    def now(self) -> Pass:
        """The pass that this thread runs; if it runs none, one that begins now."""
        return self.running.current or Pass(self.choice)

    @property
    def step(self) -> Step | None:
        """The decoding step that this thread runs, if any."""
        if torch.compiler.is_compiling():
            return None
        current = self.running.current
        return None if current is None else current.step

    @property
    def row_factors(self) -> RowFactors | None:
        """The factors of DoRA that this thread's forward pass may read and add to; None outside a pass."""
        if torch.compiler.is_compiling() or self.running.current is None:
            return None
        return self.decoding.row_factors

    def moment(self) -> Moment:
        """Return the choice of the running forward pass; in a recomputation, that of the first run.

        Raises:
            AdapterStateError: The first run's choice is unknown or can no longer be computed. The gradients would
                silently be those of another adapter.
        """
        if torch.compiler.is_compiling():
            return Moment(Pass(self._choice_in_graph()), self.state, self.active)
        moment = Moment(self.now, self.state, self.active)
        checkpoints = running_checkpoints()
        if not checkpoints or moment.of_pass.is_part:
            return moment  # the layer that computes a part has looked up the record
        for checkpoint in checkpoints:
            if checkpoint.is_recomputation:
                moment = self._replay(checkpoint.key)
                break
        for checkpoint in checkpoints:
            if not checkpoint.is_recomputation:
                self._records.setdefault(checkpoint.key, moment)
        return moment

    def _replay(self, checkpoint: Any) -> Moment:
        """Return the moment of a checkpoint's first run."""
        moment = self._records.get(checkpoint)
        if moment is None:
            raise AdapterStateError(
                "A checkpointed block is recomputed whose forward pass ran without its adapters: they were attached "
                "or unmerged after it. Call backward() first, then attach or unmerge."
            )
        if moment.active != self.active and self._swapping(moment.active.names | self.active.names):
            raise AdapterStateError(
                "The active adapter changed between the forward and the backward pass of a checkpointed block, and "
                "biases or modules trained in full were swapped. Keep the same adapter active until backward() "
                "has returned."
            )
        return moment

    def _swapping(self, names: frozenset[str]) -> frozenset[str]:
        """Return those of these adapters that have trained copies and are still on the model."""
        adapters = list(self.adapters.items())  # another thread may add or remove one meanwhile
        return names & {name for name, adapter in adapters if adapter.swaps}

    # --- changing the choice -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def local(self, choice: Choice, *, is_generation: bool = False) -> Iterator[None]:
        """Use a choice in this thread or task, for the length of a `with` block.

        Raises:
            AdapterStateError: The block ended in another thread or task than it began in.
        """
        self.running.drop_interrupted()
        adapters = {name: self.adapters[name] for name in choice.names}
        block = _Block(self, choice, adapters, is_generation)
        before, thread = self._thread.block, threading.get_ident()
        try:
            # One that ended in another thread is still among them, with its model.
            _BLOCKS.set((*(b for b in _BLOCKS.get() if b.is_open), block))
            with self.running.lock:
                self._open_blocks = (*self._open_blocks, block)
            # Several tasks share a thread, so a graph could not tell them apart.
            if not _in_task():
                self._thread.block = block
            yield
        finally:
            # First, and without a call, so that no interrupt comes before it. An interrupt after it leaves only what
            # is dropped later.
            block.is_open = False
            with self.running.lock:
                self._open_blocks = tuple(b for b in self._open_blocks if b.is_open)
            if threading.get_ident() == thread:
                self._thread.block = before
            blocks = _BLOCKS.get()
            _BLOCKS.set(tuple(b for b in blocks if b.is_open))
            self.running.drop_interrupted()
        if block not in blocks:
            raise AdapterStateError(
                "A per_sample, per_token, using or disabled block ended in another thread or task than it began in (a "
                "generator may have been resumed elsewhere), so it was not in force all the time. Discard what was "
                "computed."
            )

    @contextlib.contextmanager
    def part(self, of_pass: Pass) -> Iterator[None]:
        """Use one adapter in the layers inside a layer that recomputes some rows."""
        if torch.compiler.is_compiling():
            before, self._thread.block = self._thread.block, _Block(self, of_pass.choice, {})
            yield
            self._thread.block = before
            return
        with self.running.within(of_pass):
            yield

    @contextlib.contextmanager
    def generation(self, choice: Choice) -> Iterator[None]:
        """Keep a choice for all forward passes of a generation."""
        # Merged weights act anyway, and cannot change while the generation runs.
        is_merged = self.merged is not None
        block = contextlib.nullcontext() if is_merged else self.local(choice, is_generation=True)
        with block, self.running.within(None):
            yield

    def forbid_recomputation(self, action: str, names: frozenset[str] | None = None) -> None:
        """Make the recomputation of pending checkpoints raise an error: the model can no longer repeat their first run.

        Args:
            action: What was done, for the message: "removed", "merged".
            names: Only checkpoints that used one of these adapters; None is all.
        """
        for checkpoint, moment in list(self._records.items()):
            swapped = self._swapping(moment.active.names)
            if names is None or names & (moment.of_pass.choice.names | swapped):
                error = AdapterStateError(
                    f"An adapter was {action} between the forward and the backward pass of a checkpointed block, "
                    "which cannot be recomputed any more. Do that after backward() has returned."
                )
                forbid_recomputation(checkpoint, error)

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        del self.adapters[name]
        if self.adapters:
            self.decoding.remove(name)
        else:
            # A handle that outlives its adapters must not keep copies of them.
            self.decoding = Decoding()

    # --- forward passes ----------------------------------------------------------------------------------

    def entering(self) -> Choice:
        """Return the choice of a forward pass that enters the model, or a part of the model inside a pass."""
        for checkpoint in running_checkpoints():
            if checkpoint.is_recomputation:
                return self._replay(checkpoint.key).of_pass.choice
        outer = self.running.innermost
        if outer is not None and outer.of_pass is not None and outer.began_with is _BLOCKS.get():
            return outer.of_pass.choice
        return self.choice

    def step_of(self, choice: Choice, args: tuple, kwargs: dict[str, Any]) -> Step | None:
        """Return the decoding step of a forward pass that enters the model; the same one for a part of the model."""
        outer = self.running.current
        if outer is not None:
            return outer.step if choice is outer.choice else None
        return self.decoding.begin(choice, args, kwargs, is_active=choice is self.active)

    def begin(self, model: nn.Module, of_pass: Pass, frame: FrameType) -> None:
        """Register a forward pass of this thread through the model or its backbone; `frame` ends with the pass."""
        if self.before_gradients is not None and torch.is_grad_enabled():
            self.before_gradients(model)
        self.running.begin(of_pass, frame, began_with=_BLOCKS.get())
        self.moment()  # a checkpoint around the model records it


def _reduce_for_process(activation: Activation) -> Any:
    """Reduce the choice of a model that multiprocessing sends to another process; copy and pickle do not call this.

    Raises:
        AdapterStateError: A block is open here, and the other process would use what `activate` set.
    """
    block = activation.users_block
    if block is not None and block.choice != activation.active:
        raise AdapterStateError(
            "The model was sent to another process inside per_sample, per_token, using or disabled, and that process "
            "would not see the block. Start and use the process outside of the block, after activate(None) or "
            "activate(name)."
        )
    return activation.__reduce_ex__(2)


ForkingPickler.register(Activation, _reduce_for_process)


def _in_task() -> bool:
    """Whether this code runs in an asyncio task."""
    try:
        return asyncio.current_task() is not None
    except RuntimeError:  # no running event loop
        return False

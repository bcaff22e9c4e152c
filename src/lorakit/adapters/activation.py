"""Who chooses what acts: `activate` for all threads, a block for its thread or task, a checkpoint for its second run.

A forward pass fixes its choice when it enters the model (`begin_pass`). The adapted layers read it from
`Activation.moment`. From the inside out, the choice is that of

1. the first run, in the recomputation of a checkpointed block (`models/checkpoints.py`);
2. the innermost open block of this thread or task: `per_sample`, `per_token`, or a running `generate`;
3. `activate`, which every thread sees.

A block lives in a context variable, so tasks beside it do not see it. New threads start with an empty context and
see what `activate` set.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from lorakit.adapters.choice import BASE, Blend, Choice, Entries
from lorakit.errors import AdapterStateError
from lorakit.models.checkpoints import forbid_recomputation, running_checkpoints
from lorakit.models.frames import has_ended


@dataclass(frozen=True)
class Pass:
    """A forward pass: its choice, and the facts about its batch that a choice by row or token needs."""

    choice: Choice
    batch: int | None = None
    """Number of rows; None if unknown, or if the choice is for the whole batch."""
    lengths: frozenset[int] = frozenset()
    """Lengths of the sequences that entered the model."""
    inputs: frozenset[tuple[int, ...]] = frozenset()
    """Storage and first stride of each tensor that entered the model with one entry for each row."""
    is_part: bool = False
    """Whether this is no pass of its own: a layer computes some rows again for one adapter."""
    known_parts: dict[Any, list[tuple[Blend, Entries]]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def parts(self, size: int, device: torch.device) -> list[tuple[Blend, Entries]]:
        """Return `Choice.parts`, the same lists for all layers of the pass."""
        if torch.compiler.is_compiling():
            return self.choice.parts(size, device)
        key = size, device
        if key not in self.known_parts:
            self.known_parts[key] = self.choice.parts(size, device)
        return self.known_parts[key]


class Moment(NamedTuple):
    """What an adapted layer reads in a forward pass."""

    of_pass: Pass
    state: Any
    """See `Activation.state`."""
    active: Choice
    """What `activate` had set: it decides which trained copies replace base tensors."""


@dataclass(eq=False)
class _Block:
    """An open `per_sample` or `per_token` block, or a running `generate`."""

    activation: Activation
    choice: Choice
    adapters: dict[str, int]
    """Serial number of each adapter when the block began."""
    is_generation: bool = False
    is_open: bool = True


_BLOCKS: ContextVar[tuple[_Block, ...]] = ContextVar("lorakit_blocks", default=())
"""The blocks of this thread or task, of all models, innermost last."""

_SERIALS = itertools.count()


@dataclass(eq=False)
class _Running:
    """A forward pass or a generation that runs in some thread."""

    of_pass: Pass | None
    """None for a generation, whose passes have their own entries."""
    frame: FrameType | None = None
    """The Python frame of a forward pass. An interrupt ends it without a call of `end`."""
    blocks: tuple[_Block, ...] = ()
    """The blocks that were open when a forward pass began."""


class _Thread(threading.local):
    """What one thread knows; Dynamo can read it, unlike a context variable."""

    state: Any = None
    block: _Block | None = None
    """The innermost block that this thread opened outside asyncio tasks; it may have ended in another thread."""


@dataclass(eq=False)
class Activation:
    """The choice of one model's adapters, shared by all of its adapted layers.

    Gradient checkpointing runs a block again in the backward pass, on a GPU in another thread. By then the
    surroundings may choose other adapters, so `moment` records each first run and returns the record.
    """

    active: Choice = BASE
    """What `activate` set."""
    adapters: dict[str, int] = field(default_factory=dict)
    """Each adapter of the model, with a serial number that no other adapter ever has."""
    swapping: set[str] = field(default_factory=set)
    """Names of the adapters with trained copies of base tensors, which replace these tensors while active."""
    read_directly: dict[str, str] = field(default_factory=dict)
    """By adapter, the path of a layer with a trained copy that the model may read without calling the layer."""
    merged: Choice | None = None
    """What is merged into the weights, if anything."""

    before_gradients: Callable[[], None] | None = None
    """Called before the next pass with gradients: adds hooks that a merge has removed, and a checkpoint needs."""

    def __post_init__(self) -> None:
        self._thread = _Thread()
        self._lock = threading.RLock()
        self._running: dict[int, list[_Running]] = {}
        self._records: WeakKeyDictionary[Any, Moment] = WeakKeyDictionary()
        self._open_blocks = 0

    def __getstate__(self) -> dict[str, Any]:
        # Running passes, open blocks and checkpoints belong to this model, not to a copy of it.
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

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
                "An adapter was merged while a per_sample, per_token or disabled block was open. Call unmerge(), or "
                "leave the block."
            )
        for name in block.choice.names:
            if self.adapters.get(name) != block.adapters[name]:
                raise AdapterStateError(
                    f"'{name}' was removed while a per_sample or per_token block that uses it was open. Leave the "
                    "block and choose again."
                )
        if block.choice.whole != self.active.whole:
            for name in (block.choice.names | self.active.names) & self.read_directly.keys():
                raise AdapterStateError(
                    f"'{name}' trains '{self.read_directly[name]}' in full, and the model may read that table without "
                    f"calling it, so per_sample and per_token cannot replace it. Use activate('{name}') for a whole "
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
        return self._open_blocks > 0

    def _choice_in_graph(self) -> Choice:
        """Return the choice in a compiled graph; Dynamo guards on what this reads."""
        block = self._thread.block
        if block is not None and block.is_open:
            return block.choice
        if self._open_blocks:
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
        return self._thread.state

    @state.setter
    def state(self, state: Any) -> None:
        self._thread.state = state

    @property
    def now(self) -> Pass:
        """The pass that this thread runs; if it runs none, one that begins now."""
        running = self._running.get(threading.get_ident())
        of_pass = running[-1].of_pass if running else None
        return Pass(self.choice) if of_pass is None else of_pass

    def moment(self) -> Moment:
        """Return the choice of the running forward pass; in a recomputation, that of the first run.

        Raises:
            AdapterStateError: The first run's choice is unknown or can no longer be computed. The gradients would
                silently be those of another adapter.
        """
        if torch.compiler.is_compiling():
            return Moment(Pass(self._choice_in_graph()), self._thread.state, self.active)
        moment = Moment(self.now, self._thread.state, self.active)
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
        if moment.active != self.active and (
            (moment.active.names | self.active.names) & self.swapping
        ):
            raise AdapterStateError(
                "The active adapter changed between the forward and the backward pass of a checkpointed block, and "
                "biases or modules trained in full were swapped. Keep the same adapter active until backward() "
                "has returned."
            )
        return moment

    # --- changing the choice -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def local(self, choice: Choice, *, is_generation: bool = False) -> Iterator[None]:
        """Let a choice act in this thread or task, for the length of a `with` block.

        Raises:
            AdapterStateError: The block ended in another thread or task than it began in.
        """
        self._drop_interrupted()
        block = _Block(self, choice, dict(self.adapters), is_generation)
        before, thread = self._thread.block, threading.get_ident()
        _BLOCKS.set((*_BLOCKS.get(), block))
        with self._lock:
            self._open_blocks += 1
        # Several tasks share a thread, so a graph could not tell them apart.
        if not _in_task():
            self._thread.block = block
        try:
            yield
        finally:
            block.is_open = False
            with self._lock:
                self._open_blocks -= 1
            if threading.get_ident() == thread:
                self._thread.block = before
            blocks = _BLOCKS.get()
            _BLOCKS.set(tuple(b for b in blocks if b is not block))
            self._drop_interrupted()
        if block not in blocks:
            raise AdapterStateError(
                "A per_sample, per_token or disabled block ended in another thread or task than it began in (a "
                "generator may have been resumed elsewhere), so it was not in force all the time. Discard what was "
                "computed."
            )

    @contextlib.contextmanager
    def part(self, of_pass: Pass) -> Iterator[None]:
        """Let the layers inside a layer compute some rows for one adapter."""
        if torch.compiler.is_compiling():
            before, self._thread.block = self._thread.block, _Block(self, of_pass.choice, {})
            yield
            self._thread.block = before
            return
        with self._run(_Running(of_pass)):
            yield

    @contextlib.contextmanager
    def generation(self, choice: Choice) -> Iterator[None]:
        """Keep a choice for all forward passes of a generation."""
        if (
            self.merged is not None
        ):  # the merged weights act, and cannot change while the generation runs
            with self._run(_Running(None)):
                yield
            return
        with self.local(choice, is_generation=True), self._run(_Running(None)):
            yield

    @contextlib.contextmanager
    def _run(self, running: _Running) -> Iterator[None]:
        with self._lock:
            self._running.setdefault(threading.get_ident(), []).append(running)
        try:
            yield
        finally:
            self._remove(running)

    def _remove(self, running: _Running) -> None:
        thread = threading.get_ident()
        with self._lock:
            entries = self._running.get(thread, [])
            if running in entries:
                del entries[entries.index(running) :]  # with passes inside it that were interrupted
            if not entries:
                self._running.pop(thread, None)
                self._thread.state = None

    @contextlib.contextmanager
    def exclusive(self, action: str, *, within_own_pass: bool = False) -> Iterator[None]:
        """Change the model's adapters while no forward pass or generation runs; new ones wait for the end.

        Args:
            action: For the message.
            within_own_pass: Accept a pass of this thread, which keeps the choice that it began with.

        Raises:
            AdapterStateError: A forward pass or a generation runs.
        """
        with self._lock:
            own = threading.get_ident()
            for thread, entries in list(self._running.items()):
                _drop_interrupted(entries, thread)
                if not entries:
                    del self._running[thread]
                elif thread != own or not within_own_pass:
                    whose = "this thread" if thread == own else "another thread"
                    raise AdapterStateError(
                        f"You cannot {action} while {whose} runs a forward pass or a generation of this model. Wait "
                        "for its end. To choose adapters for one thread only, use per_sample."
                    )
            yield

    def forbid_recomputation(self, action: str, names: frozenset[str] | None = None) -> None:
        """Let the recomputation of pending checkpoints raise an error, because what they need has left the model.

        Args:
            action: What was done, for the message: "removed", "merged".
            names: Only checkpoints that used one of these adapters; None is all.
        """
        for checkpoint, moment in list(self._records.items()):
            swapped = moment.active.names & self.swapping
            if names is None or names & (moment.of_pass.choice.names | swapped):
                error = AdapterStateError(
                    f"An adapter was {action} between the forward and the backward pass of a checkpointed block, "
                    "which cannot be recomputed any more. Do that after backward() has returned."
                )
                forbid_recomputation(checkpoint, error)

    def add(self, name: str, *, swaps: bool, read_directly: str | None) -> None:
        """Register an adapter; `swaps` says that it has trained copies of base tensors."""
        self.adapters[name] = next(_SERIALS)
        if swaps:
            self.swapping.add(name)
        if read_directly is not None:
            self.read_directly[name] = read_directly

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        del self.adapters[name]
        self.swapping.discard(name)
        self.read_directly.pop(name, None)

    # --- forward passes ----------------------------------------------------------------------------------

    def entering(self) -> Choice:
        """Return the choice of a forward pass that enters the model, or a part of the model inside a pass."""
        for checkpoint in running_checkpoints():
            if checkpoint.is_recomputation:
                return self._replay(checkpoint.key).of_pass.choice
        running = self._running.get(threading.get_ident())
        outer = running[-1] if running else None
        if outer is not None and outer.of_pass is not None and outer.blocks is _BLOCKS.get():
            return outer.of_pass.choice
        return self.choice

    def begin(self, of_pass: Pass, frame: FrameType) -> None:
        """Register a forward pass of this thread; `frame` is the Python frame that ends with it."""
        if self.before_gradients is not None and torch.is_grad_enabled():
            self.before_gradients()
        self._drop_interrupted()
        entries = self._running.setdefault(threading.get_ident(), [])
        entries.append(_Running(of_pass, frame, _BLOCKS.get()))
        self.moment()  # a checkpoint around the model records it

    def end(self, frame: FrameType) -> None:
        """Remove the forward pass that `begin` registered for this frame; none if `begin` was not reached."""
        for entry in self._running.get(threading.get_ident(), ()):
            # After an error PyTorch calls the hooks from the frame around the one that began the pass.
            if entry.frame is not None and (entry.frame is frame or entry.frame.f_back is frame):
                self._remove(entry)
                return

    def _drop_interrupted(self) -> None:
        """Drop the passes of this thread that were interrupted."""
        thread = threading.get_ident()
        with self._lock:
            entries = self._running.get(thread)
            if entries:
                _drop_interrupted(entries, thread)
            if not entries:
                self._running.pop(thread, None)
                self._thread.state = None

    @property
    def lock(self) -> threading.RLock:
        """Held while a forward pass begins and while adapters change."""
        return self._lock


def _drop_interrupted(entries: list[_Running], thread: int) -> None:
    """Drop the first pass of a thread that was interrupted, with all inside it."""
    for i, entry in enumerate(entries):
        if entry.frame is not None and has_ended(entry.frame, thread):
            del entries[i:]
            return


def caller_frame() -> FrameType:
    """Return the frame that called a hook."""
    return sys._getframe(2)


def _in_task() -> bool:
    """Whether this code runs in an asyncio task."""
    try:
        return asyncio.current_task() is not None
    except RuntimeError:  # no running event loop
        return False

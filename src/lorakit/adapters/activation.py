"""Which adapters act: those of a checkpoint's first run, of the innermost open block, or of `activate`.

A block (`using`, `per_sample`, `per_token`, a running `generate`) lives in a context variable: threads and tasks beside
it do not see it. A new thread starts with an empty context and sees what `activate` set.

A compiled graph cannot read a context variable. There the choice comes from a mirror of the thread's block. Blocks in
asyncio tasks leave it alone, because several tasks share a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from lorakit.adapters.choice import BASE, Choice
from lorakit.adapters.slots import Slots
from lorakit.errors import AdapterStateError
from lorakit.models.checkpoints import forbid_recomputation, running_checkpoints

_SERIALS = count()
_OPENING = threading.Lock()
"""Held while the list of open blocks changes."""


class Block(NamedTuple):
    """An open block of one model."""

    choice: Choice
    slots: Slots | None = None
    """The matrices that its decoding steps keep, if any."""
    is_generation: bool = False
    is_part: bool = False
    """Whether it is part of a forward pass: a layer computes some rows again for one adapter."""


class Current(NamedTuple):
    """What acts in a forward pass; a checkpoint records it for the recomputation."""

    choice: Choice
    state: Any
    """See `Activation.state`."""


_BLOCKS: ContextVar[Mapping[Activation, Block]] = ContextVar("lorakit_blocks")
"""The innermost block of each model in this thread or task."""


class _Thread(threading.local):
    """State of one thread, which Dynamo can trace."""

    block: Block | None = None
    """The innermost block that this thread opened outside asyncio tasks."""
    state: Any = None


@dataclass(eq=False)
class Activation:
    """The choice of one model's adapters, shared by all of its adapted layers."""

    active: Choice = BASE
    """What `activate` set. It decides which trained copies replace base tensors."""
    merged: Choice | None = None
    """What is merged into the weights, if anything."""
    serials: dict[str, int] = field(default_factory=dict)
    """A number for each adapter of the model by name, which no other adapter gets."""

    of_peft: list[Any] = field(default_factory=list)
    """The configurations that earlier adapters of PEFT have left on the model."""

    def __post_init__(self) -> None:
        self._thread = _Thread()
        self._records: WeakKeyDictionary[Any, Current] = WeakKeyDictionary()
        self._open: tuple[Block, ...] = ()
        """The blocks of all threads and tasks."""

    def __getstate__(self) -> dict[str, Any]:
        # Open blocks and checkpoints belong to this model, not to a copy of it.
        left_out = ("_thread", "_records", "_open")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def block(self) -> Block | None:
        """The innermost block of this thread or task, if any."""
        if torch.compiler.is_compiling():
            return self._block_in_graph()
        return _BLOCKS.get({}).get(self)

    @property
    def users_block(self) -> Block | None:
        """The innermost block, unless it is a running `generate`."""
        block = self.block
        return None if block is None or block.is_generation else block

    @property
    def has_blocks(self) -> bool:
        """Whether a block is open in any thread or task."""
        return bool(self._open)

    @property
    def choice(self) -> Choice:
        """The choice of a forward pass that begins now, in this thread or task."""
        return self.active if (block := self.block) is None else block.choice

    @property
    def state(self) -> Any:
        """State of the thread's forward pass, set and cleared by the hooks that adapter modules declare.

        It is immutable, because a checkpoint records it.
        """
        return self._thread.state

    @state.setter
    def state(self, state: Any) -> None:
        self._thread.state = state

    def current(self) -> Current:
        """Return what acts now; in the recomputation of a checkpoint, what acted in its first run.

        Raises:
            AdapterStateError: The first run had no adapters. The gradients would silently be others.
        """
        block = self.block
        now = Current(self.active if block is None else block.choice, self.state)
        if torch.compiler.is_compiling() or (block is not None and block.is_part):
            return now  # the layer around a part has looked up the record
        runs = running_checkpoints()
        for run in runs:
            if run.is_recomputation:
                recorded = self._records.get(run.key)
                if recorded is None:
                    raise AdapterStateError(
                        "A checkpointed block is recomputed whose forward pass ran without its adapters: they were "
                        "attached after it. Call backward() first, then attach."
                    )
                now = recorded
                break
        for run in runs:
            if not run.is_recomputation:
                self._records.setdefault(run.key, now)
        return now

    def forbid_recomputation(self) -> None:
        """Make the recomputation of pending checkpoints raise an error: the model can no longer repeat their first run.

        Call it before the parameters in the model's layers change (trained copies, a merge) or an adapter is removed.
        """
        for checkpoint in list(self._records):
            error = AdapterStateError(
                "The adapters changed between the forward and the backward pass of a checkpointed block, which cannot "
                "be recomputed any more: one was removed, merged or unmerged, or activate() has replaced biases or "
                "modules trained in full. Do that after backward() has returned."
            )
            forbid_recomputation(checkpoint, error)

    @contextlib.contextmanager
    def opened(self, block: Block) -> Iterator[None]:
        """Open a block in this thread or task, for the length of a `with` block."""
        if torch.compiler.is_compiling():
            before, self._thread.block = self._thread.block, block
            yield
            self._thread.block = before
            return
        outer, in_task = self._thread.block, _in_task()
        token = _BLOCKS.set({**_BLOCKS.get({}), self: block})
        with _OPENING:
            self._open = (*self._open, block)
        if not in_task:
            self._thread.block = block
        try:
            yield
        finally:
            with _OPENING:
                self._open = tuple(one for one in self._open if one is not block)
            if not in_task:
                self._thread.block = outer
            _BLOCKS.reset(token)

    def add(self, name: str) -> None:
        """Give a new adapter its serial number."""
        self.serials[name] = next(_SERIALS)

    def _block_in_graph(self) -> Block | None:
        """Return the block in a compiled graph; Dynamo guards on what this reads."""
        block = self._thread.block
        if block is None and self._open:
            raise AdapterStateError(
                "A compiled model was called while another thread or an asyncio task has an open per_sample, "
                "per_token, using or disabled block, and a compiled graph cannot tell whether the block applies to it. "
                "Call the model uncompiled, or open the block in the thread that calls it."
            )
        return block


def _in_task() -> bool:
    """Whether this code runs in an asyncio task."""
    try:
        return asyncio.current_task() is not None
    except RuntimeError:  # no running event loop
        return False

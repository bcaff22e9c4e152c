"""Forward passes: what a layer needs to know of one, and which of them run in which thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from lorakit.adapters.choice import Blend, Choice, Entries
from lorakit.adapters.decoding import Step
from lorakit.errors import AdapterStateError
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
    """Whether this is part of another pass: a layer recomputes some rows for one adapter."""
    step: Step | None = field(default=None, compare=False, repr=False)
    """The decoding step that the pass is, if any."""
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


@dataclass(eq=False)
class Running:
    """A forward pass or a generation that runs in some thread."""

    of_pass: Pass | None
    """None for a generation, whose passes have their own entries."""
    frame: FrameType | None = None
    """The Python frame of a forward pass. An interrupt ends it without a call of `end`."""
    began_with: object = None
    """The blocks that were open when a forward pass began."""


class _OfThread(threading.local):
    state: Any = None
    """See `Activation.state`."""


class RunningPasses:
    """The forward passes and generations of one model that run now, by thread."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held while a forward pass begins and while adapters change."""
        self.of_thread = _OfThread()
        self._entries: dict[int, list[Running]] = {}
        """By thread, the innermost last."""

    @property
    def innermost(self) -> Running | None:
        """The innermost pass or generation of this thread."""
        entries = self._entries.get(threading.get_ident())
        return entries[-1] if entries else None

    @property
    def current(self) -> Pass | None:
        """The pass that this thread runs, if any."""
        entries = self._entries.get(threading.get_ident())
        return entries[-1].of_pass if entries else None

    def begin(self, of_pass: Pass, frame: FrameType, *, began_with: object) -> None:
        """Add a forward pass of this thread; `frame` is the Python frame that ends with it."""
        self.drop_interrupted()
        self._add(Running(of_pass, frame, began_with))

    def end(self, frame: FrameType) -> None:
        """Remove the forward pass that `begin` added for this frame; none if `begin` was not reached."""
        for entry in self._entries.get(threading.get_ident(), ()):
            # After an error PyTorch calls the hooks from the frame around the one that began the pass.
            if entry.frame is not None and (entry.frame is frame or entry.frame.f_back is frame):
                self._remove(entry)
                return

    @contextlib.contextmanager
    def within(self, of_pass: Pass | None) -> Iterator[None]:
        """Add a part of a pass, or a generation (None), for the length of a `with` block."""
        entry = Running(of_pass)
        self._add(entry)
        try:
            yield
        finally:
            self._remove(entry)

    @contextlib.contextmanager
    def exclusive(self, action: str, *, within_own_pass: bool = False) -> Iterator[None]:
        """Change the model's adapters while no forward pass or generation runs; new ones wait for the end.

        Args:
            action: For the message.
            within_own_pass: Accept a pass of this thread, which keeps the choice that it began with.

        Raises:
            AdapterStateError: A forward pass or a generation runs.
        """
        with self.lock:
            own = threading.get_ident()
            for thread in list(self._entries):
                if self._drop_interrupted(thread) and not (thread == own and within_own_pass):
                    whose = "this thread" if thread == own else "another thread"
                    raise AdapterStateError(
                        f"You cannot {action} while {whose} runs a forward pass or a generation of this model. Wait "
                        "for its end. To choose adapters for one thread only, use per_sample."
                    )
            yield

    def drop_interrupted(self) -> None:
        """Drop the passes of this thread that were interrupted."""
        with self.lock:
            if not self._drop_interrupted(threading.get_ident()):
                self.of_thread.state = None

    def _drop_interrupted(self, thread: int) -> bool:
        """Drop the interrupted passes of a thread with all inside them; return whether others run."""
        entries = self._entries.get(thread, [])
        for i, entry in enumerate(entries):
            if entry.frame is not None and has_ended(entry.frame):
                del entries[i:]
                break
        if not entries:
            self._entries.pop(thread, None)
        return bool(entries)

    def _add(self, entry: Running) -> None:
        with self.lock:
            self._entries.setdefault(threading.get_ident(), []).append(entry)

    def _remove(self, entry: Running) -> None:
        """Remove an entry of this thread, with the interrupted ones inside it."""
        thread = threading.get_ident()
        with self.lock:
            entries = self._entries.get(thread, [])
            if entry in entries:
                del entries[entries.index(entry) :]
            if not entries:
                self._entries.pop(thread, None)
                self.of_thread.state = None

"""Run requests on an engine and collect their answers."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from leases import PlainLease
from torch import nn

from lorakit.serving.answer import Answer
from lorakit.serving.engine import End, Event, GenerationRequest, Token
from lorakit.serving.threaded_engine import ThreadedEngine

TIMEOUT = 60


@dataclass
class Collected:
    """The events of one request."""

    events: queue.Queue[Event] = field(default_factory=queue.Queue)
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    end: End | None = None
    ticket: Answer | None = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def next(self) -> Event:
        event = self.events.get(timeout=TIMEOUT)
        if isinstance(event, End):
            self.end = event
        else:
            self.tokens += event.tokens
            self.text += event.text
        return event

    def wait(self) -> Collected:
        while self.end is None:
            self.next()
        return self


def send(
    engine: ThreadedEngine,
    prompt: Sequence[int],
    lease: PlainLease,
    max_tokens: int = 8,
    **settings: Any,
) -> Collected:
    """Submit a request."""
    collected = Collected()
    request = GenerationRequest(prompt=prompt, lease=lease, max_tokens=max_tokens, **settings)
    collected.ticket = engine.submit(request, collected.events.put)
    return collected


@contextmanager
def running(engine: ThreadedEngine) -> Iterator[ThreadedEngine]:
    """Start an engine, and close it at the end."""
    engine.start()
    try:
        yield engine
    finally:
        assert engine.close(TIMEOUT)


def fail_with_activations(module: nn.Module) -> list[int]:
    """Let each pass through a module fail. Return a list to which each adds how many tensors of earlier ones live."""
    activations: list[weakref.ref[torch.Tensor]] = []
    living: list[int] = []

    def fail(module: nn.Module, args: Any) -> None:
        living.append(sum(ref() is not None for ref in activations))
        activation = torch.ones(3)
        activations.append(weakref.ref(activation))
        raise RuntimeError("broken layer")

    module.register_forward_pre_hook(fail)
    return living

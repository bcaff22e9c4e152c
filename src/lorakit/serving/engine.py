"""What engines receive and deliver: requests, events, leases and limits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lorakit.adapters.choice import Blend
from lorakit.compute.batching import room_after

Ending = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Receipt:
    """What computes an answer: the base and the adapters, by the digests of their content."""

    base: str
    """SHA-256 of the base's weights, as hexadecimal digits."""
    adapters: tuple[tuple[str, str, float], ...] = ()
    """Public name, SHA-256 of the folder's content, and weight of each adapter; empty is the base alone."""

    @property
    def fingerprint(self) -> str:
        """The receipt in one line: ``base=…`` and ``name=…*weight``, with 16 digits of each digest.

        The characters ``%;=*`` of a name are escaped as in URLs.
        """
        own = (
            f"{name.translate(_ESCAPED)}={digest[:16]}{factor(weight)}"
            for name, digest, weight in self.adapters
        )
        return ";".join([f"base={self.base[:16]}", *own])


_ESCAPED = {ord(char): f"%{ord(char):02X}" for char in "%;=*"}
"""What separates the parts of a fingerprint, in a name."""


def factor(weight: float) -> str:
    """Return a weight as a factor with all its digits; nothing for 1."""
    return "" if weight == 1 else f"*{float(weight)!r}".removesuffix(".0")


class Holders:
    """Reference count that runs an action when the last holder leaves, in that holder's thread."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action, self._lock, self._count = action, threading.Lock(), 0

    def add(self) -> Callable[[], None]:
        """Add a holder; return the function by which it leaves, whose later calls do nothing."""
        held = [True]
        with self._lock:
            self._count += 1

        def leave() -> None:
            with self._lock:
                if not held:
                    return
                held.clear()
                self._count -= 1
                is_last = self._count == 0
            if is_last:
                self._action()

        return leave


@dataclass(eq=False)
class Lease:
    """Adapters that stay loaded until `release`; a context manager releases it too (`lorakit.serving.store`)."""

    blend: Blend
    """Names of the adapters on the model, with weights. The names contain the digest of their content."""
    receipt: Receipt
    """What computes the answer."""
    tokenizer: PreTrainedTokenizerBase
    """The adapter's own tokenizer, if its folder has one; else the base's."""
    labels: tuple[str, ...]
    """Names of the logits of a classification head; empty for regression and for a language model."""
    outputs: int | None
    """How many of the model's logits belong to the adapter's head, the first ones; None for a language model."""
    task: str | None
    """The task that the adapter was trained for, as its folder records it."""
    _holders: Holders = field(repr=False)

    def __post_init__(self) -> None:
        self._leave = self._holders.add()

    def share(self) -> Lease:
        """Return another lease of the same adapters, to be released on its own. Call it before `release`."""
        return replace(self)

    def release(self) -> None:
        """Allow the adapters to be unloaded. Later calls do nothing."""
        self._leave()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from its scores."""

    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 allows all tokens."""
    seed: int = 0
    """Two requests with equal settings and seeds draw the same numbers, whatever else is in their batches."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt to continue. The caller releases the lease after the last event."""

    prompt: Sequence[int]
    """Token ids."""
    lease: Lease
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the answer, besides those of the model and of the lease's tokenizer."""
    top_logprobs: int | None = None
    """How many of the most likely tokens are reported for each token; None reports no log-probabilities."""
    text_before: Sequence[int] = ()
    """The tokens that the text of the answer continues, so that a space between them belongs to the answer. The answer
    of a chat or of an encoder-decoder is a text of its own."""


@dataclass(frozen=True)
class Token:
    """A generated token, with the log-probabilities under the model's own scores (temperature 1, no top_p)."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens and their log-probabilities."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer."""

    text: str
    """New text: whole characters, nothing of a stop text, nothing of a special token. May be empty."""
    tokens: tuple[Token, ...]
    """The tokens computed since the last piece. Their texts may come with a later piece."""


@dataclass(frozen=True)
class End:
    """The last event of a request; exactly one for each request, whatever happens."""

    reason: Ending
    completion_tokens: int
    cached_tokens: int = 0
    """Tokens of the prompt whose keys and values were taken from the cache."""
    error: Exception | None = None
    """For the reason "error"."""


Event = Piece | End


@dataclass(frozen=True)
class Limits:
    """What an engine can hold."""

    context: int
    """Most tokens of one request, prompt and answer together; of each of them in an encoder-decoder."""
    queue: int
    """Most waiting requests."""
    running: int
    """Most requests in one batch."""
    is_encoder_decoder: bool = False
    cache_tokens: int | None = None
    """Most tokens of all running requests together, whose keys and values are reserved; None if none are."""

    def room_after(self, prompt: int) -> int:
        """Return the most new tokens after a prompt of so many tokens; less than 1 if there is no room for any."""
        length = prompt + 1 if self.is_encoder_decoder else prompt  # an encoder reads an end token
        return room_after(length, self.context, is_encoder_decoder=self.is_encoder_decoder)


@dataclass(frozen=True)
class EngineStatus:
    """State and counters of an engine."""

    is_alive: bool
    """False once its thread has died; the log says why."""
    running: int
    waiting: int
    cache_used: float
    """Share of the cache for keys and values that is in use."""
    steps: int
    """Forward passes so far."""
    tokens: int
    """Generated tokens so far."""


class QueueFullError(Exception):
    """As many requests wait as the engine accepts."""

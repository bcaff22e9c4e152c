"""The thread of an engine: it takes requests from a fair queue, computes them, and runs short actions in between.

An engine computes requests that each name their adapters, in mixed batches on one base. Its public methods may be
called from any thread, also from an event loop; all but `close` return at once.
"""

from __future__ import annotations

import inspect
import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapters.choice import AdapterChoice, Blend
from lorakit.adapters.handle import own_handle
from lorakit.compute.batching import require_embeddings
from lorakit.compute.memory import forget_tensors, free_memory
from lorakit.compute.mode import evaluating
from lorakit.errors import DataError, is_out_of_memory
from lorakit.evaluation.generation_settings import ending_tokens_of_model
from lorakit.serving.answer import Answer
from lorakit.serving.engine import (
    EngineStatus,
    Event,
    GenerationRequest,
    Lease,
    Limits,
    QueueFullError,
    Token,
)
from lorakit.serving.errors import EngineStoppedError
from lorakit.serving.queue import FairQueue
from lorakit.serving.sampling import TokenRules, choose

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

FOLLOWED = 0.01
"""Seconds that an engine waits for a request after a change of the adapters. Most changes install an adapter, and the
request for it is submitted a moment later. It would otherwise wait for a whole step."""

SCORED_ROWS = 128
"""Tokens whose log-probabilities are computed at once: all of a long text would need gigabytes for the vocabulary."""


FAILED = "The engine has failed. Restart the server; its log has the reason."
"""For clients, so without the reason."""


class ThreadedEngine(ABC):
    """Base class of the engines: their thread, their queue, and scoring.

    Args:
        model: The base. Nothing else may compute with it until `close`.
        tokenizer: Its tokenizer.
        limits: What the engine can hold.
        notices: What the operator should know of it. None is left out.
    """

    name: str
    """What it is: continuous, batched or classifying."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        *notices: str | None,
    ) -> None:
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        # Read now: a running batch changes the generation configuration.
        self._ends = frozenset(ending_tokens_of_model(model))
        self._rules = TokenRules(model, tokenizer)
        self.notice = "; ".join(notice for notice in notices if notice) or None
        self.steps = self.tokens = 0
        self._waiting: FairQueue[Any] = FairQueue()
        """Answers, or texts to classify. Both have `is_cancelled`, `has_ended`, `end` and `fail`."""
        self._actions: deque[tuple[Callable[[], Any], Future[Any], bool]] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._has_failed = False
        self._thread = threading.Thread(target=self._main, name=f"lorakit-{self.name}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    # --- called from any thread --------------------------------------------------------------------------

    def submit(self, request: GenerationRequest, deliver: Callable[[Event], Any]) -> Answer:
        """Queue a request.

        Requests with one lease are answers of one request: if one of them waits, the queue accepts the others.

        Args:
            request: The request.
            deliver: Called with each event, in the engine's thread. It must return at once, without an error.

        Raises:
            QueueFullError: Too many requests wait.
            EngineStoppedError: The engine has died or is closed.
            DataError: The request is empty, exceeds the context, or has a token that the base lacks.
        """
        if not request.prompt:
            raise DataError("The prompt is empty; it must have at least one token.")
        if request.max_tokens < 1:
            raise DataError(f"max_tokens is {request.max_tokens}; it must be at least 1.")
        require_embeddings(self.model, [("The text", request.prompt)])
        if request.max_tokens > self.limits.room_after(len(request.prompt)):
            raise DataError(
                f"The prompt has {len(request.prompt)} tokens; with max_tokens {request.max_tokens} that exceeds the "
                f"context of {self.limits.context}. Shorten the prompt or lower max_tokens."
            )
        eos: Any = request.lease.tokenizer.eos_token_id
        ends = self._ends if eos is None else self._ends | {eos}
        answer = Answer(request, deliver, ends, self._wake)
        with self._changed:
            self._require_open()
            is_full = len(self._waiting) >= self.limits.queue
            # The answers of one request share its lease. Accept all of them: a request with more answers than places
            # could never be queued.
            if is_full and not any(a.request.lease is request.lease for a in self._waiting):
                raise QueueFullError(f"{self.limits.queue} requests wait already")
            self._waiting.put(request.lease.receipt.fingerprint, answer)
            self._changed.notify()
        return answer

    def score(self, tokens: Sequence[int], lease: Lease, *, start: int = 1) -> Future[list[float]]:
        """Return the log-probabilities of ``tokens[start:]``, each given all tokens before it, computed alone.

        `start` is at least 1, and the tokens fit the context. The result also serves as the reference of
        `Token.logprob`: nothing else is in its forward passes.
        """
        return self._queued(lambda: self._score(list(tokens), lease, start), is_change=False)

    def between_steps(self, action: Callable[[], T]) -> Future[T]:
        """Run a short action in the engine's thread while no forward pass runs (loading, unloading)."""
        return self._queued(action, is_change=True)

    def _queued(self, action: Callable[[], T], *, is_change: bool) -> Future[T]:
        future: Future[T] = Future()
        with self._changed:
            self._require_open()
            self._actions.append((action, future, is_change))
            self._changed.notify()
        return future

    def status(self) -> EngineStatus:
        """Return the engine's state and counters."""
        return EngineStatus(
            is_alive=self._thread.is_alive() and not self._has_failed,
            running=len(self._running()),
            waiting=self._waiting_count(),
            cache_used=self._cache_used(),
            steps=self.steps,
            tokens=self.tokens,
        )

    def close(self, timeout: float | None = None) -> bool:
        """End the thread; requests that are not finished end with an error. Return whether it ended in time."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _waiting_count(self) -> int:
        """Return the number of requests that wait."""
        return len(self._waiting)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _require_open(self) -> None:
        if self._has_failed:
            raise EngineStoppedError(FAILED)
        if self._is_closing:
            raise EngineStoppedError("The server is shutting down and accepts no more requests.")

    # --- called in the thread ----------------------------------------------------------------------------

    @abstractmethod
    def _advance(self) -> bool:
        """Compute a step or a batch; return whether there was anything to do."""

    @abstractmethod
    def _running(self) -> Sequence[Any]:
        """Return what was taken from the queue and has not ended."""

    def _end_cancelled(self) -> None:
        """End the cancelled ones of the waiting answers, and in a subclass of the running ones."""
        with self._changed:
            cancelled = self._waiting.remove_where(lambda answer: answer.is_cancelled)
        for answer in cancelled:
            answer.end("cancelled")

    def _cache_used(self) -> float:
        return 0.0

    def _main(self) -> None:
        try:
            with evaluating(self.model):
                while not self._is_closing:
                    if self._run_actions():
                        with self._changed:
                            self._changed.wait_for(lambda: self._waiting, FOLLOWED)
                    self._end_cancelled()
                    if not self._advance():
                        with self._changed:
                            if not (self._actions or self._waiting or self._is_closing):
                                self._changed.wait(1.0)
        except BaseException:  # nobody else would see it
            _LOG.exception("The engine has failed.")
            self._has_failed = True
        finally:
            self._end_all()

    def _end_all(self) -> None:
        """End what is not finished, when the thread ends."""
        with self._changed:
            self._is_closing = True
            waiting = self._waiting.remove_where(lambda _: True)
            actions, self._actions = self._actions, deque()
        error = self._stopped()
        for answer in (*waiting, *self._running()):
            answer.fail(error)
        for _, future, _ in actions:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _stopped(self) -> EngineStoppedError:
        """Return the error of a request that is not finished when the thread ends."""
        return EngineStoppedError(FAILED if self._has_failed else "The server was shut down.")

    def _run_actions(self) -> bool:
        """Run the actions that wait; return whether one of them may have changed the adapters."""
        has_changed = False
        while self._actions:
            action, future, is_change = self._actions.popleft()
            has_changed |= is_change
            if not future.set_running_or_notify_cancel():
                continue
            lacks_memory = False
            try:
                future.set_result(action())
            except BaseException as error:
                forget_tensors(error)
                future.set_exception(error)
                self._require_device()
                lacks_memory = is_out_of_memory(error)
            del action, future  # the error's traceback has this frame, and would be in a cycle
            if lacks_memory:
                free_memory()
        return has_changed

    def _attempt(self, compute: Callable[[], T]) -> T | Exception:
        """Return the result of a pass, or its error, after the memory of the failed pass is free.

        Raises:
            Exception: The device computes nothing any more.
        """
        try:
            return compute()
        except Exception as error:
            forget_tensors(error)
            self._require_device()
            failure = error
        free_memory()
        return failure

    def _require_device(self) -> None:
        """Raise the device's error if it computes nothing any more, which ends the engine.

        After some errors of CUDA, such as an illegal memory access, every later call fails until the process ends.
        """
        try:
            torch.ones(1, device=self.model.device).tolist()
        except Exception as error:
            if not is_out_of_memory(error):
                raise

    def _by_row(self, leases: Sequence[Lease]) -> AbstractContextManager[None]:
        """Use the adapters of a lease for each row of a batch, for the length of a `with` block."""
        handle = own_handle(self.model)
        if handle is None:  # no adapter was ever loaded
            return nullcontext()
        return handle.per_sample([choice_of(lease.blend) for lease in leases])

    def _choose(self, scores: Tensor, answers: Sequence[Answer]) -> list[Token | None]:
        """Return the next token of each answer from its scores (N, V), by the rules of the base (`choose`)."""
        prompts = [answer.request.prompt for answer in answers]
        allowed = self._rules.apply(scores, prompts, [answer.tokens for answer in answers])
        return choose(scores, [answer.chooser for answer in answers], allowed)

    @torch.no_grad()
    def _score(self, tokens: list[int], lease: Lease, start: int) -> list[float]:
        new = torch.tensor(tokens[start:], device=self.model.device)
        values: list[float] = []
        with self._by_row([lease]):
            for scores in self._scores(tokens, start):
                own = new[len(values) : len(values) + len(scores), None]
                values += scores.float().log_softmax(-1).gather(-1, own)[:, 0].tolist()
        return values

    def _scores(self, tokens: list[int], start: int) -> Iterator[Tensor]:
        """Yield the scores of the tokens from `start` on, each given all tokens before it, in parts (rows, V)."""
        ids = torch.tensor([tokens], device=self.model.device)
        accepts = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        options = {"logits_to_keep": len(tokens) - start + 1} if accepts else {}
        scores = self.model(input_ids=ids, use_cache=False, **options).logits[0]
        yield from scores[start - len(tokens) - 1 : -1].split(SCORED_ROWS)


class StaticBatchEngine(ThreadedEngine):
    """An engine that computes a batch to its end before it takes the next one."""

    _batch: Sequence[Any] = ()

    def _running(self) -> Sequence[Any]:
        return [item for item in self._batch if not item.has_ended]

    def _end_cancelled(self) -> None:
        super()._end_cancelled()
        for item in self._running():
            if item.is_cancelled:
                item.end("cancelled")

    def _advance(self) -> bool:
        self._batch = batch = list[Any]()
        with self._changed:
            while len(batch) < self.limits.running and self._waiting:
                item = next(self._waiting.turns())
                if not self._fits([*batch, item]):
                    break
                self._waiting.take(item)
                batch.append(item)
        if not batch:
            return False
        self._compute(batch)
        self._batch = ()
        return True

    def _fits(self, batch: Sequence[Any]) -> bool:
        """Return whether a batch can be computed."""
        return True

    @abstractmethod
    def _compute(self, batch: list[Any]) -> None:
        """Compute and end all of a batch."""


def choice_of(blend: Blend) -> AdapterChoice:
    """Return a blend as the handle's methods take it."""
    return dict(blend) or None

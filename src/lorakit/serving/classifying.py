"""Classes and scores in mixed batches: each row of a batch has its own adapter and its own head."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.compute.batching import collator, require_embeddings
from lorakit.errors import DataError
from lorakit.models.loading import Base
from lorakit.serving.answer import Answer
from lorakit.serving.context import context_of
from lorakit.serving.engine import Ending, Event, GenerationRequest, Lease, Limits, QueueFullError
from lorakit.serving.threaded_engine import StaticBatchEngine
from lorakit.tasks import LabelledExample

_LOG = logging.getLogger(__name__)

MOST_TEXTS = 4096
"""Most waiting texts. A request with more of them is accepted if none waits."""


@dataclass(eq=False)
class _Job:
    """The examples of one request, and the logits of those that are computed."""

    examples: Sequence[LabelledExample]
    lease: Lease
    future: Future[Tensor] = field(default_factory=Future)
    logits: dict[int, Tensor] = field(default_factory=dict)

    def can_end(self) -> bool:
        """Return whether the request still waits for its result. If so, it can no longer be cancelled."""
        return not self.future.done() and self.future.set_running_or_notify_cancel()


class _Row(NamedTuple):
    """One example of a request, in the queue and in a batch."""

    job: _Job
    number: int

    @property
    def has_ended(self) -> bool:
        """Whether its request has a result, has failed or was cancelled."""
        return self.job.future.done()

    is_cancelled = has_ended

    def end(self, reason: Ending) -> None:
        """Do nothing: a row is only ended after its request."""

    def fail(self, error: Exception) -> None:
        """End its request with an error."""
        if self.job.can_end():
            self.job.future.set_exception(error)


class ClassifyingEngine(StaticBatchEngine):
    """Engine for classes and scores. It generates no text.

    Args:
        base: A base with a head of classes or a score.
        running: Most rows of a batch.
        queue: Most waiting requests.
        prompt_tokens: Length of a text that a model without a stated context must accept.
    """

    name = "classifying"

    def __init__(
        self, base: Base, *, running: int, queue: int, prompt_tokens: int | None = None
    ) -> None:
        context, bound = context_of(base.model, base.text_tokenizer, prompt_tokens)
        super().__init__(base.model, base.text_tokenizer, Limits(context, queue, running), bound)
        self._collate = collator(base)

    def submit(self, request: GenerationRequest, deliver: Callable[[Event], Any]) -> Answer:
        """Reject a request for text.

        Raises:
            DataError: Always.
        """
        raise DataError("This server classifies texts and generates none. Use /v1/classify.")

    def classify(self, examples: Sequence[LabelledExample], lease: Lease) -> Future[Tensor]:
        """Queue examples. The result is the logits (examples, outputs) of the adapter's own head, float32 on the CPU.

        The examples carry token types besides ids, which BERT's pairs of texts need. The caller releases the lease
        after the result. A future that is cancelled before is not computed.

        Raises:
            QueueFullError: Too many requests wait.
            EngineStoppedError: The engine has died or is closed.
            DataError: A text has a token that the base lacks.
        """
        require_embeddings(self.model, (("The text", e.input_ids) for e in examples))
        job = _Job(examples, lease)
        with self._changed:
            self._require_open()
            waiting = self._waiting_count()
            if waiting >= self.limits.queue:
                raise QueueFullError(f"{waiting} requests wait already")
            if waiting and len(self._waiting) + len(examples) > MOST_TEXTS:
                raise QueueFullError(f"{len(self._waiting)} texts wait already")
            key = lease.receipt.fingerprint
            for i in range(len(examples)):
                self._waiting.put(key, _Row(job, i))
            self._changed.notify()
        return job.future

    def _waiting_count(self) -> int:
        with self._changed:
            self._end_cancelled()
            return len({row.job for row in self._waiting})

    def _compute(self, batch: list[_Row]) -> None:
        """Compute a batch. After an error each request is computed alone, so that only the one at fault fails."""
        error = self._attempt(partial(self._classify, batch))
        if error is None:
            return
        rows = [row for row in batch if not row.has_ended]
        jobs = dict.fromkeys(row.job for row in rows)
        if len(jobs) == 1:
            _LOG.warning("A request for classes has failed.", exc_info=error)
            rows[0].fail(error)
            return
        for job in jobs:
            self._compute([row for row in rows if row.job is job])

    def _classify(self, batch: list[_Row]) -> None:
        inputs = self._collate([job.examples[number] for job, number in batch])
        inputs.pop("labels", None)
        with self._by_row([job.lease for job, _ in batch]):
            logits = self.model(**inputs).logits.float().cpu()
        self.steps += 1
        for (job, number), values in zip(batch, logits, strict=True):
            job.logits[number] = values[: job.lease.outputs]
            if len(job.logits) == len(job.examples) and job.can_end():
                job.future.set_result(torch.stack([job.logits[i] for i in range(len(job.logits))]))

"""Classes and scores in mixed batches: each row of a batch has its own adapter and its own head."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorakit.compute.batching import collator, require_embeddings
from lorakit.errors import DataError
from lorakit.models.loading import Base
from lorakit.serving.answer import Answer
from lorakit.serving.context import context_of
from lorakit.serving.engine import Event, GenerationRequest, Lease, Limits, Load, QueueFullError
from lorakit.serving.queue import FairQueue
from lorakit.serving.worker import Worker
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


class ClassifyingEngine(Worker):
    """See the module. Implements `Engine`, without text, and `Classifier`.

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
        self._rows: FairQueue[tuple[_Job, int]] = FairQueue()
        self._batch: list[tuple[_Job, int]] = []

    def submit(self, request: GenerationRequest, deliver: Callable[[Event], Any]) -> Answer:
        """Reject a request for text.

        Raises:
            DataError: Always.
        """
        raise DataError("This server classifies texts and generates none. Use /v1/classify.")

    def classify(self, examples: Sequence[LabelledExample], lease: Lease) -> Future[Tensor]:
        """Queue examples (`Classifier.classify`)."""
        require_embeddings(self.model, (("The text", e.input_ids) for e in examples))
        job = _Job(examples, lease)
        with self._changed:
            self._require_open()
            waiting = self._waiting_count()
            if waiting >= self.limits.queue:
                raise QueueFullError(f"{waiting} requests wait already")
            if waiting and len(self._rows) + len(examples) > MOST_TEXTS:
                raise QueueFullError(f"{len(self._rows)} texts wait already")
            key = lease.receipt.fingerprint
            for i in range(len(examples)):
                self._rows.put(key, (job, i))
            self._changed.notify()
        return job.future

    def load(self) -> Load:
        """Return what the engine does now."""
        with self._changed:
            waiting = self._waiting_count()
        return replace(super().load(), waiting=waiting)

    def _waiting_count(self) -> int:
        """Return the number of requests with a waiting text. The caller holds the lock."""
        self._end_cancelled()
        return len({job for job, _ in self._rows})

    def _end_cancelled(self) -> None:
        """Drop the waiting texts of requests that were cancelled or have failed."""
        with self._changed:
            self._rows.remove_where(lambda entry: entry[0].future.done())

    def _running(self) -> Sequence[Answer]:
        return []

    def _running_count(self) -> int:
        return len(self._batch)

    def _has_waiting(self) -> bool:
        return len(self._rows) > 0

    def _advance(self) -> bool:
        with self._changed:
            while len(self._rows) and len(self._batch) < self.limits.running:
                self._rows.take(entry := next(self._rows.turns()))
                self._batch.append(entry)
        if not self._batch:
            return False
        self._compute(self._batch)
        self._batch = []
        return True

    def _compute(self, batch: list[tuple[_Job, int]]) -> None:
        """Compute a batch. After an error each request is computed alone, so that only the one at fault fails."""
        error = self._attempt(partial(self._classify, batch))
        if error is None:
            return
        jobs = [*dict.fromkeys(job for job, _ in batch if not job.future.done())]
        if len(jobs) == 1:
            _LOG.warning("A request for classes has failed.", exc_info=error)
            if jobs[0].can_end():
                jobs[0].future.set_exception(error)
            return
        for job in jobs:
            self._compute([entry for entry in batch if entry[0] is job])

    def _classify(self, batch: list[tuple[_Job, int]]) -> None:
        inputs = self._collate([job.examples[row] for job, row in batch])
        inputs.pop("labels", None)
        with self._by_row([job.lease for job, _ in batch]):
            logits = self.model(**inputs).logits.float().cpu()
        self.steps += 1
        for (job, row), values in zip(batch, logits, strict=True):
            job.logits[row] = values[: job.lease.outputs]
            if len(job.logits) == len(job.examples) and job.can_end():
                job.future.set_result(torch.stack([job.logits[i] for i in range(len(job.logits))]))

    def _end_all(self) -> None:
        super()._end_all()
        with self._changed:
            rows = [*self._batch, *self._rows.remove_where(lambda _: True)]
        for job in dict.fromkeys(job for job, _ in rows):
            if job.can_end():
                job.future.set_exception(self._stopped())

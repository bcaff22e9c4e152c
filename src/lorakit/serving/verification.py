"""Replay a share of the answers, to find out whether an answer came from other adapters than its receipt says.

The tokens of an answer are computed again by the adapters of its receipt alone, without batching, pages or
reused prefixes, and the two log-probabilities of each token are compared. Texts cannot be compared: in bfloat16,
rounding alone changes which of two likely tokens comes first.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from lorakit.serving.engine import End, Event, GenerationRequest, Receipt, Token
from lorakit.serving.threaded_engine import ThreadedEngine

_LOG = logging.getLogger(__name__)

BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest mean difference of the log-probabilities of an answer's tokens that is taken for rounding, by dtype."""
BOUND_OF_SHORT = 0.2
"""The same for 16-bit dtypes. On SmolLM2-135M in bfloat16 right answers differ by up to 0.09, and those of another
adapter or of the base by 0.25 and more."""


def bound_for(dtype: torch.dtype) -> float:
    """Return the largest mean difference that is taken for rounding in a dtype."""
    return BOUNDS.get(dtype, BOUND_OF_SHORT)


@dataclass(frozen=True)
class Verdict:
    """The comparison of one answer."""

    receipt: Receipt
    served: tuple[float, ...]
    """Log-probabilities of the tokens as served."""
    alone: tuple[float, ...]
    """Log-probabilities of the tokens computed alone."""
    bound: float

    @property
    def difference(self) -> float:
        """Mean absolute difference of the two."""
        return fmean(abs(a - b) for a, b in zip(self.served, self.alone, strict=True))

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the bound; False for NaN."""
        return self.difference <= self.bound


class Verifier:
    """Replays a share of the answers of an engine.

    Args:
        engine: The engine. It also computes the replays.
        share: Share of the answers, from 0 to 1.
        report: Called with the receipt and the verdict of each chosen answer, in the engine's thread. The verdict is
            None if the answer was not replayed: too many wait, or the forward pass has failed.
        pending: Most answers that wait to be replayed. Others are not replayed then, so that a busy server does not
            collect them.
    """

    def __init__(
        self,
        engine: ThreadedEngine,
        share: float,
        *,
        report: Callable[[Receipt, Verdict | None], Any],
        pending: int = 64,
    ) -> None:
        self._engine, self._share, self._report = engine, share, report
        self._bound = bound_for(engine.model.dtype)
        self._pending = threading.Semaphore(pending)
        self._random = random.Random()

    def watch(
        self, request: GenerationRequest, deliver: Callable[[Event], Any]
    ) -> tuple[GenerationRequest, Callable[[Event], Any]]:
        """Choose whether to replay the answer to a request. Return the request and the `deliver` to submit.

        Both are unchanged if the answer is not chosen. Otherwise the request asks for log-probabilities, and `deliver`
        collects the tokens and replays them after the last one.
        """
        if self._random.random() >= self._share:
            return request, deliver
        recorded = dataclasses.replace(request, top_logprobs=request.top_logprobs or 0)
        tokens: list[Token] = []

        def record(event: Event) -> None:
            try:
                if not isinstance(event, End):
                    tokens.extend(event.tokens)
                elif event.reason in ("stop", "length") and tokens:
                    self._replay(request, tokens)  # shares the lease before the caller releases it
            finally:
                deliver(event)

        return recorded, record

    def _replay(self, request: GenerationRequest, tokens: Sequence[Token]) -> None:
        if not self._pending.acquire(blocking=False):
            self._report(request.lease.receipt, None)
            return
        lease = request.lease.share()
        prompt, ids = tuple(request.prompt), tuple(token.id for token in tokens)
        served = tuple(float("nan") if t.logprob is None else t.logprob for t in tokens)

        def compare(done: Future[list[float]]) -> None:
            lease.release()
            self._pending.release()
            if done.cancelled() or done.exception() is not None:
                _LOG.warning("An answer could not be replayed: %s", done.exception())
                self._report(lease.receipt, None)
                return
            verdict = Verdict(lease.receipt, served, tuple(done.result()), self._bound)
            if not verdict.agrees:
                _LOG.error(
                    "An answer does not agree with its receipt %s: its log-probabilities differ from those computed "
                    "alone by %.3g on average, and the bound is %.3g. Prompt %s, tokens %s, served %s, alone %s.",
                    lease.receipt.fingerprint,
                    verdict.difference,
                    self._bound,
                    list(prompt),
                    list(ids),
                    [round(value, 3) for value in served],
                    [round(value, 3) for value in verdict.alone],
                )
            self._report(lease.receipt, verdict)

        self._engine.score([*prompt, *ids], lease, start=len(prompt)).add_done_callback(compare)

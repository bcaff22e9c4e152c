"""Choose the next token of each request from its scores.

Each request draws from a generator of its own, so a token depends on the request's scores and seed alone, whatever
else is in the batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.serving.engine import Sampling, Token

FEW = 1024
"""Number of most likely tokens that are sorted first. They nearly always hold the share top_p; a full sort of the
vocabulary takes milliseconds."""
COLDEST = 1e-6
"""A lower temperature is taken as this one, which is greedy but for equal scores. Scores divided by a number that is 0
in float32 would be NaN."""


@dataclass
class Chooser:
    """Chooses the tokens of one request."""

    sampling: Sampling
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._random = random.Random(self.sampling.seed)

    def draw(self) -> float:
        """Return the next number of the request, in [0, 1)."""
        return self._random.random()


def choose(
    scores: Tensor, choosers: Sequence[Chooser], forced: int | None = None
) -> list[Token | None]:
    """Return the next token of each request; None if its scores hold NaN, or no token is possible.

    Args:
        scores: The model's scores, shape (N, V).
        choosers: N requests.
        forced: The token that every request gets, with its log-probability under the scores.
    """
    scores = scores.float()
    best, greedy = scores.max(-1)  # NaN in a row makes its maximum NaN
    usable = best.isfinite().tolist()
    tokens: list[int | None] = [
        int(t) if ok else None for t, ok in zip(greedy.tolist(), usable, strict=True)
    ]
    for i, chooser in enumerate(choosers):
        if usable[i] and chooser.sampling.temperature > 0:
            tokens[i] = _sample(scores[i], chooser)
        if usable[i] and forced is not None:
            tokens[i] = forced
    chosen: list[Token | None] = [None if t is None else Token(t) for t in tokens]
    reported = [
        i for i, c in enumerate(choosers) if c.top_logprobs is not None and tokens[i] is not None
    ]
    if reported:
        rows = scores if len(reported) == len(scores) else scores[reported]
        logprobs = rows - rows.logsumexp(-1, keepdim=True)
        own = (
            logprobs.gather(-1, torch.tensor([[tokens[i]] for i in reported], device=rows.device))
            .squeeze(-1)
            .tolist()
        )
        most = max(choosers[i].top_logprobs or 0 for i in reported)
        most = min(most, scores.shape[-1])
        values, ids = logprobs.topk(most) if most else (logprobs[:, :0], logprobs[:, :0])
        for i, logprob, row_ids, row in zip(
            reported, own, ids.tolist(), values.tolist(), strict=True
        ):
            wanted = choosers[i].top_logprobs or 0
            top = tuple(zip(map(int, row_ids[:wanted]), row[:wanted], strict=True))
            token = tokens[i]
            assert token is not None
            chosen[i] = Token(token, logprob, top)
    return chosen


def _sample(scores: Tensor, chooser: Chooser) -> int:
    """Draw a token from the scores of one request (V): temperature, then top_k, then top_p, as transformers does."""
    sampling = chooser.sampling
    scores = (scores - scores.max()) / max(sampling.temperature, COLDEST)
    point = chooser.draw()
    if sampling.top_k or sampling.top_p < 1:
        kept, ids = _most_likely(scores, sampling)
    else:
        kept, ids = scores.softmax(-1), None
    cumulative = kept.double().cumsum(-1)
    position = int(torch.searchsorted(cumulative, point * cumulative[-1], right=True))
    position = min(position, len(kept) - 1)
    return position if ids is None else int(ids[position])


def _most_likely(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the probabilities and ids of the tokens that top_k and top_p allow, the most likely first."""
    size = min(sampling.top_k or len(scores), len(scores))
    total = scores.logsumexp(-1) if not sampling.top_k else None
    for count in dict.fromkeys((min(FEW, size), size)):
        values, ids = scores.topk(count)
        probabilities = (values - total).exp() if total is not None else values.softmax(-1)
        if sampling.top_k and count < size:
            continue  # top_p is a share of the top_k tokens
        before = probabilities.cumsum(-1) - probabilities
        allowed = before < sampling.top_p
        allowed[0] = True  # also for a top_p that is 0 in float32
        if not bool(allowed[-1]) or count == size:
            return probabilities[allowed], ids[allowed]
    raise AssertionError("the last count is the size")

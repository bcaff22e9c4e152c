"""Choose the next token of each request from its scores.

Each request draws from a generator of its own, so a token depends on the request's scores and seed alone, whatever
else is in the batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SuppressTokensLogitsProcessor,
)

from lorakit.data.batches import padded_rows
from lorakit.evaluation.generation_settings import ending_tokens, token_rules
from lorakit.serving.engine import Sampling, Token

FEW = 1024
"""Number of most likely tokens that are sorted first. They nearly always hold the share top_p; a full sort of the
vocabulary takes milliseconds."""
BLOCK = 256
"""Number of tokens whose probabilities are added first, so that the CPU reads few numbers for a draw from all."""
CPU_BYTES = 2**20
"""Scores that a CPU samples from at a time. For more, the C library may ask the system for memory in each step, which
takes longer than sampling. Other devices take all scores at once."""
NO_TOKEN = -1
"""Padding that is no part of a banned word."""
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
        self.advance()

    def draw(self) -> float:
        """Return the random number in [0, 1) for the next token; the same one until `advance`."""
        return self._point

    def advance(self) -> None:
        """Draw the number for the following token. A failed step does not call this, so its retry uses the same one."""
        self._point = self._random.random()


class TokenRules:
    """The tokens that the base's generation configuration bans and forces, whatever a request asks for.

    They hold as in transformers' `generate`; `lorakit.evaluation.generate.token_rules` reads them.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        rules = token_rules(model)
        self._forced = rules.get("forced_bos_token_id")
        self._not_first = rules.get("begin_suppress_tokens", [])
        self._bans = LogitsProcessorList()
        if banned := rules.get("suppress_tokens"):
            self._bans.append(SuppressTokensLogitsProcessor(banned))
        words = rules.get("bad_words_ids", [])
        if words:
            self._bans.append(NoBadWordsLogitsProcessor(words, ending_tokens(model, tokenizer)))
        self._longest = max(map(len, words), default=1)
        self._start: list[int] | None = None
        if model.config.is_encoder_decoder:
            own = model.generation_config
            first = own.decoder_start_token_id
            self._start = [own.bos_token_id if first is None else first]

    def apply(
        self, scores: Tensor, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> Tensor | None:
        """Return a copy of scores (N, V) with minus infinity at banned tokens; None if the base has no rules.

        Args:
            scores: The scores of the next tokens.
            prompts: The N prompts.
            answers: The tokens generated so far, of each prompt.
        """
        if not self._bans and not self._not_first and self._forced is None:
            return None
        befores = [self._start or prompt for prompt in prompts]
        texts = [[*before, *new] for before, new in zip(befores, answers, strict=True)]
        ends = padded_rows([text[-self._longest :] for text in texts], NO_TOKEN, left=True)
        allowed = self._bans(ends.to(scores.device), scores.clone())  # type: ignore[arg-type]
        for row, before, new in zip(allowed, befores, answers, strict=True):
            # As in transformers: a decoder alone forces no token after a prompt of several.
            forces = self._forced is not None and len(before) == 1
            if forces and not new:
                row.fill_(-torch.inf)[self._forced] = 0
            elif len(new) == int(forces):  # the first token that is not forced
                row[self._not_first] = -torch.inf
        return allowed


def choose(
    scores: Tensor, choosers: Sequence[Chooser], allowed: Tensor | None = None
) -> list[Token | None]:
    """Return the next token of each request; None if its scores hold NaN, or no token is possible.

    Args:
        scores: The model's scores, shape (N, V), under which log-probabilities are reported.
        choosers: N requests.
        allowed: The scores to choose by, shape (N, V), if some tokens are banned (`TokenRules.apply`).
    """
    scores = scores.float()
    masked = scores if allowed is None else allowed.float()
    best, greedy = masked.max(-1)  # NaN in a row makes its maximum NaN
    is_usable = best.isfinite()
    if allowed is not None:  # a ban hides NaN
        is_usable &= ~scores.isnan().any(-1)
    usable = is_usable.tolist()
    tokens: list[int | None] = [
        int(t) if ok else None for t, ok in zip(greedy.tolist(), usable, strict=True)
    ]
    for i, token in _sampled(masked, best, choosers, usable):
        tokens[i] = token
    chosen: list[Token | None] = [None if t is None else Token(t) for t in tokens]
    reported = [
        i for i, c in enumerate(choosers) if c.top_logprobs is not None and tokens[i] is not None
    ]
    if reported:
        rows = _rows(scores, reported)
        logprobs = rows - rows.logsumexp(-1, keepdim=True)
        own = torch.tensor([[tokens[i]] for i in reported], device=rows.device)
        own_logprobs = logprobs.gather(-1, own)[:, 0].tolist()
        most = min(max(choosers[i].top_logprobs or 0 for i in reported), scores.shape[-1])
        values, ids = logprobs.topk(most) if most else (logprobs[:, :0], logprobs[:, :0])
        found = zip(reported, own_logprobs, ids.tolist(), values.tolist(), strict=True)
        for i, logprob, likely, row in found:
            token, count = tokens[i], choosers[i].top_logprobs
            assert token is not None
            top = zip(likely[:count], row[:count], strict=True)
            chosen[i] = Token(token, logprob, tuple(top))
    for chooser in choosers:
        chooser.advance()
    return chosen


def _rows(x: Tensor, rows: list[int]) -> Tensor:
    """Return some rows of a tensor, without a copy if these are all."""
    return x if len(rows) == len(x) else x[rows]


def _sampled(
    scores: Tensor, best: Tensor, choosers: Sequence[Chooser], usable: Sequence[bool]
) -> Iterator[tuple[int, int]]:
    """Yield the row and the token of each request that samples.

    Requests with the same top_k are computed together, so a step waits for a GPU a few times, not for each request.
    """
    groups: dict[int | None, list[int]] = {}
    for i, chooser in enumerate(choosers):
        sampling = chooser.sampling
        if usable[i] and sampling.temperature > 0:
            allows_all = not sampling.top_k and sampling.top_p >= 1
            groups.setdefault(None if allows_all else sampling.top_k, []).append(i)
    size = max(CPU_BYTES // scores[0].nbytes, 1) if scores.is_cpu else len(scores)
    for group in groups.values():
        for start in range(0, len(group), size):
            rows = group[start : start + size]
            own = _rows(scores, rows) - _rows(best, rows)[:, None]
            yield from zip(rows, _sample(own, [choosers[i] for i in rows]), strict=True)


def _sample(scores: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """Draw a token for each request of a group: temperature, then top_k, then top_p, as transformers does.

    The device computes the probabilities of all rows at once. The CPU reads only those that a draw needs, and adds them
    in float64, which not every device has.

    Args:
        scores: Shape (N, V), 0 for the most likely token of each row. Overwritten.
        choosers: N requests.
    """
    samplings = [chooser.sampling for chooser in choosers]
    temperatures = [max(sampling.temperature, COLDEST) for sampling in samplings]
    scores.div_(torch.tensor(temperatures, dtype=scores.dtype, device=scores.device)[:, None])
    points = [chooser.draw() for chooser in choosers]
    top_p, top_k, size = [s.top_p for s in samplings], samplings[0].top_k, scores.shape[-1]
    if top_k:
        return _from_most_likely(scores, points, top_p, min(top_k, size))
    if top_p[0] < 1:
        totals = scores.logsumexp(-1, keepdim=True)
        return _from_most_likely(scores, points, top_p, min(FEW, size), totals)
    return _from_all(scores.softmax(-1), points)


def _from_most_likely(
    scores: Tensor,
    points: Sequence[float],
    top_p: Sequence[float],
    count: int,
    totals: Tensor | None = None,
) -> list[int]:
    """Draw a token of each row from the most likely ones that hold the share top_p.

    Args:
        scores: Shape (N, V).
        points: Where to draw, N numbers in [0, 1).
        top_p: N shares.
        count: Number of tokens to sort. Rows in which these do not hold the share are sorted whole.
        totals: The log of the sum of all tokens, shape (N, 1); None if top_p is a share of the sorted ones.
    """
    values, ids = scores.topk(count)
    probabilities = values.softmax(-1) if totals is None else (values - totals).exp()
    probabilities, ids = probabilities.cpu(), ids.cpu()
    before = probabilities.cumsum(-1).sub_(probabilities)
    allowed = before < torch.tensor(top_p, dtype=before.dtype)[:, None]
    allowed[:, 0] = True  # also for a top_p that is 0 in float32
    sums = probabilities.masked_fill_(~allowed, 0).cumsum(-1, dtype=torch.float64)
    tokens = [
        int(row[_first_beyond(own, point * own[-1])])
        for row, own, point in zip(ids.numpy(), sums.numpy(), points, strict=True)
    ]
    size = scores.shape[-1]
    if totals is not None and count < size:
        rows = allowed[:, -1].nonzero()[:, 0].tolist()
        if rows:
            again = [points[i] for i in rows], [top_p[i] for i in rows], size, _rows(totals, rows)
            drawn = _from_most_likely(_rows(scores, rows), *again)
            for i, token in zip(rows, drawn, strict=True):
                tokens[i] = token
    return tokens


def _from_all(probabilities: Tensor, points: Sequence[float]) -> list[int]:
    """Draw a token of each row (N, V) at N points in [0, 1). The CPU reads the sums of all blocks, and one block."""
    missing = -probabilities.shape[-1] % BLOCK
    padded = F.pad(probabilities, (0, missing)) if missing else probabilities  # `pad` copies
    blocks = padded.unflatten(-1, (-1, BLOCK))
    wide = torch.float64 if blocks.is_cpu else torch.float32
    ends = blocks.sum(-1, dtype=wide).cpu().numpy().cumsum(-1, dtype=np.float64)
    targets = [point * own[-1] for own, point in zip(ends, points, strict=True)]
    chosen = [_first_beyond(own, target) for own, target in zip(ends, targets, strict=True)]
    tokens = []
    for shares, own, target, block in zip(
        blocks[range(len(blocks)), chosen].cpu().numpy(), ends, targets, chosen, strict=True
    ):
        start = own[block - 1] if block else 0.0
        tokens.append(
            block * BLOCK + _first_beyond(shares.cumsum(dtype=np.float64), target - start)
        )
    return tokens


def _first_beyond(sums: np.ndarray, target: float) -> int:
    """Return the first of these growing sums that is larger than the target, else the first of the largest."""
    return int(sums.searchsorted(min(target, np.nextafter(sums[-1], 0)), side="right"))

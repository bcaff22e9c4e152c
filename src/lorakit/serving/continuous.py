"""Continuous batching: each step computes the next token of all running requests, and parts of new prompts.

A step is one packed row of tokens, in which each request has its own adapters (`Adapters.per_token`) and its own keys
(`lorakit.serving.paged_attention`). Requests join and leave between steps.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapters.handle import own_handle
from lorakit.adapters.layer_adapters import LayerAdapters
from lorakit.adapters.slots import Slots
from lorakit.evaluation.prompt_cache import ARGUMENT
from lorakit.models.heads import output_embeddings
from lorakit.models.layers import ADAPTERS
from lorakit.serving.answer import Answer
from lorakit.serving.context import context_of
from lorakit.serving.engine import Lease, Limits, Token
from lorakit.serving.paged_attention import NAME, Part, Step, compute
from lorakit.serving.paged_check import checked_storage
from lorakit.serving.pages import Key, PagePool, first_key, next_key
from lorakit.serving.threaded_engine import SCORED_ROWS, ThreadedEngine, choice_of

_LOG = logging.getLogger(__name__)

PAGE = 16
"""Tokens of a page. Small pages waste little memory at the end of a text, and share short prefixes."""

STEP_TOKENS = 256
"""Most tokens of a step. More compute prompts a little faster; fewer delay the running answers less."""


def salt_of(lease: Lease) -> str:
    """Return what the keys and values of a request depend on besides its tokens."""
    receipt = lease.receipt
    return repr((receipt.base, [(digest, weight) for _, digest, weight in receipt.adapters]))


@dataclass(eq=False)
class _Running:
    """A request that has pages."""

    answer: Answer
    tokens: list[int]
    """Prompt and answer."""
    past: int
    """Number of tokens whose keys and values are cached."""
    pages: list[int]
    keys: list[Key]
    """The key before the first page, and the key of each page whose content is known to the pool."""
    needed: int
    """Number of pages of the longest possible answer."""
    prefix: Key | None
    """Key of the first full page of the prompt that was not cached."""
    count: int = 0
    """Number of tokens in the current step."""

    @property
    def is_prefill(self) -> bool:
        """Whether tokens besides the last one are not computed yet."""
        return len(self.tokens) - self.past > 1


class ContinuousEngine(ThreadedEngine):
    """Engine with continuous batching over a paged cache.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        cache_bytes: Memory for keys and values.
        running: Most requests in a step.
        queue: Most waiting requests.
        prompt_tokens: Length of a prompt that a model without a stated context must accept.

    Raises:
        UnsupportedModelError: The model cannot be computed this way. The message says why, as the end of a sentence.
    """

    name = "continuous"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        cache_bytes: int = 2**30,
        running: int = 32,
        queue: int = 256,
        prompt_tokens: int | None = None,
    ) -> None:
        self._storage = checked_storage(model, cache_bytes, PAGE)
        self._pool = PagePool(self._storage.pages)
        capacity = self._storage.pages * PAGE
        context, bound = context_of(model, tokenizer, prompt_tokens)
        limits = Limits(min(context, capacity), queue, running, cache_tokens=capacity)
        super().__init__(model, tokenizer, limits, bound)
        self._step_tokens = max(STEP_TOKENS, running)
        self._requests: list[_Running] = []
        self._slots = Slots()
        self._stock = model.config._attn_implementation or "sdpa"
        model.set_attn_implementation(NAME)

    def close(self, timeout: float | None = None) -> bool:
        """End the thread, and restore the model's own attention."""
        ended = super().close(timeout)
        if ended and self.model.config._attn_implementation == NAME:
            self.model.set_attn_implementation(self._stock)
        return ended

    def _running(self) -> Sequence[Answer]:
        return [request.answer for request in list(self._requests)]

    def _cache_used(self) -> float:
        return 1 - self._pool.available / self._pool.count

    def _score(self, tokens: list[int], lease: Lease, start: int) -> list[float]:
        self.model.set_attn_implementation(self._stock)
        try:
            return super()._score(tokens, lease, start)
        finally:
            self.model.set_attn_implementation(NAME)

    def _scores(self, tokens: list[int], start: int) -> Iterator[Tensor]:
        """Compute a part at a time (`ThreadedEngine._scores`), with the keys and values of those before."""
        ids = torch.tensor([tokens[:-1]], device=self.model.device)
        # One part needs no cache, which is outside the memory for pages.
        # Without the configuration it keeps all keys, also if that names a sliding window that the model ignores.
        cache = DynamicCache() if len(tokens) - start > SCORED_ROWS else None
        done = 0
        for first in range(start - 1, len(tokens) - 1, SCORED_ROWS):
            end = min(first + SCORED_ROWS, len(tokens) - 1)
            yield self.model(
                input_ids=ids[:, done:end],
                use_cache=cache is not None,
                logits_to_keep=end - first,
                **{ARGUMENT: cache},
            ).logits[0]
            done = end

    # --- between steps -----------------------------------------------------------------------------------

    def _end_cancelled(self) -> None:
        super()._end_cancelled()
        for request in self._requests[:]:
            if request.answer.is_cancelled:
                self._remove(request)
                request.answer.end("cancelled")

    def _remove(self, request: _Running) -> None:
        self._pool.release(request.pages)
        self._requests.remove(request)

    def _admit(self) -> None:
        """Start waiting requests, in their turns, while there is room for their longest answers."""
        while len(self._requests) < self.limits.running:
            with self._changed:
                turns = list(self._waiting.turns())
            # A prefix that another request computes now is found in a later step.
            computed = {r.prefix for r in self._requests if r.is_prefill}
            for answer in turns:
                request = self._prepare(answer)
                if request.prefix is None or request.prefix not in computed:
                    break
            else:
                return
            reserved = sum(r.needed - len(r.pages) for r in self._requests)
            idle = sum(not self._pool.is_held(page) for page in request.pages)
            if self._pool.available - idle - reserved < request.needed - len(request.pages):
                return  # no smaller request overtakes: this one might never start
            with self._changed:
                self._waiting.take(answer)
            for page in request.pages:
                self._pool.hold(page)
            answer.cached_tokens = request.past
            self._requests.append(request)

    def _prepare(self, answer: Answer) -> _Running:
        """Return a waiting request with the pages of its prompt that are cached. They are not held yet."""
        tokens = list(answer.request.prompt)
        keys, pages, missing = [first_key(salt_of(answer.request.lease))], [], None
        # The last token is never cached: it must be computed for its scores.
        for start in range(0, len(tokens) - PAGE, PAGE):
            key = next_key(keys[-1], tokens[start : start + PAGE])
            page = self._pool.find(key)
            if page is None:
                missing = key
                break
            keys.append(key)
            pages.append(page)
        needed = -(-(len(tokens) + answer.request.max_tokens) // PAGE)
        return _Running(answer, tokens, len(pages) * PAGE, pages, keys, needed, missing)

    # --- a step ------------------------------------------------------------------------------------------

    def _advance(self) -> bool:
        self._admit()
        batch = self._schedule()
        if not batch:
            return False
        computed = self._compute(batch)
        self.steps += 1
        for request, token in computed:
            request.past += request.count
            if request.past == len(request.tokens):
                self._accept(request, token)
            if not request.answer.has_ended:
                self._name_pages(request)
        return True

    def _accept(self, request: _Running, token: Token | None) -> None:
        """Add the next token of a request; None if its scores hold NaN."""
        if token is not None:
            request.tokens.append(token.id)
            self.tokens += 1
        if request.answer.accept(token):
            self._finish(request, has_failed=token is None)

    def _schedule(self) -> list[_Running]:
        """Return the requests of the next step, those with one token first; each has its number of tokens."""
        # At least as many as running requests, so each answer gets its token before prompts get the rest.
        budget = self._step_tokens
        requests = sorted(self._requests, key=lambda request: request.is_prefill)
        for request in requests:
            request.count = min(budget, len(request.tokens) - request.past)
            budget -= request.count
        batch = sorted((r for r in requests if r.count), key=lambda request: request.count > 1)
        for request in batch:
            while len(request.pages) * PAGE < request.past + request.count:
                page = self._pool.take()
                self._storage.clear(page)
                request.pages.append(page)
        return batch

    def _compute(self, batch: list[_Running]) -> list[tuple[_Running, Token | None]]:
        """Return the requests that were computed, and their next tokens (`_next_tokens`).

        After an error each request is computed alone, and only those that fail again end with it.
        """
        found = self._attempt(partial(self._next_tokens, batch))
        if not isinstance(found, Exception):
            return list(zip(batch, found, strict=True))
        if len(batch) == 1:
            _LOG.warning("A request failed: %s", found, exc_info=found)
            batch[0].answer.fail(found)
            self._finish(batch[0], has_failed=True)
            return []
        _LOG.warning("Requests are computed one by one, because their batch failed: %s", found)
        return [pair for request in batch for pair in self._compute([request])]

    def _next_tokens(self, batch: list[_Running]) -> list[Token | None]:
        """Return the next token of each request; None before the end of its prompt, or if its scores hold NaN."""
        scores = self._forward(batch)
        # A prompt that is not at its end yet has scores that nobody needs.
        ready = [i for i, r in enumerate(batch) if r.past + r.count == len(r.tokens)]
        tokens: list[Token | None] = [None] * len(batch)
        if ready:
            chosen = self._choose(scores[ready], [batch[i].answer for i in ready])
            for i, token in zip(ready, chosen, strict=True):
                tokens[i] = token
        return tokens

    def _forward(self, batch: list[_Running]) -> Tensor:
        """Return the scores after the last token of each request (N, V)."""
        parts = [Part(r.tokens[r.past : r.past + r.count], r.past, r.pages) for r in batch]
        step = Step(self._storage, parts, self.model.device)
        handle = own_handle(self.model)
        spans = [(choice_of(r.answer.request.lease.blend), r.count) for r in batch]
        choosing = nullcontext() if handle is None else handle.per_token(spans, slots=self._slots)
        with choosing:
            return compute(self.model, step, adapts_head=self._adapts_head(batch))

    def _adapts_head(self, batch: list[_Running]) -> bool:
        """Return whether an adapter of a batch changes the output embedding."""
        head = output_embeddings(self.model)
        slot = None if head is None else head._modules.get(ADAPTERS)
        if not isinstance(slot, LayerAdapters):
            return False
        return any(name in slot for r in batch for name, _ in r.answer.request.lease.blend)

    def _finish(self, request: _Running, *, has_failed: bool) -> None:
        """Free the pages of a request that has ended, and keep what other requests can reuse."""
        if has_failed:
            self._pool.forget(request.pages)
        else:
            self._name_pages(request)
        self._remove(request)

    def _name_pages(self, request: _Running) -> None:
        """Tell the pool the content of the pages that are full now."""
        while len(request.keys) * PAGE <= request.past:
            i = len(request.keys) - 1
            key = next_key(request.keys[-1], request.tokens[i * PAGE : (i + 1) * PAGE])
            request.keys.append(key)
            self._pool.name(request.pages[i], key)

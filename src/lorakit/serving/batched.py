"""Batches that end together: `model.generate` with an adapter for each row (`Adapters.per_sample`).

Runs on every model that generates text, also where keys cannot be paged: encoder-decoders, other attentions. A
request waits until the batch before it has ended. It is also the reference that continuous batching is tested against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lorakit.compute.batching import prompt_input
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.generation_settings import generation_config, token_rules
from lorakit.evaluation.prompt_batches import batch_rule, only_settings, padded
from lorakit.serving.answer import Answer
from lorakit.serving.context import context_of
from lorakit.serving.engine import Limits
from lorakit.serving.threaded_engine import SCORED_ROWS, StaticBatchEngine


class BatchedEngine(StaticBatchEngine):
    """Engine that runs `model.generate` on one batch after another.

    Args:
        model: A model that generates text.
        tokenizer: Its tokenizer.
        running: Most requests in a batch.
        queue: Most waiting requests.
        prompt_tokens: Length of a prompt that a model without a stated context must accept.
        notice: Why the model is computed this way.
    """

    name = "batched"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        running: int = 32,
        queue: int = 256,
        prompt_tokens: int | None = None,
        notice: str | None = None,
    ) -> None:
        context, bound = context_of(model, tokenizer, prompt_tokens)
        limits = Limits(context, queue, running, model.config.is_encoder_decoder)
        self._rule = batch_rule(model)
        super().__init__(model, tokenizer, limits, notice, self._rule.notice, bound)

    def _fits(self, batch: Sequence[Answer]) -> bool:
        """Return whether prompts can share a batch, and the context holds it.

        Each row, also an ended one, grows until the last one ends.
        """
        lengths = [len(answer.request.prompt) for answer in batch]
        can_share = all(self._rule.can_share(lengths[0], other) for other in lengths[1:])
        room = self.limits.room_after(max(lengths))
        return can_share and max(answer.request.max_tokens for answer in batch) <= room

    def _compute(self, batch: list[Answer]) -> None:
        """Generate all answers. After an error each is generated alone from its start, unless it has delivered text."""
        error = self._attempt(partial(self._generate, batch))
        if error is None:
            return
        rest = [answer for answer in batch if not answer.has_ended]
        again = [answer for answer in rest if len(batch) > 1 and not answer.tokens]
        for answer in rest:
            if answer not in again:
                answer.fail(error)
        for answer in again:
            self._compute([answer])

    def _generate(self, batch: list[Answer]) -> None:
        model = self.model
        longest = max(answer.request.max_tokens for answer in batch)
        config = generation_config(
            model, self.tokenizer, Decoding(max_new_tokens=longest), stop_ids=()
        )
        config.eos_token_id = None  # each answer knows its own end
        # `_choose` applies the rules: `generate` would hide the model's scores, which are reported and verified.
        for name in token_rules(model):
            setattr(config, name, None)
        prompts = [self._prompt(answer.request.prompt) for answer in batch]
        inputs = padded(model, prompts, config.pad_token_id)
        leases = [answer.request.lease for answer in batch]
        with self._by_row(leases), only_settings(model, config):
            model.generate(  # type: ignore[operator]
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList([_NextTokens(self, batch)]),
                stopping_criteria=StoppingCriteriaList([_Ended(batch)]),
            )
        for answer in batch:
            answer.end("length")

    def _prompt(self, prompt: Sequence[int]) -> list[int]:
        """Return the tokens of a prompt as the model reads them."""
        return prompt_input(self.model, self.tokenizer, prompt)

    def _scores(self, tokens: list[int], start: int) -> Iterator[Tensor]:
        if not self.model.config.is_encoder_decoder:
            yield from super()._scores(tokens, start)
            return
        first = self.model.generation_config.decoder_start_token_id  # type: ignore[union-attr]
        prompt, answer = self._prompt(tokens[:start]), [first, *tokens[start:-1]]
        scores = self.model(
            input_ids=torch.tensor([prompt], device=self.model.device),
            decoder_input_ids=torch.tensor([answer], device=self.model.device),
            use_cache=False,
        ).logits[0]
        yield from scores.split(SCORED_ROWS)


class _NextTokens(LogitsProcessor):
    """Chooses each row's token, delivers it, and leaves `generate` no other choice."""

    def __init__(self, engine: BatchedEngine, batch: list[Answer]) -> None:
        self._engine, self._batch = engine, batch

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (B, V) in which all but the chosen token are minus infinity."""
        engine = self._engine
        engine.steps += 1
        engine._end_cancelled()
        if engine._is_closing:
            for answer in engine._running():
                answer.fail(engine._stopped())
        live = [i for i, answer in enumerate(self._batch) if not answer.has_ended]
        tokens = engine._choose(scores[live], [self._batch[i] for i in live]) if live else []
        ids = [0] * len(self._batch)
        for i, token in zip(live, tokens, strict=True):
            self._batch[i].accept(token)
            if token is not None:
                engine.tokens += 1
                ids[i] = token.id
        chosen = torch.tensor(ids, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class _Ended(StoppingCriteria):
    """Ends the rows whose answers have ended."""

    def __init__(self, batch: list[Answer]) -> None:
        self._batch = batch

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        """Return for each row (B) whether its answer has ended."""
        ended = [answer.has_ended for answer in self._batch]
        return torch.tensor(ended, device=input_ids.device)

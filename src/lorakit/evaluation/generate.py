"""Text generation for a list of prompts, in batches."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from lorakit.compute.batch_size import BatchSize
from lorakit.compute.batching import (
    context_length,
    pretraining_length,
    prompt_input,
    require_embeddings,
    room_after,
)
from lorakit.compute.mode import evaluating
from lorakit.compute.model_input import model_prompts, virtual_tokens_of
from lorakit.errors import BaseModelError, DataError
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.generation_settings import generation_config
from lorakit.evaluation.processors import NoRepeatedNGrams, RefuseNaN, StopIfInterrupted
from lorakit.evaluation.prompt_batches import batch_rule, only_settings, padded
from lorakit.evaluation.prompt_cache import ARGUMENT, PromptCache, empty_cache
from lorakit.models.sharding import is_sharded
from lorakit.ops.seeding import seeded
from lorakit.tasks.language_modelling import continuation_text, prompt_ids

Prompt = str | Sequence[int]

_LOG = logging.getLogger(__name__)

_ADVICE = "Lower decoding.max_new_tokens, shorten the prompt, or load the base in 4 bits (base.dtype nf4)."


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    decoding: Decoding | None = None,
    *,
    batch_size: BatchSize | None = None,
    progress: Callable[[int], None] | None = None,
    on_cut: Callable[[int], None] = lambda _: None,
    stop_ids: Sequence[int] = (),
    streamer: BaseStreamer | None = None,
    interrupted: Callable[[], bool] | None = None,
    cache: PromptCache | None = None,
    is_continuation: bool = False,
) -> list[str]:
    """Continue each prompt and return only the new text, without special tokens and what follows an end token.

    Sorts prompts by length, so that batches have little padding. A decoder is padded on the left, so that each
    continuation starts right after its prompt. Prompts that would change each other's texts do not share a batch
    (`batch_rule`). One call at a time for each model: it sets the mode and the generation settings of the model, and
    restores them at the end.

    Args:
        model: A causal or encoder-decoder language model, with its active adapters.
        tokenizer: The model's tokenizer.
        prompts: Texts, or token ids (evaluation passes exactly the tokens of training).
        decoding: By default greedy, up to 128 tokens.
        batch_size: Overrides that of `decoding`, and keeps the number of prompts that fit into memory. Sampling draws
            other random numbers in batches of another size.
        progress: Called after each batch with the number of finished prompts.
        on_cut: Called with the place of each prompt whose new text reached max_new_tokens before an end token.
        stop_ids: Token ids that end a text, besides those of the model and the tokenizer.
        streamer: Receives the tokens of a single prompt as they are generated; needs one beam.
        interrupted: Called after each token; generation ends once it returns True.
        cache: The keys and values of earlier calls with one prompt, which the next call starts from; needs one beam.
        is_continuation: Whether token ids and the new text are one text, as for a prompt that is a text, so that a
            space between them belongs to the new text. An answer in a chat is a text of its own.

    Raises:
        BaseModelError: The model cannot generate text, for example a classifier, or its output is NaN.
        DataError: The prompts are one text, or a prompt is empty, or too long for the model's context.
        LorakitError: A single prompt does not fit into memory.
    """
    if isinstance(prompts, str):
        raise DataError(
            f"The prompts are one text, {prompts[:40]!r}; a list of texts was expected. Write [prompt]."
        )
    decoding = decoding or Decoding()
    _require_generating(model)
    settings = generation_config(model, tokenizer, decoding, stop_ids)
    ids = _encoded(model, tokenizer, prompts, decoding.new_tokens)
    batches = _Batches(model, model_prompts(model, tokenizer, ids), decoding.new_tokens)
    generator = _Generator(
        model, settings, decoding, streamer=streamer, interrupted=interrupted, cache=cache
    )
    batch_size = batch_size or BatchSize(decoding.batch_size or 16, advice=_ADVICE)
    texts = [""] * len(ids)

    def generate_from(start: int) -> int:
        """Continue the prompts of a batch, and return their number."""
        batch = batches.at(start, batch_size.size)
        new_tokens = generator.continued([batches.prompts[i] for i in batch])
        for i, new in zip(batch, new_tokens, strict=True):
            is_one_text = is_continuation or isinstance(prompts[i], str)
            before = ids[i] if is_one_text and not model.config.is_encoder_decoder else []
            texts[i] = continuation_text(tokenizer, before, new)
            if len(new) == decoding.new_tokens:
                on_cut(i)
        return len(batch)

    done = 0
    devices = (parameter.device for parameter in model.parameters())
    with only_settings(model, settings), evaluating(model), seeded(decoding.seed or 0, devices):
        while done < len(ids):
            done += batch_size.fit(
                functools.partial(generate_from, done),
                lengths=[len(batches.prompts[i]) for i in batches.at(done, batch_size.size)],
                during="generation",
            )
            if progress:
                progress(done)
    return texts


def _require_generating(model: PreTrainedModel) -> None:
    """Raise a BaseModelError for a model that cannot generate text."""
    if not model.can_generate():
        raise BaseModelError(
            f"A {type(model).__name__} cannot generate text. Score its predictions with lorakit evaluate, or use a "
            "base with a language-modelling head or the adapter of a text task."
        )


def _encoded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    new_tokens: int,
) -> list[list[int]]:
    """Return the token ids of each prompt.

    Raises:
        DataError: A prompt is empty, or too long for the model's context.
    """
    ids = [
        prompt_input(model, tokenizer, prompt_ids(tokenizer, prompt))
        if isinstance(prompt, str)
        else list(prompt)
        for prompt in prompts
    ]
    if [] in ids:
        raise DataError(f"Prompt {ids.index([]) + 1} is empty; it must have at least one token.")
    named = [(f"Prompt {number}", prompt) for number, prompt in enumerate(ids, start=1)]
    require_embeddings(model, named)
    require_room(model, named, new_tokens)
    return ids


class _Batches:
    """Prompts in batches: sorted by length, so that batches have little padding, and only such as can share one."""

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], new_tokens: int) -> None:
        self.prompts = prompts
        self._model, self._new_tokens = model, new_tokens
        self._short = pretraining_length(model)
        self._order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

    def at(self, start: int, size: int) -> list[int]:
        """Return which prompts are in the batch of at most `size` after `start` shorter ones."""
        first, *others = self._order[start : start + size]
        return [first, *itertools.takewhile(functools.partial(self._can_share, first), others)]

    def _can_share(self, first: int, other: int) -> bool:
        """Return whether a prompt can be in the batch of a prompt that is not longer."""
        length = len(self.prompts[other])
        # transformers takes LongRoPE's factors for a whole batch from its longest row.
        if self._short is not None and length + self._new_tokens > self._short:
            return False
        rule = batch_rule(self._model, self._notify)
        return rule.can_share(len(self.prompts[first]), length)

    def _notify(self, notice: str) -> None:
        _LOG.warning("%s: %s.", type(self._model).__name__, notice)


class _Generator:
    """Continues batches of prompts, all with the same settings."""

    def __init__(
        self,
        model: PreTrainedModel,
        settings: GenerationConfig,
        decoding: Decoding,
        *,
        streamer: BaseStreamer | None,
        interrupted: Callable[[], bool] | None,
        cache: PromptCache | None,
    ) -> None:
        self._model, self._settings = model, settings
        self._ngrams = decoding.no_repeat_ngram
        self._streamer, self._cache = streamer, cache
        self._stopping = StoppingCriteriaList(
            [StopIfInterrupted(interrupted)] if interrupted else []
        )
        # With None, transformers decides.
        self._synced = any(map(is_sharded, model.parameters())) or None

    def continued(self, prompts: list[list[int]]) -> list[list[int]]:
        """Return the new tokens after each prompt, up to an end token."""
        model, settings = self._model, self._settings
        inputs: dict[str, Any] = padded(model, prompts, settings.pad_token_id)  # type: ignore[arg-type]
        # An encoder-decoder starts with one token of its own.
        start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        past = self._past(prompts, inputs)
        if past is not None:
            inputs[ARGUMENT] = past
        bans = [NoRepeatedNGrams(self._ngrams, start)] if self._ngrams else []
        outputs = model.generate(  # type: ignore[operator]
            **inputs,
            generation_config=settings,
            logits_processor=LogitsProcessorList([RefuseNaN(model), *bans]),
            stopping_criteria=self._stopping,
            streamer=self._streamer,
            synced_gpus=self._synced,
        )
        if self._cache and past is not None:
            self._cache.keep(past, outputs[0].tolist())
        ends = set(settings.eos_token_id or ())  # type: ignore[arg-type]  # a list here
        return [
            list(itertools.takewhile(lambda token: token not in ends, row))
            for row in outputs[:, start:].tolist()
        ]

    def _past(
        self, prompts: list[list[int]], inputs: dict[str, torch.Tensor]
    ) -> DynamicCache | None:
        """Return the keys and values of the start of each prompt, if they are known or cost less than in `generate`."""
        if self._cache:
            return self._cache.take(self._model, prompts[0])
        if self._settings.num_beams == 1 or self._synced:
            return None
        return computed_prompts(self._model, inputs, self._settings)


def computed_prompts(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], settings: GenerationConfig
) -> DynamicCache | None:
    """Return the keys and values of the prompts without their last tokens, repeated for each beam.

    `model.generate` itself would compute every prompt once for each of its beams. Return None for a model whose cache
    cannot be repeated, as with recurrent layers. `inputs` are those of `padded`, (B, longest prompt).
    """
    past = empty_cache(model)
    if past is None or not all(hasattr(x, "batch_repeat_interleave") for x in past.layers):
        return None
    if inputs["attention_mask"].sum(1).min() == 1:
        return None  # nothing would remain of a prompt with a single token
    one_token = GenerationConfig(
        max_new_tokens=1, pad_token_id=settings.pad_token_id, use_cache=True
    )
    with only_settings(model, one_token):
        model.generate(  # type: ignore[operator]
            **{name: values[:, :-1] for name, values in inputs.items()},
            generation_config=one_token,
            **{ARGUMENT: past},
        )
    past.batch_repeat_interleave(settings.num_beams or 1)
    return past


def require_room(
    model: PreTrainedModel, prompts: Iterable[tuple[str, Sequence[int]]], new_tokens: int
) -> None:
    """Reject a prompt that exceeds the model's context together with its new tokens and the adapter's virtual ones.

    `prompts` are pairs of a name, for the message, and token ids.

    Raises:
        DataError: A prompt is too long.
    """
    context, virtual = context_length(model), virtual_tokens_of(model).total
    and_virtual = f" and {virtual} virtual ones" if virtual else ""
    for where, prompt in prompts:
        if context and new_tokens > room_after(
            len(prompt) + virtual, context, is_encoder_decoder=model.config.is_encoder_decoder
        ):
            raise DataError(
                f"{where} has {len(prompt)} tokens{and_virtual}; with max_new_tokens {new_tokens} that exceeds the "
                f"model's context of {context}. Shorten the prompt or lower max_new_tokens."
            )

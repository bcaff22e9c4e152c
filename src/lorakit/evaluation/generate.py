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
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
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
from lorakit.compute.finite import refuse_nan
from lorakit.compute.mode import evaluating
from lorakit.compute.model_input import model_prompts, virtual_tokens_of
from lorakit.errors import BaseModelError, DataError
from lorakit.evaluation.decoding import Decoding
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
    if not model.can_generate():
        raise BaseModelError(
            f"A {type(model).__name__} cannot generate text. Score its predictions with lorakit evaluate, or use a "
            "base with a language-modelling head or the adapter of a text task."
        )
    decoding = decoding or Decoding()
    ids = [
        prompt_input(model, tokenizer, prompt_ids(tokenizer, prompt))
        if isinstance(prompt, str)
        else list(prompt)
        for prompt in prompts
    ]
    if [] in ids:
        raise DataError(f"Prompt {ids.index([]) + 1} is empty; it must have at least one token.")
    require_embeddings(model, ((f"Prompt {n}", prompt) for n, prompt in enumerate(ids, start=1)))
    encodes = model.config.is_encoder_decoder
    before = [
        own if (is_continuation or isinstance(prompt, str)) and not encodes else []
        for prompt, own in zip(prompts, ids, strict=True)
    ]
    settings = generation_config(model, tokenizer, decoding, stop_ids)
    require_room(
        model, ((f"Prompt {n}", own) for n, own in enumerate(ids, start=1)), settings.max_new_tokens
    )
    ids = model_prompts(model, tokenizer, ids)  # with the adapter's virtual tokens
    ends = set(settings.eos_token_id or ())  # type: ignore[arg-type]  # a list here
    stopping = StoppingCriteriaList([StopIfInterrupted(interrupted)] if interrupted else [])
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts = [""] * len(ids)
    synced = any(map(is_sharded, model.parameters())) or None  # None: transformers decides
    batch_size = batch_size or BatchSize(decoding.batch_size or 16, advice=_ADVICE)

    def processors(start: int) -> LogitsProcessorList:
        ngrams = decoding.no_repeat_ngram
        bans = [NoRepeatedNGrams(ngrams, start)] if ngrams else []
        return LogitsProcessorList([RefuseNaN(model), *bans])

    short = pretraining_length(model)

    def can_share(first: int, other: int) -> bool:
        """Return whether a prompt can be in the batch of a prompt that is not longer."""
        length = len(ids[other])
        # transformers takes LongRoPE's factors for a whole batch from its longest row.
        if short is not None and length + decoding.new_tokens > short:
            return False
        return batch_rule(model, notify).can_share(len(ids[first]), length)

    def notify(notice: str) -> None:
        _LOG.warning("%s: %s.", type(model).__name__, notice)

    def batch_at(start: int) -> list[int]:
        first, *others = order[start : start + batch_size.size]
        return [first, *itertools.takewhile(functools.partial(can_share, first), others)]

    def generate_from(start: int) -> int:
        """Continue the prompts of a batch, and return their number."""
        batch = batch_at(start)
        inputs: dict[str, Any] = padded(model, [ids[i] for i in batch], settings.pad_token_id)
        # An encoder-decoder starts with one token of its own.
        before_new = 1 if encodes else inputs["input_ids"].shape[1]
        past = None
        if cache:
            past = cache.take(model, ids[batch[0]])
        elif settings.num_beams != 1 and not synced:
            past = computed_prompts(model, inputs, settings)
        if past is not None:
            inputs[ARGUMENT] = past
        outputs = model.generate(  # type: ignore[operator]
            **inputs,
            generation_config=settings,
            logits_processor=processors(before_new),
            stopping_criteria=stopping,
            streamer=streamer,
            synced_gpus=synced,
        )
        if cache and past is not None:
            cache.keep(past, outputs[0].tolist())
        for i, row in zip(batch, outputs[:, before_new:].tolist(), strict=True):
            new = list(itertools.takewhile(lambda token: token not in ends, row))
            texts[i] = continuation_text(tokenizer, before[i], new)
            if len(new) == settings.max_new_tokens:
                on_cut(i)
        return len(batch)

    done = 0
    devices = (parameter.device for parameter in model.parameters())
    with only_settings(model, settings), evaluating(model), seeded(decoding.seed or 0, devices):
        while done < len(order):
            done += batch_size.fit(
                functools.partial(generate_from, done),
                lengths=[len(ids[i]) for i in batch_at(done)],
                during="generation",
            )
            if progress:
                progress(done)
    return texts


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


def generation_config(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    stop_ids: Sequence[int],
) -> GenerationConfig:
    """Return the generation configuration, with only the start and end tokens and `token_rules` of the model.

    `stop_ids` end a text too. Other defaults of a model would give the same settings different meanings on different
    models.
    """
    own = model.generation_config
    assert own is not None  # every model with generate() has one
    ends = list(dict.fromkeys([*ending_tokens(model, tokenizer), *stop_ids]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    samples, beams = bool(decoding.temperature), decoding.beams or 1
    penalty = 1.0 if decoding.length_penalty is None else decoding.length_penalty
    return GenerationConfig(
        max_new_tokens=decoding.new_tokens,
        do_sample=samples,
        temperature=decoding.temperature if samples else None,
        top_p=(decoding.top_p or 1.0) if samples else None,
        top_k=(decoding.top_k or 0) if samples else None,
        num_beams=beams,
        length_penalty=penalty if beams > 1 else None,
        eos_token_id=ends or None,
        pad_token_id=pad,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        use_cache=True,
        **token_rules(model),
    )


def token_rules(model: PreTrainedModel) -> dict[str, Any]:
    """Return which tokens a model's generation configuration forces and bans, without tokens that it does not have.

    Texts need these settings: some models give a high score to a token that must not be generated, such as Marian to
    its padding token.
    """
    # Classifiers have no generation configuration.
    own = getattr(model, "generation_config", None) or GenerationConfig()
    forced, known = own.forced_bos_token_id, range(model.config.get_text_config().vocab_size)
    rules = {
        "forced_bos_token_id": forced if forced in known else None,
        "suppress_tokens": [t for t in own.suppress_tokens or () if t in known],
        "begin_suppress_tokens": [t for t in own.begin_suppress_tokens or () if t in known],
        "bad_words_ids": [
            word for word in own.bad_words_ids or () if all(t in known for t in word)
        ],
    }
    return {name: value for name, value in rules.items() if value not in (None, [])}


def ending_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a text: those of the model's generation configuration, then the tokenizer's."""
    ends = ending_tokens_of_model(model)
    if tokenizer.eos_token_id is not None:
        ends.append(int(tokenizer.eos_token_id))  # type: ignore[arg-type]
    return list(dict.fromkeys(ends))


def ending_tokens_of_model(model: PreTrainedModel) -> list[int]:
    """Return the tokens that end a text by the model's generation configuration."""
    config = getattr(model, "generation_config", None)  # classifiers have none
    end = None if config is None else config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


class StopIfInterrupted(StoppingCriteria):
    """Ends the generation of all rows once a function returns True."""

    def __init__(self, interrupted: Callable[[], bool]) -> None:
        self.interrupted = interrupted

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # type: ignore[override]
        """Return for each row (B) whether its text ends."""
        return torch.full((len(input_ids),), self.interrupted(), device=input_ids.device)


class RefuseNaN(LogitsProcessor):
    """Raises a BaseModelError if the scores of a step are NaN, which decoding would turn into some token."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, V) unchanged."""
        refuse_nan(self.model, scores)
        return scores


class NoRepeatedNGrams(LogitsProcessor):
    """Bans tokens that would repeat an n-gram of the new text.

    The processor of transformers also counts the n-grams of the prompt, whose names and numbers a text has to repeat.
    """

    def __init__(self, size: int, start: int) -> None:
        """Ban n-grams of `size` tokens after the first `start` tokens of each row."""
        self.start = start
        self.ban = NoRepeatNGramLogitsProcessor(size)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, V) with minus infinity at banned tokens."""
        return self.ban(input_ids[:, self.start :], scores)  # type: ignore[arg-type]

"""Text generation: a batch of prompts in, their continuations out, in the order asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorakit.compute.batching import context_length
from lorakit.compute.mode import evaluating
from lorakit.compute.model_input import model_prompts, virtual_tokens_of
from lorakit.errors import BaseModelError, DataError
from lorakit.evaluation.decoding import Decoding
from lorakit.methods.virtual_tokens import PREFIX_START
from lorakit.ops import seeded

Prompt = str | Sequence[int]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    decoding: Decoding | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Continue each prompt and return the new text alone, without special tokens.

    Prompts are texts, or token ids where the caller has them (so that evaluation feeds exactly the tokens that
    training saw). They are sorted by length, so that a batch holds little padding, and padded on the left, so that
    every continuation starts right after its prompt.

    Args:
        model: A causal or encoder-decoder language model; its adapters take part as they are activated.
        tokenizer: The model's tokenizer.
        prompts: Texts, or sequences of token ids.
        decoding: Greedy, up to 128 tokens, by default.
        progress: Called with the number of prompts finished, after each batch.

    Raises:
        BaseModelError: The model labels text and generates none.
        DataError: A prompt is empty or leaves no room in the model's context.
    """
    if not model.can_generate():
        raise BaseModelError(
            f"A {type(model).__name__} generates no text. Score what it says of a text with lorakit evaluate, or "
            "name a base with a language-modelling head or the adapter of a text task."
        )
    decoding = decoding or Decoding()
    ids = [_encode(tokenizer, prompt) for prompt in prompts]
    if [] in ids:
        raise DataError(
            f"Prompt {ids.index([]) + 1} is empty; the model needs a token to continue from."
        )
    ids = model_prompts(model, tokenizer, ids)
    settings = _generation_config(model, tokenizer, decoding)
    _check_lengths(model, ids, settings.max_new_tokens, virtual_tokens_of(model).total)
    processors = LogitsProcessorList()
    if decoding.no_repeat_ngram:
        # Its place in `settings` would index the vocabulary with the ids of virtual tokens.
        processors.append(NoRepeatedNGrams(decoding.no_repeat_ngram))
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts = [""] * len(ids)
    size = decoding.batch_size or 16
    with _generating(model, settings, decoding.seed or 0):
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            inputs = _left_pad([ids[i] for i in chosen], settings.pad_token_id, model.device)
            outputs = model.generate(  # type: ignore[operator]
                **inputs, generation_config=settings, logits_processor=processors
            )
            if not model.config.is_encoder_decoder:
                outputs = outputs[:, inputs["input_ids"].shape[1] :]
            decoded = tokenizer.batch_decode(outputs, skip_special_tokens=True)
            for i, text in zip(chosen, decoded, strict=True):
                texts[i] = text
            if progress:
                progress(start + len(chosen))
    return texts


@contextmanager
def _generating(model: PreTrainedModel, settings: GenerationConfig, seed: int) -> Iterator[None]:
    """Leave the model, and the random state that dropout draws from, as they were."""
    own = model.generation_config
    # `generate` takes what a configuration leaves open from the model's own: a temperature, a repetition penalty.
    model.generation_config = settings
    try:
        with evaluating(model), seeded(seed, (p.device for p in model.parameters())):
            yield
    finally:
        model.generation_config = own


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    return list(tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)  # type: ignore[arg-type]


def _check_lengths(model: PreTrainedModel, ids: list[list[int]], new: int, virtual: int) -> None:
    context = context_length(model)
    beside = f" and {virtual} virtual ones" if virtual else ""
    for number, prompt in enumerate(ids, start=1):
        # An encoder-decoder has a context for each.
        needed = max(len(prompt), new) if model.config.is_encoder_decoder else len(prompt) + new
        if context and needed > context:
            raise DataError(
                f"Prompt {number} has {len(prompt) - virtual} tokens{beside}; with max_new_tokens "
                f"{new} that exceeds the model's context of {context}. Shorten the prompt or "
                "lower max_new_tokens."
            )


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding
) -> GenerationConfig:
    """Take from the model which tokens begin and end a text, and nothing else.

    Its other defaults would make the same settings mean something else on each model.
    """
    own = model.generation_config
    assert own is not None  # every model with generate() has one
    end = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(int(tokenizer.eos_token_id))  # type: ignore[arg-type]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    draws, beams = bool(decoding.temperature), decoding.beams or 1
    penalty = 1.0 if decoding.length_penalty is None else decoding.length_penalty
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens or 128,
        do_sample=draws,
        temperature=decoding.temperature if draws else None,
        top_p=(decoding.top_p or 1.0) if draws else None,
        top_k=(decoding.top_k or 0) if draws else None,
        num_beams=beams,
        length_penalty=penalty if beams > 1 else None,
        eos_token_id=ends or None,
        pad_token_id=pad,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        forced_bos_token_id=own.forced_bos_token_id,
        use_cache=True,
    )


class NoRepeatedNGrams(LogitsProcessor):
    """Bans tokens that would repeat an n-gram, also where virtual tokens stand between others.

    A virtual token can be part of an n-gram and is nothing that could be generated: each gets a column beside the
    vocabulary for as long as the ban is made.
    """

    def __init__(self, size: int) -> None:
        self.ban = NoRepeatNGramLogitsProcessor(size)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, V) with minus infinity at banned tokens."""
        vocabulary = scores.shape[-1]
        virtual = input_ids >= PREFIX_START
        found, column = input_ids[virtual].unique(return_inverse=True)
        ids = input_ids.masked_scatter(virtual, vocabulary + column)
        wide = torch.nn.functional.pad(scores, (0, len(found)))
        return self.ban(ids, wide)[:, :vocabulary]  # type: ignore[arg-type]


def _left_pad(
    prompts: list[list[int]], pad: int | None, device: torch.device
) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device),
        "attention_mask": torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device
        ),
    }

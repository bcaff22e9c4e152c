"""Batches for a base model, on its device: padded, packed, or for an encoder-decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.compute.model_input import model_examples
from lorakit.data.batches import IGNORED, collate, padded_rows
from lorakit.data.packing import pack
from lorakit.errors import DataError
from lorakit.models.heads import input_embeddings
from lorakit.models.loading import Base
from lorakit.ops.rows import round_up
from lorakit.tasks import Example, LanguageExample

Collate = Callable[[Sequence[Example]], dict[str, torch.Tensor]]
"""Function from examples to a batch on the model's device."""

SHORT = 64
"""Longest row, in tokens, that is rounded up to `SHORT_STEP`."""

SHORT_STEP, PADDED_STEP, PACKED_STEP = 4, 8, 32
"""Batch widths are rounded up to multiples of these, because CPU libraries cache kernels and memory for each shape:
hundreds of megabytes for all widths. The first is for short padded rows, the second for longer ones, and the third for
packed rows, which are the longest. Long rows have a larger step because rounding adds a smaller share to them."""


def collator(base: Base, *, packed: bool = False) -> Collate:
    """Return a function that makes batches for `base`: padded, packed, or for an encoder-decoder."""
    model, tokenizer = base.model, base.text_tokenizer
    pad = int(tokenizer.pad_token_id or 0)  # type: ignore[arg-type]
    context = context_length(model)

    def make(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        examples = model_examples(base, examples)
        language = [e for e in examples if isinstance(e, LanguageExample)]
        if packed:
            batch = pack(language, pad, step=PACKED_STEP)
        elif language and model.config.is_encoder_decoder:
            batch = _encoder_decoder_batch(base, language, pad)
        else:
            batch = collate(examples, pad, step=padded_step(max(map(len, examples)), context))
        return {name: tensor.to(model.device) for name, tensor in batch.items()}

    return make


def padded_step(longest: int, context: int | None = None) -> int:
    """Return the multiple to which a padded batch is rounded up; 1 where that would exceed the context."""
    step = SHORT_STEP if longest <= SHORT else PADDED_STEP
    return step if context is None or round_up(longest, step) <= context else 1


def target_counter(base: Base) -> Callable[[Example], int]:
    """Return a function that counts the targets of an example, as `Objective.count` counts those of its batch."""
    encodes = base.model.config.is_encoder_decoder
    forced = len(_forced_start(base))

    def count(example: Example) -> int:
        if not isinstance(example, LanguageExample):
            return 1
        if encodes:
            return forced + len(example) - example.prompt_length
        return sum(example.loss_mask[1:])

    return count


def prompt_input(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]
) -> list[int]:
    """Return the tokens of a prompt as the model reads them: an encoder reads an end-of-sequence token after it."""
    ids = list(prompt_ids)
    if model.config.is_encoder_decoder:
        ids.append(int(tokenizer.eos_token_id))  # type: ignore[arg-type]
    return ids


def _encoder_decoder_batch(
    base: Base, examples: Sequence[LanguageExample], pad: int
) -> dict[str, torch.Tensor]:
    """Return padded encoder inputs, and the completions as labels."""
    start = _forced_start(base)
    inputs = [prompt_input(base.model, base.text_tokenizer, e.prompt_ids) for e in examples]
    targets = [[*start, *e.input_ids[e.prompt_length :]] for e in examples]
    return {
        "input_ids": padded_rows(inputs, pad),
        "attention_mask": padded_rows([[1] * len(ids) for ids in inputs], 0),
        "labels": padded_rows(targets, IGNORED),
    }


def _forced_start(base: Base) -> list[int]:
    """Return the first token of a completion if generation forces it (BART): training inserts it too."""
    generation = getattr(base.model, "generation_config", None)
    forced = getattr(generation, "forced_bos_token_id", None)
    return [] if forced is None else [int(forced)]


def require_embeddings(model: PreTrainedModel, texts: Iterable[tuple[str, Sequence[int]]]) -> None:
    """Reject tokens without an embedding. On a GPU they would be an error that ends the process.

    The tokenizer of an adapter, and of some bases, has more tokens than the base. `texts` has a name for messages and
    the token ids of each text.

    Raises:
        DataError: An id is beyond the base's vocabulary.
    """
    count = getattr(input_embeddings(model), "num_embeddings", None)
    if count is None:
        return
    for where, ids in texts:
        if max(ids, default=0) >= count:
            raise DataError(
                f"{where} has the token id {max(ids):,}, and the base has {count:,} tokens. Leave out the token, which "
                "only the tokenizer knows."
            )


def room_after(length: int, context: int, *, is_encoder_decoder: bool) -> int:
    """Return the most new tokens after an input of `length` tokens; less than 1 if there is no room for any.

    An encoder-decoder has a context for its input and one for its answer.
    """
    if is_encoder_decoder:
        return context if length <= context else 0
    return context - length


def attention_windows(model: PreTrainedModel) -> set[int]:
    """Return the windows and chunks of the model's attention layers, in tokens; empty if all see every token."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    # Of fields that differ between layers, the configuration of each layer has its own; getattr rejects them.
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    return {
        window
        for kind, name in _WINDOWS.items()
        if kinds is None or kind in kinds
        for layer in layers
        if (window := vars(layer).get(name))
    }


_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""The setting of each kind of layer."""


def context_length(model: PreTrainedModel) -> int | None:
    """Return the longest input in tokens that the model supports; None if it has no limit or does not state one."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    # T5 also has n_positions, but its relative positions have no limit.
    if context is None and not config.is_encoder_decoder:
        # MPT's max_seq_len is the length of its table of biases.
        context = getattr(config, "n_positions", getattr(config, "max_seq_len", None))
    # XLNet states -1 for no limit. DeBERTa's positions are relative.
    if context is None or context < 1 or not getattr(config, "position_biased_input", True):
        return None
    for name, module in model.named_modules():  # RoBERTa's positions start after its padding index
        padding = getattr(module, "padding_idx", None)
        if padding is not None and name.endswith("position_embeddings"):
            return context - padding - 1
    return context


def pretraining_length(model: PreTrainedModel) -> int | None:
    """Return the tokens for which LongRoPE uses its short factors; None for other positions."""
    own = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    entries = [own, *(entry for entry in own.values() if isinstance(entry, dict))]  # by layer type
    lengths = [
        int(entry["original_max_position_embeddings"])
        for entry in entries
        if entry.get("rope_type") == "longrope"
    ]
    return min(lengths, default=None)

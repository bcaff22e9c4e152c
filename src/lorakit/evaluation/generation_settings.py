"""Settings of `model.generate`: those of a `Decoding`, and the tokens that end, start or are banned from a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorakit.evaluation.decoding import Decoding


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

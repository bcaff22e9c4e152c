"""Read the tokenizer of a GGUF file, with what ``transformers`` does not read from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_GPT2_SPLIT = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais", "mellum", "trillion"})
"""llama.cpp's names of pre-tokenizers that split like GPT-2, as transformers does for a name it does not know."""
_STARTS_WITH_BOS = frozenset(
    {
        *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1"),
        *("pixtral", "midm-2.0", "lfm2", "tekken"),
    }
)
"""Pre-tokenizers whose texts llama.cpp starts with bos, unless the file says otherwise."""
_GPT2_SPLIT_AFTER_DIGITS = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)
"""llama.cpp's names of pre-tokenizers that isolate every digit before they split like GPT-2."""


def read_tokenizer(
    gguf: Path, metadata: dict[str, Any], config: PretrainedConfig
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Return the tokenizer, and notices if it may differ from that of the training."""
    from transformers import AutoTokenizer

    # Without trust_remote_code, a tokenizer_config.json beside the file could make transformers ask for its code.
    tokenizer = AutoTokenizer.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False
    )
    return tokenizer, _finish(tokenizer, metadata, config)


def _finish(
    tokenizer: PreTrainedTokenizerBase, metadata: dict[str, Any], config: PretrainedConfig
) -> list[str]:
    """Restore what transformers does not read from the file; return notices."""
    for name in ("bos", "eos"):  # transformers before 5.19 takes one for the other
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokenizer):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token))
    if metadata.get("tokenizer.ggml.pre") in _STARTS_WITH_BOS:
        tokenizer.add_bos_token = metadata.get("tokenizer.ggml.add_bos_token", True)
    if metadata.get("tokenizer.ggml.add_space_prefix") is False:
        _remove_space_prefix(tokenizer)
    tokenizer.model_max_length = getattr(
        config, "max_position_embeddings", tokenizer.model_max_length
    )
    return _restore_pre_tokenizer(tokenizer, metadata)


def _remove_space_prefix(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a SentencePiece tokenizer put no space before the first word, and remove none when it decodes."""
    from tokenizers import decoders, pre_tokenizers

    backend = cast(Any, tokenizer).backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):  # others never put one
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        # LlamaTokenizer builds both again from this.
        cast(Any, tokenizer).add_prefix_space = tokenizer.init_kwargs["add_prefix_space"] = False


def _restore_pre_tokenizer(
    tokenizer: PreTrainedTokenizerBase, metadata: dict[str, Any]
) -> list[str]:
    """Restore the pre-tokenizer that the model was trained with; return notices.

    GGUF names it, but transformers knows only some names and splits like GPT-2 for the others. For
    SmolLM, a space before a digit would then be tokenized differently than in training.
    """
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return []
    from tokenizers import pre_tokenizers

    rule = metadata.get("tokenizer.ggml.pre", "default")
    if rule in _GPT2_SPLIT_AFTER_DIGITS:
        backend = cast(Any, tokenizer).backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        return []
    if rule in _GPT2_SPLIT or rule in _rules_of_transformers():
        return []
    if rule == "default":  # converters of before May 2024 wrote no name, for Llama 3 and others
        if metadata["general.architecture"] == "gpt2":
            return []
        found = "names no pre-tokenizer, so text is split as for GPT-2"
    else:
        found = f"names the pre-tokenizer '{rule}', which lorakit does not know"
    return [
        f"This GGUF file {found}: some text may be tokenized differently than in training. Load the original model if "
        "that matters."
    ]


def _rules_of_transformers() -> frozenset[str]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # defined elsewhere in this version
        return frozenset()
    return frozenset(GGUF_PRE_TOKENIZER_SPLITS)

"""Read the configuration of a GGUF file; reject a setting that the ``transformers`` model would not compute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit.errors import BaseModelError
from lorakit.models.gguf_header import Header, read_float32

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SKIPPED = frozenset(
    {
        # Read by other functions of this module.
        *("rope.freq_base", "rope.freq_base_swa", "rope.global.freq_base", "rope.local.freq_base"),
        *("rope.scale_linear", "rope.scaling.type", "rope.scaling.factor"),
        *("rope.scaling.attn_factor", "rope.dimension_count", "attention.sliding_window"),
        # Sizes: with others the tensors would not load.
        *("vocab_size", "context_length", "feed_forward_length", "decoder_block_count"),
        *("attention.head_count_kv", "attention.key_length", "attention.value_length"),
        *("expert_feed_forward_length", "expert_shared_feed_forward_length"),
        # Of these two an architecture uses one.
        *("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"),
        # Details of a scaling that `_read_rope` rejects or that the file does not use.
        *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
        *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
        "rope.scaling.yarn_log_multiplier",
        # llama.cpp reads these for other architectures, or to compute embeddings.
        *("use_parallel_residual", "tensor_data_layout", "pooling_type"),
    }
)
"""Settings that `_read_others` skips."""
_ATTRIBUTES = {
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "norm_eps"),
    "expert_weights_norm": ("norm_topk_prob",),
}
"""Settings that transformers reads for some architectures only, and their names in its configurations."""
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Values of all published models with this scaling (Llama 3.1 to 3.3, EXAONE 3.5), which GGUF files do not store."""
_LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}


def read_config(gguf: Path, header: Header) -> PretrainedConfig:
    """Read the configuration, with the settings that transformers reads for few architectures or for none.

    Raises:
        BaseModelError: The file has a setting that transformers does not compute.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    prefix = f"{header.settings['general.architecture']}."
    settings = {
        name.removeprefix(prefix): value
        for name, value in header.settings.items()
        if name.startswith(prefix)
    }
    unread = [*_read_rope(config, settings), *_read_window(config, settings)]
    unread += [*_read_frequencies(gguf, header, config), *_read_others(config, settings)]
    if config.model_type in _LAYERS_OF_27B:
        # No setting of the file. As in llama.cpp, the size of the model decides.
        share = config.hidden_size // config.num_attention_heads
        is_27b = config.num_hidden_layers == _LAYERS_OF_27B[config.model_type]
        config.query_pre_attn_scalar = share if is_27b else config.head_dim
    if config.model_type == "t5" and config.is_gated_act:  # the only kind that transformers reads
        config.feed_forward_proj, config.dense_act_fn = "gated-gelu", "gelu_new"
    if unread:
        raise BaseModelError(
            f"'{gguf}' has the setting {' and '.join(unread)}, which transformers does not read from a GGUF file of "
            f"{config.model_type}, so the model would compute something else. Name the original model."
        )
    return type(config).from_dict(config.to_dict())


def _read_rope(config: PretrainedConfig, settings: dict[str, Any]) -> list[str]:
    """Set the base and the linear scaling of rotary embeddings; return the settings that cannot be set."""
    unread: list[str] = []
    by_layer = getattr(config, "rope_parameters", None) or {}
    if not by_layer:
        return unread
    rope = by_layer.get("full_attention", by_layer)  # Gemma 3 scales only its full attention
    # Files of Ollama call the two bases of Gemma 3 global and local.
    base = settings.get("rope.freq_base", settings.get("rope.global.freq_base"))
    local_base = settings.get("rope.freq_base_swa", settings.get("rope.local.freq_base"))
    if base is not None:
        rope["rope_theta"] = base
    if "sliding_attention" in by_layer and local_base is not None:
        by_layer["sliding_attention"]["rope_theta"] = local_base
    # As in llama.cpp: without a type the scaling is linear, and factors of 0 and 1 change nothing.
    kind = settings.get("rope.scaling.type", "linear")
    factor = settings.get("rope.scaling.factor", settings.get("rope.scale_linear")) or 1.0
    scaled = kind == "longrope" or (kind != "none" and factor != 1)
    if scaled and (kind, factor) != (rope["rope_type"], rope.get("factor")):
        if kind == "linear" and rope["rope_type"] == "default":
            rope |= {"rope_type": "linear", "factor": factor}
        else:
            unread.append(f"rope.scaling.type {kind}")
    if settings.get("rope.scaling.attn_factor", 1.0) != 1:
        unread.append(f"rope.scaling.attn_factor {settings['rope.scaling.attn_factor']:.4g}")
    rotated = _rotated(config, rope)
    if settings.get("rope.dimension_count", rotated) != rotated:
        unread.append(f"rope.dimension_count {settings['rope.dimension_count']}")
    return unread


def _rotated(config: PretrainedConfig, rope: dict[str, Any]) -> int:
    """Return how many numbers of a head rotate."""
    head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    return int(head_dim * rope.get("partial_rotary_factor", 1))


def _read_frequencies(gguf: Path, header: Header, config: PretrainedConfig) -> list[str]:
    """Set Llama 3's scaling of rotary frequencies; return the names of divisor tensors that do not match it.

    llama.cpp divides each frequency by a number in a tensor of the file. transformers computes these numbers.
    """
    from gguf import GGMLQuantizationType as Kind

    unread: list[str] = []
    for tensor in header.tensors:
        if tensor.name.startswith(("rope_freqs", "rope_factors")):
            divisors = read_float32(gguf, tensor) if tensor.kind == Kind.F32 else None
            if divisors is None or not ((divisors == 1).all() or _set_llama3(config, divisors)):
                unread.append(tensor.name)
    return unread


def _set_llama3(config: PretrainedConfig, divisors: np.ndarray) -> bool:
    """Set Llama 3's scaling if it has these divisors; return whether it has."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "default" or 2 * len(divisors) != _rotated(config, rope):
        return False
    if not (np.isfinite(divisors) & (divisors > 0)).all():
        return False
    factor = float(divisors.max())
    # Wavelengths in tokens: the short ones stay, the long ones are divided, and those between are interpolated.
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(len(divisors)) / len(divisors))
    low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
    length = _LLAMA3_ROPE["original_max_position_embeddings"]
    share = np.clip((length / waves - low) / (high - low), 0, 1)
    if not np.allclose(divisors, 1 / ((1 - share) / factor + share), rtol=1e-4):
        return False
    rope |= {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}
    return True


def _read_window(config: PretrainedConfig, settings: dict[str, Any]) -> list[str]:
    """Set the sliding window; return it if it cannot be set."""
    window = settings.get("attention.sliding_window", 0)  # 0 is none
    if not 0 < window < settings["context_length"]:
        return []
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"]
    if (
        hasattr(config, "sliding_window")
        and getattr(config, "use_sliding_window", True)
        and "sliding_attention" in layer_types
    ):
        config.sliding_window = window
        return []
    return [f"attention.sliding_window {window:,}"]


def _read_others(config: PretrainedConfig, settings: dict[str, Any]) -> list[str]:
    """Set what `_ATTRIBUTES` names; return the settings that nobody reads and that may change the computation."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    mapping = GGUF_CONFIG_MAPPING.get(config.model_type.removesuffix("_text"))
    if mapping is None:  # newer architectures, whose settings transformers reads in full
        return []
    read = {name for name, attribute in mapping.items() if attribute is not None}
    for name in _ATTRIBUTES.keys() & settings.keys() - read:
        for attribute in _ATTRIBUTES[name]:
            if hasattr(config, attribute):
                setattr(config, attribute, settings[name])
                read.add(name)
    unread = []
    for name in sorted(settings.keys() - read - _SKIPPED):
        value = settings[name]
        if isinstance(value, str | None):
            unread.append(name)
        elif value != (name == "attention.causal"):  # any other setting is off if it is 0 or false
            unread.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return unread

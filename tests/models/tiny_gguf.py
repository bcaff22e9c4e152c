"""Write a tiny Llama, StarCoder2 or T5 as a GGUF file, like llama.cpp's converter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Starcoder2Config,
    Starcoder2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "h e", "l l"]
TOKENS = [*SPECIAL_TOKENS, *bytes_to_unicode().values(), *(m.replace(" ", "") for m in MERGES)]
CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
HEADS, KEY_VALUE_HEADS = 4, 2

F32, F16, BF16, Q4_1 = (
    gguf.GGMLQuantizationType.F32,
    gguf.GGMLQuantizationType.F16,
    gguf.GGMLQuantizationType.BF16,
    gguf.GGMLQuantizationType.Q4_1,
)


SIZES = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **options})).eval()


def tiny_starcoder2(**options: Any) -> Starcoder2ForCausalLM:
    torch.manual_seed(0)
    return Starcoder2ForCausalLM(Starcoder2Config(**SIZES, **options)).eval()


def tiny_t5() -> T5ForConditionalGeneration:
    """Return a T5 1.1: a gated feed-forward layer, and an output head of its own."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(TOKENS),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=2,
    )
    model = T5ForConditionalGeneration(config).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(len(TOKENS), 32))
    return model


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    kind: gguf.GGMLQuantizationType = F32,
    pre: str | None = "smollm",
    adds_bos: bool | None = None,
    leave_out: str | None = None,
    blocks: int | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    settings: Mapping[str, str | float | list[bool] | None] | None = None,
) -> Path:
    """Write ``model`` with its matrices as ``kind`` and its norms in float32.

    ``blocks`` is a false number of layers, and ``extra`` holds tensors that no Llama has. ``settings`` are those of
    the architecture, for example ``rope.freq_base``; None leaves one out.
    """
    config = model.config
    llama = config.model_type == "llama"
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_name("Tiny")
    writer.add_block_count(config.num_hidden_layers if blocks is None else blocks)
    norm = "layer_norm_rms_epsilon" if llama else "layer_norm_epsilon"
    key_value_heads = getattr(config, "num_key_value_heads", HEADS)
    defaults = {
        "context_length": SIZES["max_position_embeddings"],
        "embedding_length": config.hidden_size,
        "feed_forward_length": SIZES["intermediate_size"],
        "attention.head_count": HEADS,
        "attention.head_count_kv": key_value_heads,
        f"attention.{norm}": 1e-6 if llama else 1e-5,
        "rope.dimension_count": 8,
        "rope.freq_base": 10000.0,
        "vocab_size": config.vocab_size,
    }
    add = {
        str: writer.add_string,
        int: writer.add_uint32,
        float: writer.add_float32,
        bool: writer.add_bool,
        list: writer.add_array,
    }
    for name, value in {**defaults, **(settings or {})}.items():
        if value is not None:
            add[type(value)](f"{config.model_type}.{name}", value)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    if adds_bos is not None:
        writer.add_add_bos_token(adds_bos)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[config.model_type], config.num_hidden_layers)
    for name, tensor in model.named_parameters():  # a tied weight once
        if name == leave_out:
            continue
        data = tensor.detach().float().numpy()
        if llama and ("q_proj" in name or "k_proj" in name):
            data = _permuted(data, HEADS if "q_proj" in name else key_value_heads)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if data.ndim == 1 or kind == F32:
            writer.add_tensor(target, np.ascontiguousarray(data))
        else:
            writer.add_tensor(target, gguf.quants.quantize(data, kind), raw_dtype=kind)
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(data: torch.Tensor, kind: gguf.GGMLQuantizationType) -> torch.Tensor:
    """Return a matrix after a round trip through ``kind``, in float32."""
    quantised = gguf.quants.quantize(data.float().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(quantised, kind))


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the halves of each head, the order of llama.cpp's rotary embedding."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)

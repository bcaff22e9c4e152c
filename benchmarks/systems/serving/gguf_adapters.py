"""Convert PEFT adapters of a Llama to llama.cpp's GGUF adapters.

The format: ``general.type`` is ``adapter``, ``adapter.type`` is ``lora``, ``adapter.lora.alpha`` is alpha, and the
tensors are ``blk.N.attn_q.weight.lora_a`` (rank, in) and ``.lora_b`` (out, rank). llama.cpp rotates pairs of
neighbouring features, transformers pairs from the two halves of a head. GGUF files of Llamas therefore store the rows
of q and k in another order, and the rows of B must follow.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

_KEY = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.lora_([AB])\.weight"
)


def convert(folder: Path, target: Path, config: Any) -> Path:
    """Write an adapter as GGUF, unless the file exists.

    Args:
        folder: A PEFT folder with adapters on q, k and v.
        target: The file to write.
        config: Configuration of the base.
    """
    if target.exists():
        return target
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(temporary, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings["lora_alpha"]))
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise ValueError(f"{folder}: {key} is not on q, k or v of the attention.")
        layer, projection, side = found.groups()
        if side == "B" and projection != "v":
            heads = config.num_attention_heads if projection == "q" else config.num_key_value_heads
            tensor = permuted(tensor, heads)
        writer.add_tensor(
            f"blk.{layer}.attn_{projection}.weight.lora_{side.lower()}",
            np.ascontiguousarray(tensor, np.float32),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(target)
    return target


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of a projection in llama.cpp's order: the halves of each head alternate."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)

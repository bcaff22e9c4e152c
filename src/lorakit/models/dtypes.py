"""The dtypes of a model's weights and of its computation."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from lorakit.errors import AdapterFileError, ConfigurationError, nearest
from lorakit.models.devices import device_exists

Quantisation = Literal["nf4", "int8"]
"""nf4: 4 bits per number, one scale per 64 numbers (QLoRA). int8: 8 bits, one scale per output row."""

QUANTISATIONS: tuple[str, ...] = get_args(Quantisation)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes that an adapter's tensors may have."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of_name(name: str) -> torch.dtype:
    """Return the dtype of a name such as ``float32``.

    Raises:
        ConfigurationError: The name is not known.
    """
    if name not in _DTYPES:
        names = ("auto", *_DTYPES, *QUANTISATIONS)
        raise ConfigurationError(
            f"dtype '{name}' is not one of {', '.join(names)}.{nearest(str(name), names)}"
        )
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, tensor: Tensor) -> None:
    """Reject anything but a dense tensor of finite floating-point numbers.

    Raises:
        AdapterFileError: The tensor is sparse, quantised, empty, or holds NaN or infinity.
    """
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise AdapterFileError(f"{name} is a {type(tensor).__name__}, not a dense tensor.")
    if tensor.dtype not in FLOATS:
        raise AdapterFileError(
            f"{name} holds {dtype_name(tensor.dtype)} numbers; "
            f"{', '.join(map(dtype_name, FLOATS))} can be read."
        )
    if tensor.numel() == 0:
        raise AdapterFileError(
            f"{name} is empty: its shape is {tuple(tensor.shape)}. If ZeRO-3 or FSDP had the weights in shards, save "
            "the adapter again with gathered weights. Or in a checkpoint of DeepSpeed, run zero_to_fp32.py with "
            "--exclude_frozen_parameters, and put its file beside adapter_config.json as adapter_model.bin."
        )
    # A sum is finite only if all numbers are, and takes a third of the time; it may also overflow.
    if not tensor.is_meta and not tensor.sum().isfinite() and not tensor.isfinite().all():
        wrong = int((~tensor.isfinite()).sum())
        overflow = " Or float16 overflows; load the base in bfloat16 or float32."
        raise AdapterFileError(
            f"{name} holds {wrong} values that are NaN or infinite. The training run diverged, or the "
            "file is damaged; use an earlier checkpoint."
            + (overflow if tensor.dtype == torch.float16 else "")
        )


def check_merged(name: str, merged: Tensor, base: Tensor) -> None:
    """Reject a merged weight with NaN or infinity where the base's has none; some mask tokens by minus infinity.

    Raises:
        AdapterFileError: It holds such values.
    """
    if not merged.sum().isfinite():
        check_tensor(f"the merged '{name}'", merged.masked_fill(~base.isfinite(), 0))


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has bfloat16 arithmetic; others emulate it, far more slowly than float32.

    That is a CUDA GPU of compute capability 8.0 or later, and a CPU with AVX512-BF16 or AMX. A GPU that this machine
    lacks (a planned run) counts as one.
    """
    if device.type != "cuda":
        return device.type == "cpu" and _cpu_multiplies_bfloat16()
    return not device_exists(device) or torch.cuda.get_device_capability(device)[0] >= 8


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities:
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    try:  # torch before 2.10 does not report them
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags

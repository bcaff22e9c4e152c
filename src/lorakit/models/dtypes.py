"""The dtypes of a model's weights and of its computation."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal, get_args

import torch

from lorakit.errors import ConfigurationError, nearest

Quantisation = Literal["nf4", "int8"]
"""nf4: 4 bits per number, one scale per 64 numbers (QLoRA). int8: 8 bits, one scale per output row."""

QUANTISATIONS: tuple[str, ...] = get_args(Quantisation)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes that an adapter's tensors may have."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compute_dtype(
    dtype: str | torch.dtype = "auto", device: torch.device | None = None
) -> torch.dtype:
    """Return the dtype to compute in; a quantised base computes in that of ``auto``.

    ``auto`` is bfloat16 where the processor multiplies it natively (a CUDA GPU of compute
    capability 8.0 or later; a CPU with AVX512-BF16 or AMX), else float32: emulated bfloat16 is
    slower than float32.

    Args:
        dtype: A name, or a dtype, which is returned unchanged.
        device: The device to compute on; None is the GPU if this machine has one, else the CPU. A
            GPU that this machine lacks (a planned run) counts as one that multiplies bfloat16.

    Raises:
        ConfigurationError: The name is not known.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto" or dtype in QUANTISATIONS:
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    if dtype not in _DTYPES:
        names = ("auto", *_DTYPES, *QUANTISATIONS)
        raise ConfigurationError(
            f"dtype '{dtype}' is not one of {', '.join(names)}.{nearest(str(dtype), names)}"
        )
    return _DTYPES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def resolved_dtype(dtype: str, device: torch.device | None = None) -> str:
    """Return the name that a setting resolves to on a device: ``auto`` becomes a dtype, others stay.

    Raises:
        ConfigurationError: The name is not known.
    """
    return dtype if dtype in QUANTISATIONS else dtype_name(compute_dtype(dtype, device))


def _multiplies_bfloat16(device: torch.device | None) -> bool:
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        return _cpu_multiplies_bfloat16()
    exists = (device.index or 0) < torch.cuda.device_count()
    return not exists or torch.cuda.get_device_capability(device)[0] >= 8


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

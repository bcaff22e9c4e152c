"""The dtypes of a model's weights and of its computation."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal, get_args

import torch

from lorakit.errors import ConfigurationError, nearest
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

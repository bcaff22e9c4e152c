"""Checks of the tensors of adapters, in files and before a merge."""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.errors import AdapterFileError
from lorakit.models.dtypes import FLOATS, dtype_name


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


def equals_base(loaded: Tensor, base: Tensor) -> bool:
    """Return whether the numbers are equal once those of the wider dtype are rounded to the other."""
    return not base.is_meta and (loaded.to(base).equal(base) or loaded.equal(base.to(loaded)))

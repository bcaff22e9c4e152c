"""`auto` resolves to the dtype that the processor multiplies natively."""

from __future__ import annotations

import pytest
import torch

from lorakit.models import dtypes
from lorakit.models.dtypes import compute_dtype, resolved_dtype


@pytest.mark.parametrize(
    ("gpu", "cpu", "device", "expected"),
    [
        ((9, 0), {}, None, torch.bfloat16),
        ((8, 0), {}, "cuda:0", torch.bfloat16),
        ((7, 5), {"avx512_bf16": True}, None, torch.float32),
        ((7, 5), {"avx512_bf16": True}, "cpu", torch.bfloat16),
        ((9, 0), {"avx512_bf16": False}, "cpu", torch.float32),
        ((7, 5), {}, "cuda:1", torch.bfloat16),  # a planned device that does not exist
        (None, {}, "cuda", torch.bfloat16),
        (None, {"avx512_bf16": True}, None, torch.bfloat16),
        (None, {"amx_bf16": True}, "cpu", torch.bfloat16),
        (None, {"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, None, torch.float32),
    ],
)
def test_bfloat16_where_it_is_native(
    monkeypatch: pytest.MonkeyPatch,
    gpu: tuple[int, int] | None,
    cpu: dict[str, bool],
    device: str | None,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1 if gpu else 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    uncached = dtypes._cpu_multiplies_bfloat16.__wrapped__
    monkeypatch.setattr(dtypes, "_cpu_multiplies_bfloat16", uncached)
    where = None if device is None else torch.device(device)
    for name in ("auto", "nf4"):
        assert compute_dtype(name, where) == expected
    assert resolved_dtype("auto", where) == str(expected).removeprefix("torch.")
    assert compute_dtype("float32", where) == torch.float32

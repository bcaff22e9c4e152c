"""The dtype that `auto` stands for is the one that the processor multiplies natively."""

from __future__ import annotations

import pytest
import torch

from lorakit.models import dtypes
from lorakit.models.dtypes import compute_dtype


@pytest.mark.parametrize(
    ("gpu", "cpu", "expected"),
    [
        ((9, 0), {}, torch.bfloat16),
        ((8, 0), {}, torch.bfloat16),
        ((7, 5), {"avx512_bf16": True}, torch.float32),
        (None, {"avx512_bf16": True}, torch.bfloat16),
        (None, {"amx_bf16": True}, torch.bfloat16),
        (None, {"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, torch.float32),
    ],
)
def test_bfloat16_where_it_is_native(
    monkeypatch: pytest.MonkeyPatch,
    gpu: tuple[int, int] | None,
    cpu: dict[str, bool],
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    monkeypatch.setattr(dtypes, "_multiplies_bfloat16", dtypes._multiplies_bfloat16.__wrapped__)
    assert compute_dtype("auto") == expected
    assert compute_dtype("float32") == torch.float32

"""Products in float32 by oneDNN: precise, only where they are faster, and without a trace outside the block."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from lorakit.models import float32_products, processor
from lorakit.models.float32_products import faster_float32, onednn_is_faster

pytestmark = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="torch 2.8 lacks the setting"
)


def setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Any processor takes the way of one that gains."""
    monkeypatch.setattr(float32_products, "onednn_is_faster", lambda: True)
    yield
    assert setting() == "none"


def test_blocks_share_the_setting(faster: None) -> None:
    with faster_float32():
        with faster_float32():
            assert setting() == "bf16"
        assert setting() == "bf16"
    assert setting() == "none"
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_block_of_another_thread_may_end_last(faster: None) -> None:
    opened, ended = threading.Event(), threading.Event()

    def other() -> None:
        with faster_float32():
            opened.set()
            ended.wait(10)

    thread = threading.Thread(target=other)
    with faster_float32():
        thread.start()
        assert opened.wait(10)
    assert setting() == "bf16"
    ended.set()
    thread.join()
    assert setting() == "none"


def test_an_error_ends_the_block(faster: None) -> None:
    with pytest.raises(ZeroDivisionError), faster_float32():
        _ = 1 / 0
    assert setting() == "none"


@pytest.mark.parametrize("choice", ["ieee", "tf32"])
def test_a_choice_of_the_user_stays(faster: None, choice: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = choice  # type: ignore[attr-defined]
    try:
        with faster_float32():
            assert setting() == choice
        assert setting() == choice
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"  # type: ignore[attr-defined]


def test_a_choice_inside_a_block_stays(faster: None) -> None:
    with faster_float32():
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]
        with faster_float32():
            assert setting() == "ieee"
    assert setting() == "ieee"
    torch.backends.mkldnn.matmul.fp32_precision = "none"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ("AVX2", "AMD Ryzen 7 5800X"),
        ("AVX512", "Intel(R) Xeon(R) Platinum 8488C"),
        ("DEFAULT", "arm"),
    ],
)
def test_other_processors_keep_mkl(
    monkeypatch: pytest.MonkeyPatch, capability: str, name: str
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(float32_products, "processor_name", lambda: name)
    assert not onednn_is_faster.__wrapped__()


def test_a_library_that_rounds_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with matrix units. The library's cache is limited before this first product."""
    for name in processor._KERNEL_CACHES:
        monkeypatch.delenv(name, raising=False)

    def rounded(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        assert os.environ.keys() >= set(processor._KERNEL_CACHES)
        return F.linear(x.bfloat16().float(), W.bfloat16().float())

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(float32_products, "processor_name", lambda: "AMD EPYC")
    monkeypatch.setattr(float32_products, "_product", rounded)
    assert not onednn_is_faster.__wrapped__()
    assert setting() == "none"


@pytest.mark.skipif(not onednn_is_faster(), reason="this processor does not gain")
@pytest.mark.parametrize("shape", [(1, 64, 64), (5, 576, 1536), (31, 7, 3), (160, 576, 8192)])
def test_products_are_as_precise_as_float32(shape: tuple[int, int, int]) -> None:
    """Forward and both gradients, against float64. The sum over n terms has an error of about sqrt(n) roundings."""
    rows, width, out = shape
    generator = torch.Generator().manual_seed(0)
    x, W, g = (
        torch.randn(s, generator=generator) for s in ((rows, width), (out, width), (rows, out))
    )
    with faster_float32():
        products = F.linear(x, W), g @ W, g.T @ x
    x, W, g = x.double(), W.double(), g.double()
    for ours, exact in zip(products, (F.linear(x, W), g @ W, g.T @ x), strict=True):
        assert (ours - exact).norm() <= 2e-6 * exact.norm()

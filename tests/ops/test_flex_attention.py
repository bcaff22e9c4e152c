"""Compare flex_masked_attention with plain float64 arithmetic; the compiled kernel only on a GPU."""

import gc

import pytest
import torch
from references import masked_attention_reference
from test_attention import MASKS, inputs, tree

from lorakit.ops import flex_attention
from lorakit.ops.attention import masked_attention
from lorakit.ops.flex_attention import flex_masked_attention

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="FlexAttention has gradients only on a GPU"
)


def rows_of(mask):
    return (2, 9) if mask is None else (max(2, len(mask)), mask.shape[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_output_is_that_of_plain_arithmetic(name):
    mask = MASKS[name]
    q, k, v = (x.detach() for x in inputs(*rows_of(mask)))
    out = flex_masked_attention(q, k, v, mask, scale=0.3)
    expected = masked_attention_reference(q, k, v, mask, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_gradients_are_those_of_plain_arithmetic(name, monkeypatch):
    """Use the unfused computation, which also has gradients on a CPU."""
    module = torch.nn.attention.flex_attention
    monkeypatch.setattr(module, "_validate_device", lambda *tensors: None)
    mask = MASKS[name]
    ours, theirs = (inputs(*rows_of(mask)) for _ in range(2))
    out = flex_masked_attention(*ours, mask, scale=0.3)
    expected = masked_attention_reference(*theirs, mask, scale=0.3)
    weight = torch.randn(out.shape, dtype=torch.float64)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, mask in MASKS.items() if mask is not None])
def test_blocks_are_those_in_which_something_is_seen(name):
    """Check the block mask directly: only the compiled kernel skips blocks."""
    mask = MASKS[name]
    rows, length = rows_of(mask)
    q, k, _ = inputs(rows, length)
    q = q[:, :, : mask.shape[2]]
    seen = mask.expand(rows, 1, -1, -1).float()
    size = [-(-n // 128) * 128 for n in seen.shape[2:]]
    padded = torch.zeros(rows, 1, *size)
    padded[:, :, : seen.shape[2], : seen.shape[3]] = seen
    pooled = torch.nn.functional.max_pool2d(padded, 128)
    assert torch.equal(flex_attention._block_mask(mask, q, k).to_dense(), pooled.int())


def test_inference_tensors_and_a_batch_without_rows():
    with torch.inference_mode():
        mask = tree(5, 3, 2)[None, None].clone()
        q, k, v = (x.detach().clone() for x in inputs(1, 11))
        expected = masked_attention_reference(q, k, v, mask, scale=0.3)
        for attend in (flex_masked_attention, masked_attention):
            torch.testing.assert_close(
                attend(q, k, v, mask, scale=0.3), expected, rtol=1e-12, atol=1e-12
            )
            assert attend(q[:0], k[:0], v[:0], mask[:0], scale=0.3).shape == (0, 11, 4, 8)


def test_a_single_query_goes_to_the_fused_kernel(monkeypatch):
    monkeypatch.setattr(flex_attention, "_block_mask", None)  # a call of it would fail
    q, k, v = (x.detach() for x in inputs(2, 9))
    one = flex_masked_attention(q[:, :, -1:], k, v, MASKS["keys alone"], scale=0.3)
    expected = masked_attention_reference(q[:, :, -1:], k, v, MASKS["keys alone"], scale=0.3)
    torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-12)


def test_blocks_are_found_once_for_a_mask_and_anew_where_it_was_written_into():
    mask = tree(5, 3, 2)[None, None]
    q, k, v = (x.detach() for x in inputs(1, 11))
    first = flex_attention._block_mask(mask, q, k)
    assert flex_attention._block_mask(mask, q, k) is first
    mask[..., 0] = False
    mask[..., 0, 0] = True
    assert flex_attention._block_mask(mask, q, k) is not first
    expected = masked_attention_reference(q, k, v, mask, scale=0.3)
    out = flex_masked_attention(q, k, v, mask, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_what_is_known_of_a_mask_is_forgotten_with_it():
    mask = tree(5, 3, 2)[None, None]
    q, k, v = (x.detach() for x in inputs(1, 11))
    before = len(flex_attention._block_masks)
    flex_masked_attention(q, k, v, mask, scale=0.3)
    assert len(flex_attention._block_masks) == before + 1
    del mask
    gc.collect()
    assert len(flex_attention._block_masks) == before


@needs_gpu
@pytest.mark.parametrize("name", MASKS)
def test_the_compiled_kernel(name):
    mask = MASKS[name]
    shape = dict(heads=4, key_heads=2, width=64, dtype=torch.float32)
    ours = [x.detach().cuda().requires_grad_() for x in inputs(*rows_of(mask), **shape)]
    theirs = [x.detach().double().requires_grad_() for x in inputs(*rows_of(mask), **shape)]
    out = flex_masked_attention(*ours, None if mask is None else mask.cuda(), scale=0.1)
    expected = masked_attention_reference(*theirs, mask, scale=0.1)
    weight = torch.randn(expected.shape, dtype=torch.float64)
    (out * weight.cuda().float()).sum().backward()
    (expected * weight).sum().backward()
    # A GPU may round the factors of float32 products to ten bits (TF32).
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-2, atol=1e-2)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad.cpu() - b.grad).norm() <= 1e-2 * b.grad.norm()

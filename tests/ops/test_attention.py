"""Compare masked_attention with plain float64 arithmetic, for every kind of mask that batches use."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import masked_attention_reference

from lorakit.ops import attention
from lorakit.ops.attention import masked_attention


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()


def tree(prompt, tail, count):
    """Return the mask of a prompt with `count` completions."""
    length = prompt + tail * count
    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[:prompt, :prompt] = causal(prompt)
    for start in range(prompt, length, tail):
        mask[start : start + tail, :prompt] = True
        mask[start : start + tail, start : start + tail] = causal(tail)
    return mask


def inputs(rows, length, heads=4, key_heads=2, width=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        x = torch.randn(rows, length, count, width, generator=generator, dtype=dtype)
        return x.transpose(1, 2).requires_grad_()  # a view, as in models

    return draw(heads), draw(key_heads), draw(key_heads)


MASKS = {
    "none": None,
    "short": causal(7).expand(3, 1, 7, 7),
    "long": causal(150).expand(2, 1, 150, 150),
    "padding": torch.arange(40).expand(3, 1, 40, 40) < torch.tensor([40, 11, 25]).view(3, 1, 1, 1),
    "one for all rows": causal(33)[None, None],
    "keys alone": (torch.arange(9) < 6).expand(2, 1, 1, 9),
    "trees": torch.stack([tree(20, 10, 15), tree(50, 30, 4)])[:, None],
    "side by side": torch.block_diag(*[causal(40).float()] * 6).bool()[None, None],
}


BIASES = {
    "bias of each head": torch.linspace(-9, 9, 3 * 4 * 12 * 12).sin().view(3, 4, 12, 12),
    "bias of all heads": torch.linspace(-9, 9, 2 * 12).sin().view(2, 1, 1, 12),
}


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("name", [*MASKS, *BIASES])
def test_output_and_gradients_are_those_of_plain_arithmetic(name, key_heads):
    mask = {**MASKS, **BIASES}[name]
    rows, length = (2, 9) if mask is None else (max(2, len(mask)), mask.shape[-1])
    if mask is not None and len(mask) == 1 and name != "one for all rows":
        rows = 1
    ours, theirs = (inputs(rows, length, key_heads=key_heads) for _ in range(2))
    out = masked_attention(*ours, mask, scale=0.3)
    expected = masked_attention_reference(*theirs, mask, scale=0.3)
    assert out.shape == (rows, length, 4, 8)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(out.shape, dtype=torch.float64)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kept", [0, 1000])
@pytest.mark.parametrize("name", ["none", "long", "padding", "trees", "side by side"])
def test_groups_of_blocks_change_nothing(name, kept, monkeypatch):
    """Compare the result and the gradients of one group and of many."""
    mask = MASKS[name]
    rows, length = (5, 9) if mask is None else (len(mask), mask.shape[-1])
    monkeypatch.setattr(attention, "MAX_SAVED_KEYS", kept)
    found = []
    for pairs in (2**30, 2000):
        monkeypatch.setattr(attention, "GROUP_PAIRS", pairs)
        attention._blocks_by_mask.clear()
        x = inputs(rows, length)
        groups = attention._blocks(mask, *x[:2]).groups
        assert (len(groups) > 1) == (pairs == 2000 and name != "none")
        out = masked_attention(*x, mask, scale=0.3)
        found.append((out, *torch.autograd.grad(out.square().sum(), x)))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


def test_gradients_through_groups_of_blocks_with_dropout(monkeypatch):
    monkeypatch.setattr(attention, "GROUP_PAIRS", 600)
    monkeypatch.setattr(attention, "MAX_SAVED_KEYS", 0)
    monkeypatch.setattr(attention, "BLOCK_SIZES", (4,))
    mask = causal(12).expand(3, 1, 12, 12).clone()
    x = inputs(3, 12)
    assert len(attention._blocks(mask, *x[:2]).groups) > 2

    def drawn(*x):
        torch.manual_seed(1)
        return masked_attention(*x, mask, scale=0.3, dropout=0.25)

    assert torch.autograd.gradcheck(drawn, x, fast_mode=True)


def test_queries_that_see_nothing_are_finite():
    """Mask a whole block of queries, like the left padding of a short text in a long batch."""
    mask = causal(150).expand(2, 1, 150, 150) & (torch.arange(150) >= 100)
    x = inputs(2, 150)
    out = masked_attention(*x, mask, scale=0.3)
    expected = masked_attention_reference(*x, mask, scale=0.3)
    torch.testing.assert_close(out[:, 100:], expected[:, 100:], rtol=1e-11, atol=1e-11)
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), x))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 90), st.integers(1, 3), st.floats(0.02, 0.9))
def test_any_mask(seed, length, rows, density):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, 1, length, length, generator=generator) < density
    mask |= torch.eye(length, dtype=torch.bool)  # every query sees at least one key
    ours, theirs = inputs(rows, length), inputs(rows, length)
    out = masked_attention(*ours, mask, scale=1.0)
    expected = masked_attention_reference(*theirs, mask, scale=1.0)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    grads = torch.autograd.grad(out.square().sum(), ours)
    expected_grads = torch.autograd.grad(expected.square().sum(), theirs)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-10)


def test_trees_are_cut_into_blocks_that_leave_most_pairs_out():
    mask = MASKS["side by side"]
    masked_attention(*inputs(1, 240), mask, scale=1.0)
    (blocks,) = attention.mask_cache(mask, attention._blocks_by_mask).values()
    assert blocks.count > 1
    assert blocks.length < 120


@pytest.mark.parametrize("limit", ["MAX_SAVED_KEYS", "MAX_KEYS"])
def test_long_rows_take_less_memory_to_the_same_result(limit, monkeypatch):
    mask = causal(40)[None, None].clone()
    ours, theirs = inputs(1, 40), inputs(1, 40)
    expected = masked_attention(*theirs, mask, scale=0.5)
    monkeypatch.setattr(attention, limit, 8)
    out = masked_attention(*ours, mask, scale=0.5)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(out.square().sum(), ours)
    expected_grads = torch.autograd.grad(expected.square().sum(), theirs)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-11, atol=1e-12)


def test_gradcheck():
    mask = tree(3, 2, 2)[None, None]
    q, k, v = inputs(1, 7, heads=2, key_heads=1, width=3)
    assert torch.autograd.gradcheck(
        lambda *x: masked_attention(*x, mask, scale=0.7), (q, k, v), fast_mode=False
    )


def test_bfloat16_rounds_each_step_once():
    mask = MASKS["trees"]
    wide = inputs(2, 170)
    out = masked_attention(*(x.detach().bfloat16() for x in wide), mask, scale=0.3)
    expected = masked_attention_reference(*wide, mask, scale=0.3)
    # Scores, weights, values and the result are each rounded to 8 bits, with errors of both signs.
    assert (out - expected).norm() <= 2**-7 * expected.norm()


@pytest.mark.parametrize("drawn_by", ["lorakit", "the fused kernel"])
def test_dropout_leaves_the_expectation_and_its_gradient_is_that_of_the_drawn_weights(
    drawn_by, monkeypatch
):
    if drawn_by == "the fused kernel":
        monkeypatch.setattr(attention, "MAX_KEYS", 8)
    mask = causal(12)[None, None].clone()
    q, k, v = inputs(1, 12)
    plain = masked_attention(q, k, v, mask, scale=0.3)
    many = (x.detach().expand(400, -1, -1, -1) for x in (q, k, v))
    draws = masked_attention(*many, mask, scale=0.3, dropout=0.25)
    # One draw deviates by about the size of the result; the mean of 400 draws by 1/20 of that.
    assert (draws[0] - plain).norm() >= 0.2 * plain.norm()
    assert (draws.mean(0) - plain).norm() <= 0.1 * plain.norm()

    def drawn(*x):
        torch.manual_seed(1)
        return masked_attention(*x, mask, scale=0.3, dropout=0.25)

    assert torch.autograd.gradcheck(drawn, (q, k, v), fast_mode=True)


def test_one_mask_serves_batches_of_any_size():
    mask = causal(40)[None, None].clone()
    for rows in (1, 3):
        ours = inputs(rows, 40)
        out = masked_attention(*ours, mask, scale=0.5)
        torch.testing.assert_close(out, masked_attention_reference(*ours, mask, scale=0.5))


def test_a_query_that_sees_nothing_is_finite():
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.bool)
    assert masked_attention(*inputs(1, 5), mask, scale=1.0).isfinite().all()


def test_autocast_decides_the_dtype_of_the_products():
    q, k, v = (x.detach().float().requires_grad_() for x in inputs(1, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = masked_attention(q, k, v, causal(12)[None, None], scale=0.3)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_a_mask_that_is_written_into_is_read_anew():
    mask = causal(40)[None, None].clone()
    ours = inputs(1, 40)
    masked_attention(*ours, mask, scale=0.5)
    mask[..., :20, 5] = True
    out = masked_attention(*ours, mask, scale=0.5)
    torch.testing.assert_close(out, masked_attention_reference(*ours, mask, scale=0.5))


def test_batches_of_many_lengths_share_few_shapes(monkeypatch):
    """A CPU library caches a kernel per shape: 60 batches of trees have 6 shapes of products instead of 74."""
    monkeypatch.setattr(attention, "GROUP_PAIRS", 2**16)
    shapes = set()
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(8, 60, (8,), generator=generator).tolist()
        mask = torch.block_diag(*(causal(n) for n in lengths)).bool()
        T = 384
        mask = torch.nn.functional.pad(mask, (0, T - len(mask), 0, T - len(mask)))
        mask |= torch.eye(T, dtype=torch.bool)
        blocks = attention._cheapest_blocks(mask[None], 4, 2)
        assert blocks.size is not None
        shapes |= {(g.blocks.stop - g.blocks.start, blocks.size, g.length) for g in blocks.groups}
        assert all(g.length % 32 == 0 for g in blocks.groups)
    assert len(shapes) <= 12

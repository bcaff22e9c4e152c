"""Masks that depend on the keys of tokens: their statistics, and that batches do not change them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.ops.attention import masked_attention
from lorakit.ops.dropout import Keys, active, dropout
from lorakit.ops.keyed_dropout import keyed
from lorakit.ops.streams import above, mixed


def keys_of(tokens: Tensor, **options) -> Keys:
    """Return keys of a batch with one length, for the keys (B, T) of its tokens."""
    return Keys(
        len(tokens), lambda length: tokens if length == tokens.shape[1] else None, **options
    )


def masks(function, tokens: Tensor, seed: int = 0, **options) -> Tensor:
    torch.manual_seed(seed)
    with keyed(keys_of(tokens, **options)):
        return function()


def tokens_of(rows: int, length: int) -> Tensor:
    return mixed(torch.arange(rows * length)).view(rows, length)


def test_splitmix64():
    """The first numbers of the generator's reference code with the state 1234567."""
    states = 1234567 + torch.arange(1, 4) * (0x9E3779B97F4A7C15 - 2**64)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423 - 2**64]
    assert mixed(states).tolist() == expected


@pytest.mark.parametrize("p", [1 / 512, 0.1, 0.5, 0.9, 0.999])
def test_share_of_every_token_feature_and_call(p):
    """Within 5 standard deviations over calls, also where eight bits cannot express the probability."""
    calls, tokens = 400, tokens_of(4, 16)
    torch.manual_seed(0)
    with keyed(keys_of(tokens)):
        dropped = sum((dropout(torch.ones(4, 16, 24), p) == 0).double() for _ in range(calls))
    dropped /= calls
    for share, draws in ((dropped, calls), (dropped.mean(2), 24 * calls)):
        deviation = (p * (1 - p) / draws) ** 0.5
        assert (share - p).abs().max() < 5 * deviation + 4 / draws  # few of many are dropped


def test_tokens_features_heads_and_calls_are_independent():
    tokens = tokens_of(8, 64)
    torch.manual_seed(0)
    with keyed(keys_of(tokens)):
        hidden = [dropout(torch.ones(8, 64, 256), 0.5) - 1 for _ in range(2)]
        weights = F.dropout(torch.ones(8, 4, 64, 64), 0.5) - 1
    first, second = hidden
    pairs = {
        "calls": first * second,
        "rows": first[1:] * first[:-1],
        "tokens": first[:, 1:] * first[:, :-1],
        **{f"features {lag}": first[..., lag:] * first[..., :-lag] for lag in (1, 2, 4, 7, 8, 64)},
        "rectangles": (first[1:, :, 1:] * first[:-1, :, 1:])
        * (first[1:, :, :-1] * first[:-1, :, :-1]),
        "heads": weights[:, 1:] * weights[:, :-1],
        "queries": weights[:, :, 1:] * weights[:, :, :-1],
        "keys": weights[..., 1:] * weights[..., :-1],
        "transposed": (weights * weights.mT).triu(1),
        "hidden and weights": first[..., :64] * weights[:, 0],
    }
    for name, products in pairs.items():
        assert products.mean().abs() < 5 / products.numel() ** 0.5, name
    # Nor do the numbers of kept elements of a token vary more or less than by chance.
    kept = (first > 0).double().sum(-1)
    assert kept.var().item() == pytest.approx(64, rel=0.25)


def test_masks_follow_their_tokens():
    """Other rows, padding, a flattened batch, a part of its tokens: the mask of a token stays."""
    tokens = tokens_of(3, 10)
    expected = masks(lambda: dropout(torch.ones(3, 10, 13), 0.5), tokens)
    assert expected.unique().tolist() == [0, 2]
    padded = F.pad(tokens[[2, 0]], (0, 6))
    found = masks(lambda: dropout(torch.ones(2, 16, 13), 0.5), padded)
    assert torch.equal(found[:, :10], expected[[2, 0]])
    flat = masks(lambda: dropout(torch.ones(30, 13), 0.5), tokens, flat_lengths=(10,))
    assert torch.equal(flat.view_as(expected), expected)
    at = torch.tensor([7, 3, 22, 29])
    some = {(1, 4): tokens.flatten()[at][None]}
    part = masks(lambda: dropout(torch.ones(1, 4, 13), 0.5), tokens, gathered=some)
    assert torch.equal(part[0], expected.flatten(0, 1)[at])


def test_attention_weights_follow_query_head_and_position():
    tokens = tokens_of(2, 6)
    expected = masks(lambda: F.dropout(torch.ones(2, 3, 6, 6), 0.5), tokens)
    padded = masks(lambda: F.dropout(torch.ones(2, 3, 9, 9), 0.5), F.pad(tokens, (0, 3)))
    assert torch.equal(padded[:, :, :6, :6], expected)
    cross = masks(lambda: F.dropout(torch.ones(2, 3, 6, 4), 0.5), tokens)
    assert torch.equal(cross, expected[..., :4])
    # In a packed row the tokens stand elsewhere, and have their positions.
    order = torch.tensor([4, 0, 5, 1, 2, 3])
    positions = order.expand(2, 6)
    packed = masks(
        lambda: F.dropout(torch.ones(2, 3, 6, 6), 0.5), tokens[:, order], positions=positions
    )
    assert torch.equal(packed, expected[:, :, order][..., order])


@pytest.mark.parametrize("length", [24, 150])
@pytest.mark.parametrize("kind", ["none", "causal", "rows", "bias", "trained bias", "positions"])
def test_all_kinds_of_attention_draw_the_same(length, kind):
    """Gathered blocks, torch's function and plain products, with half as many heads of keys."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, heads, length, 8, dtype=torch.float64) for heads in (4, 2, 2))
    tokens, options = tokens_of(2, length), {}
    mask: Tensor | None = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if kind == "none":
        mask = None
    elif kind == "rows":
        mask = (torch.arange(length) < torch.tensor([[length], [length // 2]]))[:, None, None]
    elif "bias" in kind:
        mask = torch.randn(1, 4, length, length, dtype=torch.float64)
        mask.requires_grad_(kind == "trained bias")
    elif kind == "positions":
        options["positions"] = torch.stack([torch.randperm(length) for _ in range(2)])
    bias = 0 if mask is None else mask
    if mask is not None and mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)

    def explicit() -> Tensor:
        keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
        return F.dropout((q @ keys.mT * 0.3 + bias).softmax(-1), 0.25) @ values

    expected = masks(explicit, tokens, **options)
    found = masks(
        lambda: F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=0.25, scale=0.3, enable_gqa=True
        ),
        tokens,
        **options,
    )
    torch.testing.assert_close(found, expected)
    if kind != "trained bias":
        own = masks(
            lambda: masked_attention(q, k, v, mask, scale=0.3, dropout=0.25), tokens, **options
        )
        torch.testing.assert_close(own.transpose(1, 2), expected)
    if kind == "causal":
        found = masks(
            lambda: F.scaled_dot_product_attention(
                q, k, v, is_causal=True, dropout_p=0.25, scale=0.3, enable_gqa=True
            ),
            tokens,
        )
        torch.testing.assert_close(found, expected)


def test_long_rows_are_not_left_to_the_fused_kernel(monkeypatch):
    import lorakit.ops.attention as attention

    q = torch.randn(1, 2, 40, 8, dtype=torch.float64)
    tokens = tokens_of(1, 40)

    def attend() -> Tensor:
        return masked_attention(q, q, q, scale=0.3, dropout=0.25)

    expected = masks(attend, tokens)
    monkeypatch.setattr(attention, "MAX_KEYS", 8)
    assert torch.equal(masks(attend, tokens), expected)


def test_modules_of_torch_draw_keyed_masks():
    tokens = tokens_of(3, 5)
    x = torch.ones(3, 5, 8)
    expected = masks(lambda: dropout(x, 0.5), tokens)
    assert torch.equal(masks(lambda: nn.Dropout(0.5)(x), tokens), expected)
    assert torch.equal(masks(lambda: nn.Dropout(0.5, inplace=True)(x.clone()), tokens), expected)
    assert torch.equal(masks(lambda: nn.Dropout(0.5).eval()(x), tokens), x)


def test_unknown_shapes_are_noted_and_dropped_by_place():
    keys = keys_of(tokens_of(3, 5))
    with keyed(keys):
        y = dropout(torch.ones(7, 400), 0.5)
        dropout(torch.ones(3, 5, 2), 0.5)
    assert 1200 < (y > 0).sum() < 1600
    assert keys.unknown == {y.shape}
    assert keys.draws == 2


@pytest.mark.parametrize("name", ["dropout", "scaled_dot_product_attention"])
def test_functions_that_other_code_has_replaced_come_back(name, monkeypatch):
    def replacement(*arguments, **options):
        raise NotImplementedError

    monkeypatch.setattr(F, name, replacement)
    with keyed(keys_of(tokens_of(1, 4))):
        assert getattr(F, name) is not replacement
    assert getattr(F, name) is replacement


def test_blocks_of_one_thread_nest():
    outer = keys_of(tokens_of(1, 2))
    with keyed(outer):
        with keyed(keys_of(tokens_of(1, 4))):
            pass
        assert active.keys is outer
        assert F.dropout.__module__ != "torch.nn.functional"
    assert active.keys is None
    assert F.dropout.__module__ == "torch.nn.functional"


def test_wide_rows_and_chunks(monkeypatch):
    import lorakit.ops.streams as streams

    keys, thresholds = tokens_of(1, 50)[0], torch.full((333,), 100, dtype=torch.uint8)
    whole = above(keys, thresholds)
    monkeypatch.setattr(streams, "CHUNK", 100)
    assert torch.equal(above(keys, thresholds), whole)
    assert torch.equal(above(keys[3:4], thresholds[:20]), whole[3:4, :20])
    assert above(keys[:0], thresholds).shape == (0, 333)

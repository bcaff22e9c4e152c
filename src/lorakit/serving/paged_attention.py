"""Attention of one packed row that holds the new tokens of many requests, over a paged cache of keys and values.

Each request attends to its own keys only: requests that compute one token are the rows of a batched product, and a
request that computes more has a product of its own. So no mask hides one request's keys from another, and NaN of one
request never reaches another.

`transformers` calls the attention through its `AttentionInterface`, and the cache through `update`, as with the
attention of other backends. A model whose layers do neither cannot be computed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lorakit.evaluation.prompt_cache import ARGUMENT
from lorakit.models.faster import SPARSE
from lorakit.serving.pages import ZEROS

NAME = "lorakit_paged"
"""Name of this attention in `transformers`."""

UNSUPPORTED = ("position_bias", "softcap", "s_aux", "sinks", "encoder_hidden_states", *SPARSE)
"""Arguments of some models' attention that this one lacks."""

WASTE = 1.25
"""A group of single tokens is split where its padded keys exceed its keys by this factor."""


class UnsupportedModelError(Exception):
    """The model's attention cannot be computed over pages."""


@dataclass(frozen=True)
class Part:
    """The tokens that one request computes in a step."""

    tokens: Sequence[int]
    past: int
    """Number of its tokens whose keys and values are cached."""
    pages: Sequence[int]
    """The pages of all its tokens, cached and new."""


class PagedStorage:
    """The keys and values of all pages and layers, in one tensor.

    Args:
        pages: Number of pages, besides `ZEROS`.
        size: Tokens of a page.
        layers: Number of layers.
        heads: Number of key heads.
        width: Elements of a head.
        dtype: Dtype of keys and values.
        device: Where the model computes.
    """

    def __init__(
        self,
        pages: int,
        size: int,
        layers: int,
        heads: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.pages, self.size = pages, size
        self.layers, self.heads, self.width = layers, heads, width
        shape = (pages + 1, layers, 2, size, heads, width)
        self._all = torch.zeros(shape, dtype=dtype, device=device)
        self._rows = self._all.view(-1, heads, width)
        self._blocks = self._all.view(-1, size, heads, width)

    def clear(self, page: int) -> None:
        """Set a page to zeros, since masked keys must be finite and its last request may have left NaN there."""
        self._all[page].zero_()

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store new keys and values, each (T, heads, width), at rows of layer 0 (2 T)."""
        self._rows.index_copy_(0, rows + 2 * layer * self.size, torch.cat((keys, values)))

    def read(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (R, heads, P * size, width) of blocks of layer 0, shape (2, R, P)."""
        found = self._blocks.index_select(0, (blocks + 2 * layer).view(-1))
        found = found.view(2, blocks.shape[1], -1, self.heads, self.width).transpose(2, 3)
        return found[0], found[1]

    def row_numbers(self, pages: Tensor, positions: Tensor) -> Tensor:
        """Return the rows of layer 0 (2 T) of tokens, given the page and the position of each."""
        keys = pages * (2 * self.layers * self.size) + positions % self.size
        return torch.cat((keys, keys + self.size))

    def block_numbers(self, pages: Tensor) -> Tensor:
        """Return the blocks of layer 0 (2, R, P) of pages (R, P)."""
        keys = pages * (2 * self.layers)
        return torch.stack((keys, keys + 1))


@dataclass
class _Group:
    """Requests that compute one token each."""

    tokens: slice
    blocks: Tensor
    lengths: Tensor
    """Number of keys of each request, shape (R)."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, size: int, window: int | None) -> Tensor:
        """Return which of `size` keys each request sees, shape (R, 1, 1, size), the same tensor for all layers."""
        if window not in self.masks:
            keys = torch.arange(size, device=self.lengths.device)
            seen = keys < self.lengths[:, None]
            if window is not None:
                seen &= keys >= self.lengths[:, None] - window
            self.masks[window] = seen[:, None, None]
        return self.masks[window]


@dataclass
class _Run:
    """A request that computes several tokens."""

    tokens: slice
    past: int
    blocks: Tensor | None
    """None if nothing is cached, so that the keys are those of the step."""
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def mask(self, keys: Tensor, window: int | None) -> Tensor | None:
        """Return which keys each token sees, shape (tokens, keys); None if a causal product needs no mask."""
        if window not in self.masks:
            size, seen = keys.shape[2], None
            if self.past or (window is not None and window < size):
                positions = torch.arange(self.past, size, device=keys.device)[:, None]
                numbers = torch.arange(size, device=keys.device)
                seen = numbers <= positions
                if window is not None:
                    seen &= numbers > positions - window
            self.masks[window] = seen
        return self.masks[window]


class Step:
    """One forward pass: where its keys and values are stored, and which tokens see which.

    The requests in `parts` that compute one token come first.
    """

    def __init__(self, storage: PagedStorage, parts: Sequence[Part], device: torch.device) -> None:
        self.storage, self.device = storage, device
        self.layer = -1
        self.windows: set[int | None] = set()
        """The windows of the layers computed so far."""
        size = storage.size
        tokens = [token for part in parts for token in part.tokens]
        spots = [
            (part, p) for part in parts for p in range(part.past, part.past + len(part.tokens))
        ]
        positions = [p for _, p in spots]
        pages = [part.pages[p // size] for part, p in spots]
        ends = [*accumulate(len(part.tokens) for part in parts)]
        self.input_ids = torch.tensor([tokens], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        self.last = torch.tensor(ends, device=device) - 1
        """Position of each request's last token in the row."""
        self._new = storage.row_numbers(torch.tensor(pages, device=device), self.position_ids[0])
        self.groups = list(self._groups([part for part in parts if len(part.tokens) == 1]))
        self.runs = list(self._runs(parts))

    def _groups(self, parts: list[Part]) -> Iterator[_Group]:
        """Yield groups of requests, in order, whose lengths are similar."""
        size, start = self.storage.size, 0
        counts = [part.past // size + 1 for part in parts]
        while start < len(parts):
            stop, total, most = start, 0, 0
            while stop < len(parts):
                total, most = total + counts[stop], max(most, counts[stop])
                if most * (stop + 1 - start) > WASTE * total + 4:
                    break
                stop += 1
            own = parts[start:stop]
            most = max(counts[start:stop])
            pages = [
                [*p.pages[:n], *[ZEROS] * (most - n)]
                for p, n in zip(own, counts[start:stop], strict=True)
            ]
            blocks = self.storage.block_numbers(torch.tensor(pages, device=self.device))
            lengths = torch.tensor([part.past + 1 for part in own], device=self.device)
            yield _Group(slice(start, stop), blocks, lengths)
            start = stop

    def _runs(self, parts: Sequence[Part]) -> Iterator[_Run]:
        start = 0
        for part in parts:
            stop = start + len(part.tokens)
            if len(part.tokens) > 1:
                blocks = None
                if part.past:
                    count = (part.past + len(part.tokens) - 1) // self.storage.size + 1
                    pages = torch.tensor([list(part.pages[:count])], device=self.device)
                    blocks = self.storage.block_numbers(pages)
                yield _Run(slice(start, stop), part.past, blocks)
            start = stop

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the keys and values of a layer, each (1, heads, T, width)."""
        self.layer = layer
        self.storage.write(layer, self._new, keys[0].transpose(0, 1), values[0].transpose(0, 1))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Return the attention of the layer that was written last.

        Args:
            query: Shape (1, H, T, width).
            key: Keys of the step, shape (1, heads, T, width).
            value: Values of the step.
            scale: Factor on the scores; None is the inverse root of the width.
            window: Number of keys that a token sees, itself included; None is all.

        Returns:
            Shape (1, T, H, width).
        """
        self.windows.add(window)
        outputs: list[Tensor] = []
        heads = key.shape[1]
        for group in self.groups:
            keys, values = self.storage.read(self.layer, group.blocks)
            # The queries that share a key head are the queries of one sequence: no key is repeated.
            own = query[0, :, group.tokens].transpose(0, 1).unflatten(1, (heads, -1))
            mask = group.mask(keys.shape[2], window)
            out = F.scaled_dot_product_attention(own, keys, values, attn_mask=mask, scale=scale)
            outputs.append(out.flatten(1, 2))
        for run in self.runs:
            own = query[:, :, run.tokens]
            keys, values = key[:, :, run.tokens], value[:, :, run.tokens]
            if run.blocks is not None:
                length = run.past + own.shape[2]
                keys, values = (t[:, :, :length] for t in self.storage.read(self.layer, run.blocks))
            if own.shape[1] != heads:
                keys = keys.repeat_interleave(own.shape[1] // heads, 1)
                values = values.repeat_interleave(own.shape[1] // heads, 1)
            mask = run.mask(keys, window)
            out = F.scaled_dot_product_attention(
                own, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
            )
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)[None] if len(outputs) > 1 else outputs[0][None]


# --- what transformers calls -----------------------------------------------------------------------------

_STEP: ContextVar[Step | None] = ContextVar("lorakit_paged_step", default=None)


class _StepCache(Cache):
    """Writes a step's keys and values to its pages. The attention reads what it needs."""

    def __init__(self, step: Step) -> None:
        super().__init__(layers=[])
        self.step = step

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer, and return them."""
        self.step.write(layer_idx, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0. Positions are given, and this attention needs no mask."""
        return 0


def compute(model: PreTrainedModel, step: Step, *, adapts_head: bool = False) -> Tensor:
    """Return a step's scores after the last token of each request, shape (N, V).

    Args:
        model: Its attention implementation is `NAME`.
        step: The step.
        adapts_head: Whether an adapter of the step changes the output embedding. A choice by token counts all tokens of
            the step there, so the scores of all of them are computed.
    """
    token = _STEP.set(step)
    try:
        scores = model(
            input_ids=step.input_ids,
            position_ids=step.position_ids,
            logits_to_keep=0 if adapts_head else step.last,
            use_cache=True,
            **{ARGUMENT: _StepCache(step)},
        ).logits[0]
        return scores[step.last] if adapts_head else scores
    finally:
        _STEP.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention for `transformers`: (batch, heads, tokens, d) to (batch, tokens, heads, d)."""
    step = _STEP.get()
    if step is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    unsupported = [name for name in UNSUPPORTED if options.get(name) is not None]
    if unsupported:
        raise UnsupportedModelError(f"its attention needs {', '.join(unsupported)}")
    return step.attend(query, key, value, scaling, options.get("sliding_window")), None


AttentionInterface.register(NAME, _attention)

"""Dropout with a fast random number generator. In training, its masks depend on the tokens alone (`Keys`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.ops.derivatives import Function, apply, is_transformed
from lorakit.ops.streams import GAMMA, above, mixed

PERIOD = 2**10
"""Elements after which the pattern of thresholds repeats."""

STEPS = 2**8 * PERIOD
"""Resolution of the probability: it is rounded to a multiple of 1 / 262,144."""

CPU = torch.device("cpu")

HEAD = 0xD6E8FEB86659FD93 - 2**64
"""Difference between the hash keys of a token in neighbouring attention heads."""

stock_dropout = F.dropout
"""torch's function, which `lorakit.ops.keyed_dropout` replaces during training."""


def dropout(x: Tensor, p: float) -> Tensor:
    """Return `x` with each element set to zero with probability `p`, the others divided by ``1 - p``.

    A draw from torch's default CPU generator seeds the random bits, so the result depends only on torch's seed or
    restored state. Within `keyed_dropout.keyed` it depends on the keys of the tokens too. Under torch.compile and
    torch.func, and without keys on other devices than a CPU, this is `torch.nn.functional.dropout`.

    Drawing random bits dominates the cost, so each element uses eight bits and compares them with a threshold. If
    256 p is not an integer, a pattern of two neighbouring thresholds averages to p. The pattern starts at a random
    offset, so that each element is dropped with the same probability.

    Args:
        x: Any shape.
        p: Between 0 and 1, rounded to a multiple of 1 / 262,144. The scale factor uses the rounded value.
    """
    if not draws_itself(x) or is_transformed(x) or not 0 < p < 1:
        return stock_dropout(x, p)
    return apply(_Dropout, x, p)


def draws_itself(x: Tensor) -> bool:
    """Return whether the masks of `x` come from this module, and not from the generator of its device."""
    return not torch.compiler.is_compiling() and (x.device.type == "cpu" or active.keys is not None)


def kept(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Draw a bool tensor that marks the elements of `x` to keep, and return it with their factor."""
    if isinstance(x, torch._subclasses.FakeTensor):  # planning traces a step without data
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(), _factor(p)
    draw, keys = Draw(p, x.device), active.keys
    rows = None if keys is None else keys.of_rows(x.shape)
    if keys is not None and rows is not None:
        columns = keys.columns(x.shape)
        if columns is None:
            keep = draw.kept(rows.flatten(), x.numel() // max(rows.numel(), 1))
            return keep.view(x.shape), draw.factor
        keep = draw.kept(rows.flatten(), keys.width).view(*rows.shape, -1)
        return keep.gather(-1, columns[:, None, None].expand(x.shape)), draw.factor
    count = -(-x.numel() // PERIOD)
    keep = draw.kept(torch.arange(count, device=x.device), PERIOD)
    return keep.view(-1)[: x.numel()].view(x.shape), draw.factor


class Draw:
    """The random bits of one call of dropout."""

    def __init__(self, p: float, device: torch.device) -> None:
        # Gradient checkpointing restores the state of this generator, so it draws the same again.
        self._call, self._start = torch.randint(2**63 - 1, (2,)).tolist()
        self._thresholds = _thresholds(_dropped(p), device)
        self.factor = _factor(p)

    def kept(self, keys: Tensor, width: int) -> Tensor:
        """Return a bool tensor (N, width) of the elements to keep, for the keys (N,) of N rows."""
        thresholds = self._thresholds[self._start % PERIOD :][: min(width, PERIOD)]
        if width > PERIOD:
            thresholds = thresholds.repeat(-(-width // PERIOD))[:width]
        return above(keys ^ self._call, thresholds)


@dataclass(eq=False)
class Keys:
    """Hash keys of a batch's tokens. A token's dropout masks depend on its key, not on its place in the batch.

    The mask of a token is a stream of bits, one for each feature. The mask of its attention weights is a stream for
    each head, with one bit for each position that it attends to.
    """

    rows: int
    """B."""
    of_length: Callable[[int], Tensor | None]
    """Returns the keys (B, T) of the first T tokens of each row; None if the rows have another length."""
    flat_lengths: tuple[int, ...] = ()
    """Lengths T for which (B * T, ...) holds the tokens of the batch."""
    positions: Tensor | None = None
    """Position of each token in its example, shape (B, T); None if that is its position in its row."""
    gathered: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Keys of tensors that hold some tokens only, by their leading shape."""
    draws: int = 0
    """Number of calls of dropout."""
    unknown: set[torch.Size] = field(default_factory=set)
    """Shapes that hold no tokens of the batch. Their masks depend on the place of an element."""

    def of_rows(self, shape: torch.Size) -> Tensor | None:
        """Return the keys of the rows of a tensor, whose last dimensions have one mask for each row.

        Args:
            shape: (B, F), (B, T, ...) or (B * T, ...) with features last, or (B, H, T, S) of attention weights.
        """
        self.draws += 1
        keys = self._of_rows(shape)
        if keys is None:
            self.unknown.add(shape)
        return keys

    def columns(self, shape: torch.Size) -> Tensor | None:
        """Return the position of each key, (B, S), for attention weights (B, H, T, S); None if they are in order."""
        positions = self.positions
        if positions is None or len(shape) != 4 or shape[3] != positions.shape[1]:
            return None
        return positions

    @cached_property
    def width(self) -> int:
        """The number of positions."""
        assert self.positions is not None
        return int(self.positions.max()) + 1

    def _of_rows(self, shape: torch.Size) -> Tensor | None:
        if tuple(shape[:2]) in self.gathered and len(shape) == 3:
            return self.gathered[shape[0], shape[1]]
        if len(shape) == 2:
            if shape[0] == self.rows:
                keys = self.of_length(1)
                return None if keys is None else keys[:, 0]
            lengths = (n for n in self.flat_lengths if self.rows * n == shape[0])
            return next((keys for n in lengths if (keys := self.of_length(n)) is not None), None)
        if len(shape) not in (3, 4) or shape[0] != self.rows:
            return None
        if len(shape) == 3:
            return self.of_length(shape[1])
        keys = self.of_length(shape[2])
        if keys is None:
            return None
        return keys[:, None] + torch.arange(shape[1], device=keys.device)[:, None] * HEAD


@dataclass
class _Active:
    keys: Keys | None = None


active = _Active()
"""The keys of the batch that is computed. Autograd's threads see them too: they recompute checkpointed blocks."""


def register_gathered(at: Tensor, of: tuple[int, int], shape: tuple[int, int]) -> None:
    """Register the dropout keys of a tensor (*shape, F) of gathered tokens, until the end of the batch.

    Args:
        at: Indices into the flattened tokens of the batch; as many as the tensor has tokens.
        of: Rows and length of the batch.
        shape: Rows and length of the tensor.
    """
    if active.keys is not None and (keys := active.keys.of_length(of[1])) is not None:
        active.keys.gathered[shape] = keys.flatten()[at].view(shape)


def token_words(ids: Tensor, positions: Tensor) -> Tensor:
    """Return a hash of each token id and its position, int64. Their sums are keys of tokens and texts."""
    return mixed((ids + (positions << 32) + 1) * GAMMA)


def _dropped(p: float) -> int:
    return max(round(p * STEPS), 1)


def _factor(p: float) -> float:
    return STEPS / max(STEPS - _dropped(p), 1)


@lru_cache
def _thresholds(dropped: int, device: torch.device = CPU) -> Tensor:
    """Return two periods of thresholds of bytes whose mean is ``dropped / PERIOD``."""
    low, remainder = divmod(dropped, PERIOD)
    # Spread the higher threshold evenly, `remainder` times per period.
    is_higher = torch.arange(2 * PERIOD) * remainder % PERIOD < remainder
    # Above 255, the threshold exceeds all bytes and their dtype.
    return (low + is_higher).to(device, torch.uint8 if dropped <= 255 * PERIOD else torch.int16)


def multiplier(keep: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Return `factor` where `keep` is True and 0 elsewhere, in `dtype`.

    Multiplies the bits of `factor` as integers: CPUs vectorise the cast from bool to an integer, not to a float.
    """
    bits = torch.tensor(factor, dtype=dtype).view(_INTEGERS[dtype.itemsize])
    return keep.view(torch.int8).to(bits.dtype).mul_(bits).view(dtype)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Dropout(Function):
    @staticmethod
    def forward(ctx, x, p):
        keep, ctx.factor = kept(x, p)
        ctx.save_for_backward(keep)
        return multiplier(keep, ctx.factor, x.dtype).mul_(x)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (keep,) = ctx.saved_tensors
        return multiplier(keep, ctx.factor, grad.dtype).mul_(grad), None

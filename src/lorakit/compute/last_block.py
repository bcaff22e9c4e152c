"""The last block of a model, computed for the tokens whose hidden states are read.

Behind the attention of a block every token goes its own way: through the output projection, the MLP and the norms.
In the last block that way is of use to the tokens that are read behind it alone: the first of a classified text, those
before a target. The others are left out of its projections, forward and backward, and stand as zeros where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.layer_adapters import hooks_act_by_token
from lorakit.models import blocks
from lorakit.ops import put_rows, rounded_rows, take_rows

WORTH = 0.9
"""Share of the tokens that may be read at most: beyond, taking them out costs more than it spares."""


@dataclass(eq=False)
class LastBlock:
    """The last block of a model, and what of it treats every token by itself."""

    parts: tuple[nn.Module, ...]
    watched: tuple[nn.Module, ...]
    """All modules but those of earlier blocks: what sits on them may see the tokens that are left out."""
    worth: float = WORTH
    divisions: int = 0
    """How often a part was given some tokens alone."""

    @property
    def divides(self) -> bool:
        """Whether it can be computed for some tokens alone.

        Not where something from there on may mix tokens or cut them into chunks, where it is compiled, since hooks of
        one batch would be compiled too, or computed again in the backward pass, for which it has to stay as it was.
        """
        return all(
            hooks_act_by_token(module)
            and module._compiled_call_impl is None
            and not getattr(module, "gradient_checkpointing", False)
            and not getattr(module, "chunk_size_feed_forward", 0)
            for module in self.watched
        )

    @contextmanager
    def reading(self, at: Callable[[], Tensor], shape: tuple[int, int]) -> Iterator[None]:
        """Compute no more of the block in a forward pass than the hidden states that are read behind it.

        It is computed in full where it does not divide, where nearly all is read, and where nothing is: not every
        kernel takes a batch without rows.

        Args:
            at: Gives indices into the flattened (B * T) tokens of the batch, each once: int64, shape (M,).
            shape: B and T.
        """
        with ExitStack() as handles:
            if self.divides:
                rows, count = at(), shape[0] * shape[1]
                if 0 < len(rows) <= self.worth * count:
                    self._divide(_filled(rows, count), shape, handles)
            yield

    def _divide(self, at: Tensor, shape: tuple[int, int], handles: ExitStack) -> None:
        take, put = partial(_take, self, at, shape), partial(_put, at, shape)
        for part in self.parts:
            handles.enter_context(part.register_forward_pre_hook(take, with_kwargs=True))
            # Behind the hook of its adapters, which see the tokens that are read and no others.
            handles.enter_context(part.register_forward_hook(put))


def _filled(at: Tensor, count: int) -> Tensor:
    """`at`, and as many others of `count` tokens as make it a number of rows for which products are known."""
    more = rounded_rows(len(at)) - len(at)
    if not more:
        return at
    others = at.new_ones(count, dtype=torch.bool).index_fill_(0, at, False)
    return torch.cat([at, others.nonzero()[:more, 0]])


def last_block(model: nn.Module) -> LastBlock | None:
    """Return the model's last block as far as its structure tells; None where it is not known."""
    found = blocks.parts_by_token(model)
    if found is None:
        return None
    path, parts = found
    (stack,) = blocks.stacks(model).values()
    earlier = {
        id(m) for other in stack if other != path for m in model.get_submodule(other).modules()
    }
    return LastBlock(
        parts=tuple(map(model.get_submodule, parts)),
        watched=tuple(m for m in model.modules() if id(m) not in earlier),
    )


def _take(
    block: LastBlock, at: Tensor, shape: tuple[int, int], _: nn.Module, args: Any, kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: (B, T, ...) to (1, M, ...) in whatever a part is given."""

    def taken(x: Any) -> Any:
        if isinstance(x, Tensor) and x.shape[:2] == shape:
            block.divisions += 1
            return take_rows(x.flatten(0, 1), at).unsqueeze(0)
        return x

    return tuple(map(taken, args)), {name: taken(x) for name, x in kwargs.items()}


def _put(at: Tensor, shape: tuple[int, int], _: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Forward hook: (1, M, ...) to (B, T, ...). What a block calls with all tokens in a row (OPT) is left as it is."""
    if output.shape[:2] != (1, len(at)):
        return output
    rows = put_rows(output.flatten(0, 1), at, shape[0] * shape[1])
    return rows.view(*shape, *output.shape[2:])

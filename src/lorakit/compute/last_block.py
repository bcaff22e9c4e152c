"""Compute the last block of a model only for the tokens whose outputs are used.

Tokens are independent after the attention of a block: in the output projection, the MLP and the norms. The loss uses
the outputs of only some tokens of the last block: the first token of a classified text, or the tokens before targets.
Hooks on these parts gather the used tokens before the forward pass and scatter the outputs after it. The outputs of
the other tokens are zero, and autograd skips these tokens too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.hooks import hooks_act_by_token
from lorakit.models import blocks
from lorakit.models.tree import submodule
from lorakit.ops.rows import put_rows, rounded_rows, take_rows

MAX_SHARE = 0.9
"""Largest share of used tokens. Above it, gathering no longer pays."""


@dataclass(eq=False)
class LastBlock:
    """The last block of a model, and its parts in which tokens are independent."""

    parts: tuple[nn.Module, ...]
    watched: tuple[nn.Module, ...]
    """All modules except those of earlier blocks. Hooks on these modules could see that tokens are missing."""
    max_share: float = MAX_SHARE
    gather_count: int = 0
    """Number of inputs that were gathered."""

    @property
    def can_gather(self) -> bool:
        """Whether the block can be computed for some tokens only.

        It cannot if a hook may mix tokens, if a module splits its input into chunks, if the block is compiled (the
        hooks of one batch would be compiled too), or if the backward pass recomputes the block (after the hooks are
        removed).
        """
        return all(
            hooks_act_by_token(module)
            and module._compiled_call_impl is None
            and not getattr(module, "gradient_checkpointing", False)
            and not getattr(module, "chunk_size_feed_forward", 0)
            for module in self.watched
        )

    @contextmanager
    def restricted_to(self, at: Callable[[], Tensor], shape: tuple[int, int]) -> Iterator[None]:
        """Compute the block only for the tokens `at()` in forward passes inside this context.

        The block is computed in full if it cannot gather, if nearly all tokens are used, or if none is: not every
        kernel supports empty batches.

        Args:
            at: Returns distinct indices into the flattened (B * T) tokens of the batch: int64, shape (M,).
            shape: B and T.
        """
        with ExitStack() as handles:
            if self.can_gather:
                used, count = at(), shape[0] * shape[1]
                if 0 < len(used) <= self.max_share * count:
                    self._register(_padded(used, count), shape, handles)
            yield

    def _register(self, at: Tensor, shape: tuple[int, int], handles: ExitStack) -> None:
        """Register the hooks of all parts, and their removal in `handles`."""
        if len(at) == shape[0] * shape[1]:
            return  # rounding has added all other tokens
        gather, scatter = partial(_gather, self, at, shape), partial(_scatter, at, shape)
        for part in self.parts:
            handles.enter_context(part.register_forward_pre_hook(gather, with_kwargs=True))
            # After the hooks of adapters, which therefore see the gathered tokens only.
            handles.enter_context(part.register_forward_hook(scatter))


def _padded(at: Tensor, count: int) -> Tensor:
    """Return `at` padded with other indices below `count` to a rounded number of rows, to limit cached kernels."""
    more = min(rounded_rows(len(at)), count) - len(at)
    if not more:
        return at
    # Others first. Not `nonzero`, whose length a GPU would have to tell the CPU.
    order = at.new_zeros(count, dtype=torch.int32).index_fill_(0, at, 1).argsort(stable=True)
    return torch.cat([at, order[:more]])


def last_block(model: nn.Module) -> LastBlock | None:
    """Return the model's last block; None if the architecture is unknown."""
    located = blocks.parts_by_token(model)
    if located is None:
        return None
    (*before, _), parts = located
    earlier = {id(m) for path in before for m in submodule(model, path).modules()}
    return LastBlock(
        parts=tuple(submodule(model, part) for part in parts),
        watched=tuple(m for m in model.modules() if id(m) not in earlier),
    )


def _gather(
    block: LastBlock, at: Tensor, shape: tuple[int, int], _: nn.Module, args: Any, kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: gather (B, T, ...) to (1, M, ...) in all arguments of a part."""

    def gathered(x: Any) -> Any:
        if isinstance(x, Tensor) and x.shape[:2] == shape:
            block.gather_count += 1
            return take_rows(x.flatten(0, 1), at).unsqueeze(0)
        return x

    return tuple(map(gathered, args)), {name: gathered(x) for name, x in kwargs.items()}


def _scatter(at: Tensor, shape: tuple[int, int], _: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Forward hook: scatter (1, M, ...) to (B, T, ...). OPT flattens tokens itself; such outputs stay unchanged."""
    if output.shape[:2] != (1, len(at)):
        return output
    rows = put_rows(output.flatten(0, 1), at, shape[0] * shape[1])
    return rows.view(*shape, *output.shape[2:])

"""The last block of a model, computed for the tokens whose hidden states are read.

Behind the attention of a block every token goes its own way: through the output projection, the MLP and the norms.
In the last block that way is of use to the tokens that are read behind it alone: the first of a classified text, those
before a target. The others are left out of its projections, forward and backward, and stand as zeros where they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.layer_adapters import hooks_act_by_token
from lorakit.models import blocks
from lorakit.ops import put_rows, take_rows


@dataclass(frozen=True)
class LastBlock:
    """The last block of a model, and what of it treats every token by itself."""

    block: nn.Module
    parts: tuple[nn.Module, ...]

    @contextmanager
    def reading(self, at: Tensor, shape: tuple[int, int]) -> Iterator[None]:
        """Compute no more of the block in a forward pass than the hidden states that are read behind it.

        Where something that may mix tokens sits on a part, or the block is compiled, it is computed in full. So it is
        where nothing is read: not every kernel takes a batch without rows.

        Args:
            at: Int64, shape (M,): indices into the flattened (B * T) tokens of the batch, each once.
            shape: B and T.
        """
        if len(at) in (0, shape[0] * shape[1]) or not self._can_be_divided():
            yield
            return
        take, put = partial(_take, at, shape), partial(_put, at, shape)
        with ExitStack() as handles:
            for part in self.parts:
                handles.enter_context(part.register_forward_pre_hook(take, with_kwargs=True))
                # Behind the hook of its adapters, which see the tokens that are read and no others.
                handles.enter_context(part.register_forward_hook(put))
            yield

    def _can_be_divided(self) -> bool:
        return self.block._compiled_call_impl is None and all(
            hooks_act_by_token(module) for part in self.parts for module in part.modules()
        )


def last_block(model: nn.Module) -> LastBlock | None:
    """Return the model's last block as far as its structure tells; None where it is not known.

    A model whose blocks are computed again in the backward pass has none: they have to be computed as they were.
    """
    found = blocks.last_block(model)
    if found is None or any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        return None
    block, parts = found
    return LastBlock(model.get_submodule(block), tuple(map(model.get_submodule, parts)))


def _take(
    at: Tensor, shape: tuple[int, int], _: nn.Module, args: Any, kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: (B, T, ...) to (1, M, ...) in whatever a part is given."""

    def taken(x: Any) -> Any:
        if isinstance(x, Tensor) and x.shape[:2] == shape:
            return take_rows(x.flatten(0, 1), at).unsqueeze(0)
        return x

    return tuple(map(taken, args)), {name: taken(x) for name, x in kwargs.items()}


def _put(at: Tensor, shape: tuple[int, int], _: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Forward hook: (1, M, ...) to (B, T, ...). What a block calls with all tokens in a row (OPT) is left as it is."""
    if output.shape[:2] != (1, len(at)):
        return output
    rows = put_rows(output.flatten(0, 1), at, shape[0] * shape[1])
    return rows.view(*shape, *output.shape[2:])

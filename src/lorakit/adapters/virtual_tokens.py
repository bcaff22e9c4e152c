"""Virtual tokens during a forward pass: their ids are kept from the embedding, and adapters give them vectors.

Module-level hooks that reach their state through the layer: deepcopy and pickle keep them whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache

from lorakit.errors import AdapterStateError
from lorakit.methods.prefix import BlockVectors, EmbeddingVectors, VirtualVectors
from lorakit.methods.virtual_tokens import INFIX_START, PREFIX_START, VirtualPositions
from lorakit.models.layers import ADAPTERS, by_token

if TYPE_CHECKING:
    from lorakit.adapters.activation import Moment
    from lorakit.adapters.layer_adapters import LayerAdapters

PLACE = (
    "Put them into the ids: lorakit's own training, evaluation and generation do, elsewhere use "
    "adapters.virtual_tokens.place."
)


def add_hooks(layer: nn.Module, module: nn.Module) -> None:
    """Put the hooks on a layer that a module with vectors for virtual tokens needs there."""
    if isinstance(module, EmbeddingVectors) and hide_ids not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(hide_ids, with_kwargs=True)
        layer.register_forward_hook(give_after)
    elif isinstance(module, BlockVectors) and give_before not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(give_before, with_kwargs=True)


def watch_passes(model: nn.Module) -> None:
    """Let each forward pass of the model's backbone begin and end without virtual tokens of another one."""
    backbone = getattr(model, "base_model", model)
    assert isinstance(backbone, nn.Module)
    if begin_pass not in backbone._forward_pre_hooks.values():
        backbone.register_forward_pre_hook(begin_pass, with_kwargs=True)
        backbone.register_forward_hook(end_pass)


@by_token
def begin_pass(backbone: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of the backbone: a new pass, which goes on after cached tokens or does not."""
    adapters = _of_embedding(backbone)
    assert adapters is not None  # the hook leaves with the last adapter there
    # Architectures give the cache different names.
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    adapters.activation.begin_pass(is_first=not any(cache.get_seq_length() for cache in caches))
    if kwargs.get("inputs_embeds") is not None and any(_takers(adapters, 1)):
        raise AdapterStateError(
            "The active adapter gives vectors to virtual tokens, whose places only token ids can tell, and the model "
            "was given inputs_embeds. Give it input_ids, or activate(None)."
        )


@by_token
def end_pass(backbone: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of the backbone."""
    adapters = _of_embedding(backbone)
    assert adapters is not None
    adapters.activation.end_pass()


@by_token
def hide_ids(embedding: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of the input embedding: note where virtual tokens stand, and look up token 0 there."""
    ids = args[0] if args else kwargs["input"]
    adapters = embedding.adapters
    if ids.ndim != 2:
        return args, kwargs  # no batch of sequences
    found = VirtualPositions.of(ids)
    if torch.compiler.is_compiling():
        some = True  # as far as a compiled graph knows
    else:
        _check(adapters, found)  # type: ignore[arg-type]
        some = found.rows is not None and len(found.rows) > 0
    adapters.activation.virtual = found if some else None  # type: ignore[union-attr]
    if some:
        ids = ids.masked_fill(ids >= PREFIX_START, 0)
    return ((ids, *args[1:]), kwargs) if args else ((), {**kwargs, "input": ids})


@by_token
def give_after(embedding: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Forward hook of the input embedding, after those of other adapters on it."""
    return _give(embedding, output)


@by_token
def give_before(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a block."""
    if args:
        return (_give(block, args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _give(block, kwargs["hidden_states"])}


def is_idle(module: nn.Module) -> bool:
    """Whether hooks of ours on a module have nothing to do any more."""
    watches = begin_pass in module._forward_pre_hooks.values()
    slot = _of_embedding(module) if watches else module._modules.get(ADAPTERS)
    found = slot.values() if isinstance(slot, nn.ModuleDict) else ()
    return not any(isinstance(adapter, VirtualVectors) for adapter in found)


HOOKS = (begin_pass, end_pass, hide_ids, give_after, give_before)


def _give(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Hidden states (B, T, d) with the vectors of the active adapters at the virtual tokens."""
    adapters: LayerAdapters = layer.adapters  # type: ignore[assignment]
    moment = adapters.activation.moment()
    at = moment.virtual
    if at is None:
        return hidden
    if hidden.shape[:2] != at.ids.shape:
        raise AdapterStateError(
            f"{type(layer).__name__} got hidden states of shape {tuple(hidden.shape)} for ids of shape "
            f"{tuple(at.ids.shape)}: the adapter cannot tell which of them are virtual tokens."
        )
    for name, rows in _givers(moment, len(hidden)):
        module = _module(adapters, name)
        if isinstance(module, VirtualVectors):
            hidden = module.put(hidden, at if rows is None else at.among(rows))
    return hidden


def _givers(moment: Moment, batch: int) -> Iterator[tuple[str, list[int] | None]]:
    """The active adapters, each with the rows of the batch that it acts on (None: all)."""
    active = moment.active
    if active.rows is None:
        yield from ((name, None) for name, _ in active.weights)
        return
    for name in dict.fromkeys(active.rows):
        if name is not None:
            yield name, active.rows_of(name, batch)


def _takers(adapters: LayerAdapters, batch: int) -> list[VirtualVectors | None]:
    """What gives vectors to the virtual tokens of each row; None for a row without."""
    found: list[VirtualVectors | None] = [None] * batch
    for name, rows in _givers(adapters.activation.moment(), batch):
        module = _module(adapters, name)
        if isinstance(module, VirtualVectors):
            for row in range(batch) if rows is None else rows:
                if row < batch:
                    found[row] = module
    return found


def _module(adapters: LayerAdapters, name: str) -> nn.Module | None:
    return adapters[name] if name in adapters else None  # noqa: SIM401, nn.ModuleDict has no get


def _check(adapters: LayerAdapters, found: VirtualPositions) -> None:
    """Refuse ids whose virtual tokens are not those that the active adapter takes.

    Raises:
        AdapterStateError: Says which, and what to do.
    """
    batch = len(found.ids)
    takers = _takers(adapters, batch)
    assert found.rows is not None
    if not len(found.rows) and not any(takers):
        return
    by_row: list[list[int]] = [[] for _ in range(batch)]
    tokens_there = found.ids[found.rows, found.columns].tolist()
    for row, token in zip(found.rows.tolist(), tokens_there, strict=True):
        by_row[row].append(token)
    for row, (module, there) in enumerate(zip(takers, by_row, strict=True)):
        if module is None:
            if there:
                raise AdapterStateError(
                    f"Row {row} of the ids holds {len(there)} virtual tokens, and no active adapter gives them "
                    "vectors. Activate the adapter that they were placed for, or leave them out."
                )
            continue
        tokens = module.tokens
        if not there and adapters.activation.in_first_pass:
            raise AdapterStateError(
                f"Row {row} of the ids holds no virtual token, and the active adapter takes {tokens.prefix} before "
                f"and {tokens.infix} after each prompt: without them it would have no effect. {PLACE}"
            )
        for token in there:
            start, length = (
                (INFIX_START, tokens.infix)
                if token >= INFIX_START
                else (PREFIX_START, tokens.prefix)
            )
            if token - start >= length:
                raise AdapterStateError(
                    f"Row {row} of the ids holds the virtual token {token}, and the active adapter has "
                    f"{tokens.prefix} for a prefix (from {PREFIX_START}) and {tokens.infix} for an infix (from "
                    f"{INFIX_START}). {PLACE}"
                )


def _of_embedding(backbone: nn.Module) -> LayerAdapters | None:
    table: nn.Module = backbone.get_input_embeddings()  # type: ignore[operator]
    return table._modules.get(ADAPTERS)  # type: ignore[return-value]

"""The trained vectors of virtual tokens, and the hooks that write them into the hidden states.

The ids of virtual tokens exceed every vocabulary. A hook on the input embedding replaces them by token 0 and stores
their positions for the forward pass; further hooks write the trained vectors at these positions, after the embedding
and, for PrefixLayer, before each block. All hooks are module-level functions, so that deepcopy and pickle work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from lorakit.errors import AdapterStateError, TargetError
from lorakit.methods.module import AdapterModule, ModuleHook
from lorakit.methods.virtual_tokens import INFIX_START, PREFIX_START, VirtualTokens
from lorakit.models.blocks import stacks
from lorakit.models.heads import input_embeddings
from lorakit.models.layers import ADAPTERS, by_token
from lorakit.models.past import has_past
from lorakit.models.tree import base_modules, submodule
from lorakit.ops.rows import gather_rows

INIT_STD = 0.02
"""Standard deviation of the initial vectors, as in the first release of the paper's code."""

HOW_TO_PLACE = (
    "Insert them into the ids with adapters.virtual_tokens.place. lorakit's own training, evaluation and generation "
    "do so."
)


# --- positions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VirtualPositions:
    """The positions of the N virtual tokens in a batch of ids (B, T)."""

    ids: Tensor
    """The ids, shape (B, T); those of `PREFIX_START` and above are virtual."""
    rows: Tensor | None = None
    """Row of each virtual token, shape (N,); None in a compiled graph, where shapes cannot depend on data."""
    columns: Tensor | None = None
    """Column of each, shape (N,)."""

    @classmethod
    def of(cls, ids: Tensor) -> VirtualPositions:
        """Find the virtual tokens in `ids`."""
        if torch.compiler.is_compiling():
            return cls(ids)
        return cls(ids, *(ids >= PREFIX_START).nonzero(as_tuple=True))

    def among(self, rows: Sequence[int]) -> VirtualPositions:
        """Return the positions in some rows only, as indices into the whole batch."""
        selected = torch.zeros(len(self.ids), 1, dtype=torch.bool, device=self.ids.device)
        selected[list(rows)] = True
        return VirtualPositions.of(self.ids.masked_fill(~selected, 0))

    def put(self, hidden: Tensor, vectors: Tensor, prefix: int) -> Tensor:
        """Return `hidden` (B, T, d) with the rows of `vectors` (prefix + infix, d) at the virtual tokens."""
        ids = self.ids.to(vectors.device)
        if self.rows is None or self.columns is None:
            index = _vector_index(ids, prefix).clamp(0, len(vectors) - 1)
            is_virtual = (ids >= PREFIX_START).unsqueeze(-1).to(hidden.device)
            rows = gather_rows(vectors, index).to(hidden.device, hidden.dtype)
            return torch.where(is_virtual, rows, hidden)
        index = _vector_index(ids[self.rows, self.columns], prefix)
        positions = (self.rows.to(hidden.device), self.columns.to(hidden.device))
        rows = gather_rows(vectors, index).to(hidden.device, hidden.dtype)
        return hidden.index_put(positions, rows)


def _vector_index(ids: Tensor, prefix: int) -> Tensor:
    """Return the row of each virtual token in a table of prefix vectors followed by infix vectors."""
    return torch.where(ids >= INFIX_START, ids - INFIX_START + prefix, ids - PREFIX_START)


@dataclass(frozen=True, slots=True)
class PassState:
    """A forward pass of the backbone (`Activation.state`)."""

    is_first: bool
    """Whether the cache is empty."""
    virtual: VirtualPositions | None = None
    """Positions of the virtual tokens; None if there are none."""


# --- hooks ----------------------------------------------------------------------------------------------


@by_token
def begin_pass(backbone: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of the backbone: start a pass, and reject inputs without ids."""
    adapters = _embedding_adapters(backbone)
    # The name of the cache argument differs between architectures.
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    is_first = not any(map(has_past, caches))
    adapters.activation.state = PassState(is_first)
    if kwargs.get("inputs_embeds") is not None and _needs_vectors(
        adapters, adapters.activation.current().choice
    ):
        raise AdapterStateError(
            "The model was called with inputs_embeds, and the active adapter finds its virtual tokens by their ids. "
            "Pass input_ids, or call activate(None)."
        )


@by_token
def end_pass(backbone: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of the backbone: drop the positions."""
    _embedding_adapters(backbone).activation.state = None


@by_token
def hide_ids(embedding: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of the input embedding: store the positions of virtual tokens and look up token 0 there."""
    ids = args[0] if args else kwargs["input"]
    adapters: Any = embedding.adapters
    if ids.ndim != 2:
        return args, kwargs  # not a batch of sequences
    state = adapters.activation.state or PassState(is_first=False)
    positions = VirtualPositions.of(ids)
    has_virtual = True  # unknown in a compiled graph
    if not torch.compiler.is_compiling():
        _check_ids(adapters, positions, is_first=state.is_first)
        has_virtual = positions.rows is not None and len(positions.rows) > 0
    adapters.activation.state = replace(state, virtual=positions if has_virtual else None)
    if has_virtual:
        ids = ids.masked_fill(ids >= PREFIX_START, 0)
    return ((ids, *args[1:]), kwargs) if args else ((), {**kwargs, "input": ids})


@by_token
def put_after_embedding(embedding: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Forward hook of the input embedding: write the vectors, after the hooks of other adapters."""
    return _put_vectors(embedding, output)


@by_token
def put_before_block(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a block: write the vectors into its input."""
    if args:
        return (_put_vectors(block, args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _put_vectors(block, kwargs["hidden_states"])}


def _put_vectors(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Write the vectors of the active adapters into hidden states (B, T, d) at the virtual tokens."""
    adapters: Any = layer.adapters
    choice, state = adapters.activation.current()
    if state is None or state.virtual is None:
        return hidden
    positions = state.virtual
    if hidden.shape[:2] != positions.ids.shape:
        raise AdapterStateError(
            f"{type(layer).__name__} received hidden states of shape {tuple(hidden.shape)} for ids of shape "
            f"{tuple(positions.ids.shape)}, so the adapter cannot locate its virtual tokens. Call the model with ids "
            "of shape (batch, length), or call activate(None)."
        )
    by_row = _vectors_by_row(adapters, choice, len(hidden))
    for module in dict.fromkeys(by_row):
        if module is not None:
            rows = [row for row, of_row in enumerate(by_row) if of_row is module]
            in_rows = positions if len(rows) == len(by_row) else positions.among(rows)
            hidden = in_rows.put(hidden, module.vectors, module.tokens.prefix)
    return hidden


def _needs_vectors(adapters: Any, choice: Any) -> bool:
    """Return whether an adapter with virtual tokens acts on some row."""
    return any(isinstance(_module(adapters, name), VirtualVectors) for name in choice.names)


def _vectors_by_row(adapters: Any, choice: Any, batch: int) -> list[VirtualVectors | None]:
    """Return the module with the vectors of each row's virtual tokens, or None for a row without."""
    if not _needs_vectors(adapters, choice):
        return [None] * batch
    if choice.unit == "token":
        raise AdapterStateError(
            "per_token cannot use an adapter with virtual tokens, which are placed by row. Use per_sample."
        )
    if choice.unit == "row" and batch not in choice.rows:
        raise AdapterStateError(
            f"per_sample names {len(choice.blends)} rows, and the model received a batch of {batch}. Give one name (or "
            "None) for each row of the batch."
        )
    by_blend = [
        next(
            (m for name, _ in blend if isinstance(m := _module(adapters, name), VirtualVectors)),
            None,
        )
        for blend in choice.blends
    ]
    return [module for module in by_blend for _ in range(batch // len(by_blend))]


def _module(adapters: Any, name: str) -> Any:
    return adapters[name] if name in adapters else None  # noqa: SIM401, nn.ModuleDict has no get


def _check_ids(adapters: Any, positions: VirtualPositions, *, is_first: bool) -> None:
    """Reject ids whose virtual tokens are not those of the active adapter."""
    batch = len(positions.ids)
    modules = _vectors_by_row(adapters, adapters.activation.current().choice, batch)
    assert positions.rows is not None
    if not len(positions.rows) and not any(modules):
        return
    by_row: list[list[int]] = [[] for _ in range(batch)]
    virtual_ids = positions.ids[positions.rows, positions.columns].tolist()
    for row, token in zip(positions.rows.tolist(), virtual_ids, strict=True):
        by_row[row].append(token)
    for row, (module, tokens_of_row) in enumerate(zip(modules, by_row, strict=True)):
        if module is None:
            if tokens_of_row:
                raise AdapterStateError(
                    f"Row {row} of the ids holds {len(tokens_of_row)} virtual tokens, and no active adapter gives them "
                    "vectors. Activate the adapter that they were inserted for, or remove them."
                )
            continue
        tokens = module.tokens
        if not tokens_of_row and is_first:
            raise AdapterStateError(
                f"Row {row} of the ids holds no virtual token, and the active adapter needs {tokens.prefix} before "
                f"and {tokens.infix} after each prompt: without them it has no effect. {HOW_TO_PLACE}"
            )
        for token in tokens_of_row:
            is_infix = token >= INFIX_START
            if token >= (INFIX_START + tokens.infix if is_infix else PREFIX_START + tokens.prefix):
                raise AdapterStateError(
                    f"Row {row} of the ids holds the virtual token {token}, and the active adapter has "
                    f"{tokens.prefix} for a prefix (from {PREFIX_START}) and {tokens.infix} for an infix (from "
                    f"{INFIX_START}). {HOW_TO_PLACE}"
                )


def _embedding_adapters(backbone: nn.Module) -> Any:
    """Return the adapters on the input embedding, which declares the hooks of the backbone."""
    table: nn.Module = backbone.get_input_embeddings()  # type: ignore[operator]
    return table._modules[ADAPTERS]


# --- modules --------------------------------------------------------------------------------------------


class VirtualVectors(AdapterModule):
    """The vectors of all virtual tokens at one layer of the model.

    Args:
        tokens: The virtual tokens; the prefix comes first.
        width: Width d of the hidden states, shape (B, T, d).
        options: Device and dtype of the tensor.
    """

    scales = merges = False

    def __init__(self, tokens: VirtualTokens, width: int, options: dict) -> None:
        super().__init__()
        self.tokens = tokens
        self.vectors = nn.Parameter(torch.empty(tokens.total, width, **options))
        nn.init.normal_(self.vectors, std=INIT_STD)

    def extra_repr(self) -> str:
        return (
            f"prefix {self.tokens.prefix}, infix {self.tokens.infix}, width {self.vectors.shape[1]}"
        )


class EmbeddingVectors(VirtualVectors):
    """Vectors that replace the output of the input embedding."""

    layer_hooks = (ModuleHook(hide_ids, before=True), ModuleHook(put_after_embedding))
    backbone_hooks = (ModuleHook(begin_pass, before=True), ModuleHook(end_pass))


class BlockVectors(VirtualVectors):
    """Vectors that replace the input of a block."""

    layer_hooks = (ModuleHook(put_before_block, before=True),)


def embedding_vectors(
    model: nn.Module, tokens: VirtualTokens, dtype: torch.dtype | None, *, method: str
) -> dict[str, AdapterModule]:
    """Return the vectors on the input embedding, by its path.

    Raises:
        TargetError: The model has no table of token embeddings, or reads two sequences.
    """
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TargetError(
            f"{name} is an encoder-decoder, and {method} supports models with one sequence only. Use an encoder, a "
            "decoder, or another method."
        )
    table = input_embeddings(model)
    if not isinstance(table, nn.Embedding):
        raise TargetError(
            f"{name} has no table of token embeddings, which {method} needs. Use a text model of transformers, or "
            "another method."
        )
    if table.num_embeddings > PREFIX_START:
        raise TargetError(
            f"The vocabulary of {name} has {table.num_embeddings:,} entries, and the ids of virtual tokens start at "
            f"{PREFIX_START:,}. Use another method."
        )
    path = next(path for path, module in base_modules(model) if module is table)
    options = {"device": table.weight.device, "dtype": dtype or torch.float32}
    return {path: EmbeddingVectors(tokens, table.embedding_dim, options)}


def block_vectors(
    model: nn.Module, tokens: VirtualTokens, dtype: torch.dtype | None
) -> dict[str, AdapterModule]:
    """Return the vectors on every block but the first, by path.

    Raises:
        TargetError: The model has no single list of blocks.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    lists = list(stacks(model).values())
    expected = getattr(config, "num_hidden_layers", None)
    if len(lists) != 1 or len(lists[0]) != expected:
        raise TargetError(
            f"{type(model).__name__} has no single list of its {expected} blocks, which PrefixLayer needs. Use "
            "PrefixEmbedding, which needs the embedding only."
        )
    modules: dict[str, AdapterModule] = {}
    for block in lists[0][1:]:
        device = next(submodule(model, block).parameters()).device
        options = {"device": device, "dtype": dtype or torch.float32}
        modules[block] = BlockVectors(tokens, config.hidden_size, options)
    return modules

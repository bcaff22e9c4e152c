"""The trained vectors of virtual tokens, and the hooks that write them into the hidden states.

The ids of virtual tokens exceed every vocabulary. A hook on the input embedding replaces them by token 0 and stores
the ids for the forward pass; further hooks write the trained vectors at the virtual tokens, after the embedding and,
for PrefixLayer, before each block. All hooks are module-level functions, so that deepcopy and pickle work.
"""

from __future__ import annotations

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
from lorakit.models.layers import ADAPTERS, by_token, device_of
from lorakit.models.past import has_past
from lorakit.models.tree import base_modules, submodule
from lorakit.ops.lora_linear import Rows, put, take
from lorakit.ops.rows import gather_rows

INIT_STD = 0.02
"""Standard deviation of the initial vectors, as in the first release of the paper's code."""


@dataclass(frozen=True, slots=True)
class PassState:
    """A forward pass of the backbone (`Activation.state`)."""

    is_first: bool
    """Whether the cache is empty."""
    ids: Tensor | None = None
    """The ids, shape (B, T), those of `PREFIX_START` and above are virtual; None if there are no virtual tokens."""


# --- hooks ----------------------------------------------------------------------------------------------


@by_token
def begin_pass(backbone: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of the backbone: start a pass, and reject inputs in which virtual tokens cannot be found."""
    adapters = _embedding_adapters(backbone)
    # The name of the cache argument differs between architectures.
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    adapters.activation.state = PassState(is_first=not any(map(has_past, caches)))
    choice = adapters.activation.current().choice
    if not any(isinstance(_module(adapters, name), VirtualVectors) for name in choice.names):
        return
    if kwargs.get("inputs_embeds") is not None:
        raise AdapterStateError(
            "The model was called with inputs_embeds, and the active adapter finds its virtual tokens by their ids. "
            "Pass input_ids, or call activate(None)."
        )
    if choice.unit == "token":
        raise AdapterStateError(
            "per_token cannot use an adapter with virtual tokens, which are placed by row. Use per_sample."
        )


@by_token
def end_pass(backbone: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of the backbone: drop the ids."""
    _embedding_adapters(backbone).activation.state = None


@by_token
def hide_ids(embedding: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of the input embedding: store the ids, and look up token 0 at the virtual tokens."""
    ids = args[0] if args else kwargs["input"]
    activation: Any = embedding.adapters.activation  # type: ignore[union-attr]
    if ids.ndim != 2:
        return args, kwargs  # not a batch of sequences
    state = activation.state or PassState(is_first=False)
    is_virtual = ids >= PREFIX_START
    has_virtual = True  # unknown in a compiled graph
    if not torch.compiler.is_compiling():
        has_virtual = bool(is_virtual.any())
        if has_virtual or state.is_first:
            _check_ids(embedding, ids, is_first=state.is_first)
    activation.state = replace(state, ids=ids if has_virtual else None)
    ids = ids.masked_fill(is_virtual, 0)
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
    choice, state = layer.adapters.activation.current()  # type: ignore[union-attr, operator]
    if state is None or state.ids is None:
        return hidden
    ids = state.ids.to(hidden.device)
    for module, rows in _parts(layer, choice, hidden):
        if module is not None:
            hidden = put(hidden, rows, module.write(take(hidden, rows), take(ids, rows)))
    return hidden


def _check_ids(embedding: nn.Module, ids: Tensor, *, is_first: bool) -> None:
    """Reject ids (B, T) whose virtual tokens are not those of the active adapter."""
    choice, rows = embedding.adapters.activation.current().choice, ids.tolist()  # type: ignore[union-attr, operator]
    for module, part in _parts(embedding, choice, ids):
        tokens = VirtualTokens() if module is None else module.tokens
        allowed = set(tokens.place([]))
        for row in take(torch.arange(len(ids), device=ids.device), part).tolist():
            found = [token for token in rows[row] if token >= PREFIX_START]
            is_missing = is_first and tokens.total and not found
            if is_missing or not allowed.issuperset(found):
                raise AdapterStateError(
                    f"Row {row} of the ids holds the virtual tokens {found}, and the active adapter needs "
                    f"{tokens.prefix} before its prompt (from {PREFIX_START}) and {tokens.infix} after it (from "
                    f"{INFIX_START}). Activate the adapter that they are for, and insert them with "
                    "adapters.virtual_tokens.place, as lorakit's own training, evaluation and generation do."
                )


def _parts(
    layer: nn.Module, choice: Any, batch: Tensor
) -> list[tuple[VirtualVectors | None, Rows]]:
    """Return the module that gives vectors to each part of the rows, or None for rows without."""
    modules = {name: _module(layer.adapters, name) for name in choice.names}
    modules = {name: m for name, m in modules.items() if isinstance(m, VirtualVectors)}
    if not modules or choice.whole is not None:
        parts = [(choice.whole or (), None)]
    else:
        parts = choice.parts(len(batch), batch.device)
    return [
        (next((modules[name] for name, _ in blend if name in modules), None), rows)
        for blend, rows in parts
    ]


def _module(adapters: Any, name: str) -> Any:
    return adapters[name] if name in adapters else None  # noqa: SIM401, nn.ModuleDict has no get


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

    def write(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return `hidden` (B, T, d) with the vectors at the virtual tokens of `ids` (B, T)."""
        starts = torch.where(ids >= INFIX_START, INFIX_START - self.tokens.prefix, PREFIX_START)
        index = (ids - starts).to(self.vectors.device)  # below 0 for other tokens
        rows = gather_rows(self.vectors, index.clamp(min=0)).to(hidden.device, hidden.dtype)
        return torch.where((ids >= PREFIX_START).unsqueeze(-1), rows, hidden)

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
    model: nn.Module, tokens: VirtualTokens, dtype: torch.dtype
) -> dict[str, AdapterModule]:
    """Return the vectors on the input embedding, by its path.

    Raises:
        TargetError: The model has no table of token embeddings, or reads two sequences.
    """
    table = input_embeddings(model)
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if is_encoder_decoder or not isinstance(table, nn.Embedding):
        raise TargetError(
            f"{type(model).__name__} is an encoder-decoder or has no table of token embeddings, and a prefix method "
            "needs a text model of transformers that reads one sequence. Use another method."
        )
    path = next(path for path, module in base_modules(model) if module is table)
    options = {"device": device_of(table), "dtype": dtype}
    return {path: EmbeddingVectors(tokens, table.embedding_dim, options)}


def block_vectors(
    model: nn.Module, tokens: VirtualTokens, dtype: torch.dtype
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
    for path in lists[0][1:]:
        options = {"device": device_of(submodule(model, path)), "dtype": dtype}
        modules[path] = BlockVectors(tokens, config.hidden_size, options)
    return modules

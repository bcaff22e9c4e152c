"""Where the rows of a batch are in the input of a layer, for a choice by row or by token.

A layer must see whole rows in order. A shape alone does not prove it: a sequence-first input, a table of relative
positions or the tokens routed to an expert can have as many entries as the batch has rows. So the structure of the
model decides where it can, and the layer is refused by name where it cannot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.choice import Choice
from lorakit.adapters.passes import Pass
from lorakit.errors import AdapterStateError
from lorakit.models.architectures import architecture_of
from lorakit.models.direct_reads import never_calls
from lorakit.models.heads import input_embeddings, output_embeddings
from lorakit.models.layers import stacked_weights
from lorakit.models.tree import base_modules, parents, submodule, walk

_MAIN_INPUTS = (
    *("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features"),
    *("decoder_input_ids", "decoder_inputs_embeds"),
)
"""Arguments of transformers models with one entry for each row."""


@dataclass(frozen=True)
class RowLayout:
    """How one layer of a model receives the rows of a batch."""

    path: str
    """Path of the layer, for messages."""
    axis: int = 0
    """Axis of the rows: 1 inside PyTorch's sequence-first modules."""
    is_known: bool = False
    """Whether the architecture is known to pass (batch, length, ...) to this layer."""
    is_flattened: bool = False
    """Whether the architecture is known to pass (batch * length, ...) to it."""
    is_table: bool = False
    """Whether the layer is an embedding that may look up something else than the model's input, such as positions."""
    is_read_directly: bool = False
    """Whether the model reads the weight of this layer without calling it, or may do so."""
    refused: str | None = None
    """Why the layer sees something else than the rows of the batch, if that is known."""

    def checked_size(self, x: Tensor, of_pass: Pass, *, axes: int) -> int:
        """Validate a layer's input. Return the size of its row axis, or its number of tokens for a choice by token.

        Each row has an equal, contiguous part of the row axis.

        Args:
            x: Input of the layer.
            of_pass: The forward pass, whose choice is by row or by token.
            axes: Number of leading axes that are batch or length.

        Raises:
            AdapterStateError: The layer may see something else than whole rows in order.
        """
        choice = of_pass.choice
        batches = (of_pass.batch,) if of_pass.batch is not None else choice.rows
        size = x.shape[self.axis] if axes > self.axis else -1
        if choice.whole is not None and size in batches:
            return size
        if not all(isinstance(n, int) for n in x.shape[:axes]):
            raise self.refuse("it is traced, or exported with dynamic_shapes, so its rows can vary")
        if self.refused is not None:
            raise self.refuse(self.refused)
        if isinstance(x, nn.Parameter):
            raise self.refuse("its input is a parameter")
        if self.is_table and not (x.ndim and _identity(x) in of_pass.inputs):
            raise self.refuse("its input is not known to be an input of the model")
        if choice.unit == "token":
            return self._count_tokens(x, of_pass, axes)
        allowed = set(batches)
        if axes == 1 and self.is_flattened:
            allowed |= {batch * length for batch in batches for length in of_pass.lengths}
        if size not in allowed:
            rows = " or ".join(map(str, batches))
            raise self.refuse(f"its input of shape {tuple(x.shape)} does not hold {rows} rows")
        ambiguous = axes > 1 and x.shape[0] == x.shape[1] > 1
        if ambiguous and not (self.is_known or self.is_table):
            raise self.refuse(
                f"its input of shape {tuple(x.shape)} has as many rows as tokens, so it may be sequence-first"
            )
        return size

    def is_in_order(self, shape: torch.Size) -> bool:
        """Return whether an input (*shape, in) is certain to hold the tokens of a batch of this shape in order.

        `checked_size` accepts such an input.
        """
        ambiguous = len(shape) > 1 and shape[0] == shape[1] > 1
        certain = self.axis == 0 and self.refused is None and not self.is_table
        return certain and (self.is_known or not ambiguous)

    def _count_tokens(self, x: Tensor, of_pass: Pass, axes: int) -> int:
        total = sum(of_pass.choice.tokens)
        if self.axis != 0:
            raise self.refuse("it is sequence-first")
        in_rows = axes > 1 and of_pass.batch in (None, x.shape[0])
        if x.shape[:axes].numel() != total or not (in_rows or axes == 1):
            raise self.refuse(f"its input of shape {tuple(x.shape)} does not hold {total} tokens")
        return total

    def refuse(self, reason: str) -> AdapterStateError:
        """Return the error for a layer that cannot use different adapters in one batch."""
        name = self.path or "the model itself"
        return AdapterStateError(
            f"'{name}' cannot use different adapters in one batch: {reason}. Run one batch for each adapter, or "
            "adapt other layers."
        )


def row_layouts(model: nn.Module, paths: list[str]) -> dict[str, RowLayout]:
    """Return the layout of each layer at `paths`."""
    if not paths:
        return {}
    modules = list(walk(model))
    configs = {at.path: at.config for at in modules}
    # Experts and the layers beside them have all tokens in one axis.
    with_experts = {id(at.parent) for at in modules if _takes_routes(at.module)}
    inputs = {id(input_embeddings(module)) for _, module in base_modules(model)}
    layouts = {}
    for path in paths:
        layer, config = submodule(model, path), configs.get(path)
        around = [model, *(submodule(model, parent) for parent in parents(path)), layer]
        is_known = architecture_of(config) is not None or _declaring(around) is not None
        is_table = isinstance(layer, nn.Embedding) and id(layer) not in inputs
        layouts[path] = RowLayout(
            path,
            axis=_batch_axis(around),
            is_known=is_known,
            is_flattened=getattr(config, "model_type", None) in _FLATTENING
            or any(id(module) in with_experts for module in around),
            is_table=is_table,
            is_read_directly=(is_table and not is_known)
            or never_calls(around[-2], path.rpartition(".")[2]),
            refused=_why_refused(model, path, layer, config),
        )
    return layouts


_FLATTENING = ("opt",)
"""Architectures that pass all tokens of a batch in one axis to some layers."""

_READ_POSITIONS = {"deberta-v2": ("query_proj", "key_proj", "pos_query_proj", "pos_key_proj")}
"""Layers that architectures also call with a table of positions, whose length may equal that of the batch."""


def _takes_routes(layer: nn.Module) -> bool:
    """Whether a layer is experts that get all tokens in one axis and the experts of each.

    These attributes are of transformers' interface for experts, whose functions have such arguments.
    """
    return hasattr(layer, "has_gate") and hasattr(layer, "is_transposed")


def _why_refused(model: nn.Module, path: str, layer: nn.Module, config: Any) -> str | None:
    """Return why a layer sees something else than the rows of the batch, or None if that is not known."""
    parts = path.split(".")
    if stacked_weights(path, layer) and not _takes_routes(layer):
        return "it is not called with the tokens and the experts of each"
    for i, part in enumerate(parts):
        if part.startswith("expert") and not _takes_routes(layer):
            return f"'{'.'.join(parts[:i]) or part}' routes tokens to it"
    if parts[-1] in _READ_POSITIONS.get(getattr(config, "model_type", ""), ()):
        return "it is also called with a table of positions"
    root = getattr(model, "config", None)
    if getattr(root, "sub_configs", None) and not getattr(root, "is_encoder_decoder", False):
        text: Any = root.get_text_config()  # type: ignore[union-attr]
        if config is not text and submodule(model, path) is not output_embeddings(model):
            return "its input holds images or audio, whose number can differ from the batch size"
    return None


def _declaring(around: list[nn.Module]) -> nn.Module | None:
    """Return the innermost module of PyTorch around a layer that declares `batch_first`."""
    for module in reversed(around):
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            return module.self_attn
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            return module
    return None


def _batch_axis(around: list[nn.Module]) -> int:
    declaring: Any = _declaring(around)
    return 0 if declaring is None or declaring.batch_first else 1


def _identity(x: Tensor) -> tuple[int, int]:
    """Return a key that is equal for views of one storage with the same stride between rows."""
    return x.untyped_storage()._cdata, x.stride(0)


def describe_pass(choice: Choice, module: nn.Module, args: tuple, kwargs: dict) -> Pass:
    """Return the pass of a call of the model, with the facts about its batch that the choice needs.

    Raises:
        AdapterStateError: The batch does not have the rows, or the tokens, that the choice is for.
    """
    if choice.unit == "batch":
        return Pass(choice)
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim > 0]
    main = [kwargs[name] for name in _MAIN_INPUTS if isinstance(kwargs.get(name), Tensor)]
    first = next(iter(main or tensors), None)
    if first is None:
        return Pass(choice)
    axis = _batch_axis([*_first_layers(module)])
    axis = axis if first.ndim > axis else 0
    batch = first.shape[axis]
    if choice.unit == "token":
        total = sum(choice.tokens)
        if first.ndim > 1 and first.shape[:2].numel() != total:
            raise AdapterStateError(
                f"per_token names {total} tokens, and {type(module).__name__} received an input of shape "
                f"{tuple(first.shape)}. Give one span for each stretch of its {first.shape[:2].numel()} tokens."
            )
    elif batch and batch not in choice.rows:
        raise AdapterStateError(
            f"per_sample names {len(choice.blends)} rows, and {type(module).__name__} received a batch of {batch}. "
            "Give one name (or None) for each row of the batch. If each row comes several times in a row, say "
            "per_sample(names, repeat=...)."
        )
    of_batch = [t for t in tensors if t.shape[0] == batch]
    return Pass(
        choice,
        batch=batch,
        lengths=frozenset(t.shape[1] for t in of_batch if t.ndim > 1),
        inputs=frozenset(map(_identity, of_batch)),
    )


def _first_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and its first children: a stack of PyTorch's layers has their layout."""
    yield module
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        yield module.layers[0]
    if isinstance(module, nn.Transformer):
        yield module.encoder.layers[0]  # type: ignore[union-attr, misc, index]

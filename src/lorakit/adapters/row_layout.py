"""Whether a layer sees whole rows of the batch in order, for a choice by row or by token.

A layer must get the rows, or the tokens, in its first axis. A shape alone does not prove it: a sequence-first input, a
table of positions or the tokens routed to an expert can have as many entries as the batch has rows. So the structure of
the model decides where it can, and other layers are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.choice import Choice
from lorakit.errors import AdapterStateError
from lorakit.models.architectures import architecture_of
from lorakit.models.direct_reads import never_calls
from lorakit.models.heads import input_embeddings, output_embeddings
from lorakit.models.layers import stacked_weights
from lorakit.models.tree import base_modules, parents, submodule, walk

_FLATTENING = ("opt",)
"""Architectures that pass all tokens of a batch in one axis to some layers."""

_READ_POSITIONS = {"deberta-v2": ("query_proj", "key_proj", "pos_query_proj", "pos_key_proj")}
"""Layers that architectures also call with a table of positions, whose length may equal that of the batch."""

_SEQUENCE_FIRST = "it is sequence-first: its rows are in the second axis (set batch_first=True)"


@dataclass
class RowLayout:
    """How one layer of a model receives the rows of a batch."""

    path: str
    """Path of the layer, for messages."""
    refused: str | None = None
    """Why the layer may see something else than the rows of the batch."""
    is_known: bool = False
    """Whether the layer is known to get (batch, length, ...): by its architecture, or by an input that showed it."""
    is_flattened: bool = False
    """Whether the architecture is known to pass (batch * length, ...) to it."""
    is_read_directly: bool = False
    """Whether the model reads the weight of this layer without calling it, or may do so."""

    def check(self, x: Tensor, choice: Choice, *, axes: int) -> None:
        """Check that a layer's input has the rows or tokens of a choice in its first axis, or its first axes.

        Args:
            x: Input of the layer.
            choice: The choice, by row or by token.
            axes: Number of leading axes that are batch or length.

        Raises:
            AdapterStateError: The layer may see something else than whole rows in order.
        """
        if self.refused is not None:
            raise self.refuse(self.refused)
        if isinstance(x, nn.Parameter):
            raise self.refuse("its input is a parameter")
        if not all(isinstance(n, int) for n in x.shape[:axes]):
            raise self.refuse("it is traced, or exported with dynamic_shapes, so its rows can vary")
        shape, size = tuple(x.shape), x.shape[0] if axes else 1
        if choice.unit == "token":
            if x.shape[:axes].numel() != sum(choice.tokens):
                raise self.refuse(
                    f"its input of shape {shape} does not hold {sum(choice.tokens)} tokens"
                )
            return
        is_flat = self.is_flattened and axes == 1 and size % len(choice.blends) == 0
        if size not in choice.rows and not is_flat:
            rows = " or ".join(map(str, choice.rows))
            raise self.refuse(f"its input of shape {shape} does not hold {rows} rows")
        if axes > 1 and not self.is_known:
            if x.shape[0] == x.shape[1] > 1:
                raise self.refuse(
                    f"its input of shape {shape} has as many rows as tokens, so it may be sequence-first"
                )
            self.is_known = True

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
        declared = (_batch_first(module) for module in reversed(around))
        batch_first = next((first for first in declared if first is not None), None)
        is_known = architecture_of(config) is not None or batch_first is True
        is_table = isinstance(layer, nn.Embedding) and id(layer) not in inputs
        refused = _SEQUENCE_FIRST if batch_first is False else None
        if is_table and refused is None:
            refused = "its input may be positions (a model names its table of tokens by get_input_embeddings)"
        layouts[path] = RowLayout(
            path,
            refused=refused or _why_refused(model, path, layer, config),
            is_known=is_known,
            is_flattened=getattr(config, "model_type", None) in _FLATTENING
            or any(id(module) in with_experts for module in around),
            is_read_directly=(is_table and not is_known)
            or never_calls(around[-2], path.rpartition(".")[2]),
        )
    return layouts


def _takes_routes(layer: nn.Module) -> bool:
    """Whether a layer is experts that get all tokens in one axis and the experts of each.

    These attributes are of transformers' interface for experts, whose functions have such arguments.
    """
    return hasattr(layer, "has_gate") and hasattr(layer, "is_transposed")


def _batch_first(module: nn.Module) -> bool | None:
    """Return whether a module of PyTorch gets rows in the first axis; None if it does not declare it."""
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        module = module.self_attn
    return module.batch_first if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) else None


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

"""Where the rows of a batch are in the input of a layer, for a choice by row or by token.

A layer must see whole rows in order. A shape alone does not prove it: a sequence-first input, a table of relative
positions or the tokens routed to an expert can have as many entries as the batch has rows. So the structure of the
model decides where it can, and the layer is refused by name where it cannot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lorakit.adapters.activation import Pass
from lorakit.adapters.choice import Choice
from lorakit.errors import AdapterStateError
from lorakit.models.architectures import architecture_of
from lorakit.models.layers import parents, walk

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
    is_table: bool = False
    """Whether the layer is an embedding that may look up something else than the model's input, such as positions."""
    routed_by: str | None = None
    """Path of the module that passes the layer tokens of its own choice (an expert), if any."""

    def entries(self, x: Tensor, of_pass: Pass, *, axes: int) -> int:
        """Return the length of the axis of rows, of which each row has an equal stretch; or the number of tokens.

        Args:
            x: Input of the layer.
            of_pass: The forward pass, whose choice is by row or by token.
            axes: Number of leading axes that are batch or length.

        Raises:
            AdapterStateError: The layer may see something else than whole rows in order.
        """
        choice = of_pass.choice
        if choice.whole is not None and of_pass.batch is not None:
            return (
                of_pass.batch
            )  # every row has the same adapters, and the batch was checked when it entered
        if self.routed_by is not None:
            raise self.refuse(f"'{self.routed_by}' passes it tokens of its own choice")
        if choice.unit == "token":
            return self._check_tokens(x, choice, axes)
        size = x.shape[self.axis] if axes > self.axis else -1
        batches = (of_pass.batch,) if of_pass.batch is not None else choice.rows
        allowed = set(batches)
        if axes == 1 and self.is_known:  # (batch * length, ...)
            allowed |= {batch * length for batch in batches for length in of_pass.lengths}
        if size not in allowed:
            rows = " or ".join(map(str, batches))
            raise self.refuse(f"its input of shape {tuple(x.shape)} does not hold {rows} rows")
        if self.is_table and not _entered_the_model(x, of_pass):
            raise self.refuse("its input is not an input of the model")
        ambiguous = axes > 1 and x.shape[0] == x.shape[1] > 1
        if ambiguous and not self.is_known:
            raise self.refuse(
                f"its input of shape {tuple(x.shape)} has as many rows as tokens, so it may be sequence-first"
            )
        return size

    def _check_tokens(self, x: Tensor, choice: Choice, axes: int) -> int:
        total = sum(choice.tokens)
        if self.axis != 0:
            raise self.refuse("it is sequence-first")
        if x.shape[:axes].numel() != total:
            raise self.refuse(f"its input of shape {tuple(x.shape)} does not hold {total} tokens")
        return total

    def refuse(self, reason: str) -> AdapterStateError:
        """Return the error for a layer that cannot use different adapters in one batch."""
        return AdapterStateError(
            f"'{self.path}' cannot use different adapters in one batch: {reason}. Run one batch for each adapter, or "
            "adapt other layers."
        )


def row_layouts(model: nn.Module, paths: list[str]) -> dict[str, RowLayout]:
    """Return the layout of each layer at `paths`."""
    configs = {at.path: at.config for at in walk(model)}
    inputs = {id(table) for table in _input_tables(model)}
    layouts = {}
    for path in paths:
        layer = model.get_submodule(path)
        around = [model, *(model.get_submodule(parent) for parent in parents(path)), layer]
        layouts[path] = RowLayout(
            path,
            axis=_batch_axis(around),
            is_known=architecture_of(configs.get(path)) is not None or _declares_axis(around),
            is_table=isinstance(layer, nn.Embedding) and id(layer) not in inputs,
            routed_by=_router(path),
        )
    return layouts


def _input_tables(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the tables of the model's input tokens, of every part."""
    for module in model.modules():
        try:
            table = getattr(module, "get_input_embeddings", lambda: None)()
        except (AttributeError, NotImplementedError):
            continue
        if table is not None:
            yield table


def _router(path: str) -> str | None:
    """Return the path of the module that holds the layer's experts, if it is inside one."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.startswith("expert"):
            return ".".join(parts[:i]) or part
    return None


def _declaring(around: list[nn.Module]) -> nn.Module | None:
    """Return the innermost module of PyTorch around a layer that declares `batch_first`."""
    for module in reversed(around):
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            return module.self_attn
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            return module
    return None


def _declares_axis(around: list[nn.Module]) -> bool:
    return _declaring(around) is not None


def _batch_axis(around: list[nn.Module]) -> int:
    declaring: Any = _declaring(around)
    return 0 if declaring is None or declaring.batch_first else 1


def _entered_the_model(x: Tensor, of_pass: Pass) -> bool:
    return x.ndim > 0 and (x.data_ptr(), x.stride(0)) in of_pass.inputs


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
        inputs=frozenset((t.data_ptr(), t.stride(0)) for t in of_batch),
    )


def _first_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and its first children: a stack of PyTorch's layers has their layout."""
    yield module
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        yield module.layers[0]
    if isinstance(module, nn.Transformer):
        yield module.encoder.layers[0]  # type: ignore[union-attr, misc, index]

"""Models without weights, built from the configuration of a base."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import moe

from lorakit.methods.lora import layer as lora_layer
from lorakit.models.base_config import BaseConfig
from lorakit.models.base_shape import Shape, build_model
from lorakit.models.collection import no_collection
from lorakit.models.dtypes import QUANTISATIONS
from lorakit.models.model_classes import ModelHead
from lorakit.models.quantising import projection_paths
from lorakit.ops import linear_cross_entropy
from lorakit.ops.autocast import no_autocast

_CPU = torch.device("cpu")
_ATEN = torch.ops.aten
_FILLS = (
    _ATEN.fill_.Scalar,
    _ATEN.normal_.default,
    _ATEN.uniform_.default,
    _ATEN.zero_.default,
)


_PATCHED = threading.RLock()
"""Held while functions and limits are replaced, so that two plans do not restore each other's replacements."""


class _FakeTensorMode(FakeTensorMode):
    """Skip the operations that fill a fake tensor: most of those that build a model."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS and isinstance(args[0], FakeTensor):
            return args[0]
        return super().__torch_dispatch__(func, types, args, kwargs)


def new_mode() -> FakeTensorMode:
    """Return a mode that creates fake tensors. Use a single one per model."""
    return _FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def planning(fake: FakeTensorMode, device: torch.device = _CPU) -> Iterator[None]:
    """Create fake tensors inside this block, and replace functions whose fake kernels are missing or differ.

    The garbage collector pauses: it would search hundreds of thousands of live objects again and again. Blocks of
    several threads wait for each other.

    Args:
        fake: The mode of the tensors.
        device: Device of the planned run. Fake tensors are on the CPU, so for another device this block also raises
            the limits that keep a CPU's computation in its cache. Results do not depend on them.
    """
    with _PATCHED, no_collection(), fake, ExitStack() as patches:
        if device.type != "cpu":
            uncached = mock.patch.object(linear_cross_entropy, "CACHE_BYTES", sys.maxsize)
            patches.enter_context(uncached)
            large = mock.patch.object(lora_layer, "_CHUNK", lora_layer._LARGE_CHUNK)
            patches.enter_context(large)
        patches.enter_context(mock.patch.object(moe, "_grouped_mm", _one_product))
        yield


def build(
    shape: Shape, base: BaseConfig, task: ModelHead, labels: int, *, dtype: torch.dtype
) -> PreTrainedModel:
    """Return the model in `dtype` with a head for `task`. Call it inside :func:`planning`.

    Raises:
        BaseModelError: The architecture has no head for the task.
    """
    config = type(shape.config).from_dict(shape.config.to_dict())
    if task == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    elif labels:
        config.num_labels = labels
    model = build_model(dataclasses.replace(shape, config=config), task, dtype=dtype)
    # Classifiers search for the last token before the padding.
    if config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = 0
    stored = stored_quantisation(config)
    if kind := base.dtype if base.dtype in QUANTISATIONS else stored.kind:
        for path, *_ in projection_paths(model):
            if not stored.skips(path):
                _quantise(model.get_submodule(path), kind)
    return model


@dataclass(frozen=True)
class StoredQuantisation:
    """How the weights of a checkpoint are quantised."""

    kind: str = ""
    """The kind of the planned layers, nf4 or int8; "" for unquantised ones."""
    skipped: tuple[str, ...] = ()
    """Names of modules whose weights are not quantised, or parts of their paths."""
    note: str = ""
    """What the plan assumes instead of another quantisation, for the user."""

    def skips(self, path: str) -> bool:
        """Return whether the checkpoint has the layer at `path` unquantised."""
        return any(f".{name}." in f".{path}." for name in self.skipped)


def stored_quantisation(config: PretrainedConfig) -> StoredQuantisation:
    """Return how the checkpoint of a configuration is quantised."""
    settings = config.to_dict().get("quantization_config") or {}
    skipped = tuple(settings.get("llm_int8_skip_modules") or ())
    for name, kind in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
        if settings.get(name):
            return StoredQuantisation(kind, skipped)
    if not settings:
        return StoredQuantisation()
    method = settings.get("quant_method", "a method without a name")
    note = f"its checkpoint is quantised ({method}), but the plan assumes unquantised weights"
    return StoredQuantisation(note=note)


BYTES_PER_WEIGHT = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
"""nf4: half a byte, and a float32 scale per 64 weights. int8: a byte; the scales of rows are negligible."""


def base_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of a model without adapters, each counted once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    modules: list[Any] = list(model.modules())
    quantised = {id(m.weight): m.planned_dtype for m in modules if hasattr(m, "planned_dtype")}
    return sum(
        round(t.numel() * BYTES_PER_WEIGHT[quantised[key]]) if key in quantised else t.nbytes
        for key, t in tensors.items()
    )


def _quantise(layer: Any, kind: str) -> None:
    """Make a layer allocate memory like a quantised one, which dequantises its weight for each product."""
    layer.planned_dtype = kind
    layer.register_forward_pre_hook(_DequantisedWeight.allocate)
    layer.register_forward_hook(_DequantisedWeight.free)


class _DequantisedWeight:
    """The weight that a quantised layer dequantises and holds during its product."""

    weight: Tensor | None = None

    @classmethod
    def allocate(cls, layer: Any, _: Any) -> None:
        cls.weight = torch.empty_like(layer.weight)

    @classmethod
    def free(cls, layer: Any, _: Any, output: Tensor) -> None:
        cls.weight = None
        if output.requires_grad and output.grad_fn is not None:
            output.grad_fn.register_prehook(lambda _: cls.allocate(layer, None))
            output.grad_fn.register_hook(lambda *_: setattr(cls, "weight", None))


_grouped_products = moe._grouped_mm


def _one_product(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Multiply all tokens (n, in) by the first expert's weight.

    This costs the same work and memory as the grouped product, whose fake kernel supports bfloat16 only and whose work
    is not counted.
    """
    if not isinstance(input, FakeTensor):  # a real model, in another thread
        return _grouped_products(input, weight, offs)
    with no_autocast(input):
        return input.to(weight.dtype) @ weight[0]

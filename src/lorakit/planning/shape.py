"""Base models without weights, from a configuration file, a GGUF header, or the built-in GPT-3 175B."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, GPT2Config, PretrainedConfig, PreTrainedModel

from lorakit.errors import BaseModelError
from lorakit.models.base_config import BaseConfig
from lorakit.models.dtypes import QUANTISATIONS, compute_dtype
from lorakit.models.gguf import conversion_of
from lorakit.models.hub import locate_on_hub
from lorakit.models.loading import ModelHead, model_class
from lorakit.models.quantising import places_of_projections
from lorakit.models.sources import ModelSource, resolve

GPT3 = "gpt3-175b"
"""GPT-3 175B (Brown et al. 2020, table 2.1), whose weights are not public."""


@dataclass(frozen=True)
class Shape:
    """Name and configuration of a base model."""

    name: str
    note: str
    config: PretrainedConfig
    trust_remote_code: bool = False


def shape_of(base: BaseConfig) -> Shape:
    """Read the configuration of a base model, without its weights.

    Raises:
        BaseModelError: The model does not exist, or its configuration cannot be read.
    """
    if base.name.lower() == GPT3:
        note = (
            "GPT-3 175B, built into lorakit: 96 layers of width 12,288, 96 heads, 2,048 positions"
        )
        config = GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048)
        return Shape(GPT3, note, config)
    source = resolve(base.name, revision=base.revision)
    options: dict[str, Any] = {"trust_remote_code": base.trust_remote_code}
    location = source.path_or_id
    if source.kind == "hub":
        commit, reachable = locate_on_hub(source)
        options |= {"revision": commit, "local_files_only": not reachable}
    elif source.kind == "gguf":
        file = Path(location)
        folder = conversion_of(file)
        location = str(folder or file.parent)
        options = {} if folder else {"gguf_file": file.name}
    try:
        config = AutoConfig.from_pretrained(location, **options)
    # A configuration is untrusted input; its readers raise almost any exception.
    except Exception as error:
        raise BaseModelError(_refusal(source, error)) from error
    return Shape(source.name, source.note, config, base.trust_remote_code)


def _refusal(source: ModelSource, error: Exception) -> str:
    message = " ".join(str(error).split())
    if "trust_remote_code" in message:
        return (
            f"'{source.name}' needs Python code of its own. Read that code, and if you trust it, set "
            "base.trust_remote_code."
        )
    return (
        f"The configuration of '{source.name}' cannot be read ({type(error).__name__}: {message[:300]}). "
        "Download or copy it again, or update transformers."
    )


# --- the model ---------------------------------------------------------------------------------------


def new_mode() -> FakeTensorMode:
    """Return a mode that creates fake tensors. Use a single one per model."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def planning(fake: FakeTensorMode) -> Iterator[None]:
    """Create fake tensors, and run attention with the fused kernel, inside this block."""
    with fake, _FusedAttention():
        yield


def build(
    shape: Shape, base: BaseConfig, task: ModelHead, labels: int, *, device: torch.device
) -> PreTrainedModel:
    """Return the model with a head for `task`, as `load_base` does for `device`. Call it inside :func:`planning`.

    Raises:
        BaseModelError: The architecture has no head for the task.
    """
    config = type(shape.config).from_dict(shape.config.to_dict())
    if task == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    elif labels:
        config.num_labels = labels
    options = {"trust_remote_code": True} if shape.trust_remote_code else {}
    dtype = compute_dtype(base.dtype, device)
    try:
        model = model_class(task).from_config(config, dtype=dtype, **options)
    # Architectures raise almost any exception for an unsupported head or size.
    except Exception as error:
        message = " ".join(str(error).split())
        if message.startswith("Unrecognized configuration class"):
            message = f"transformers has no head for the task '{task}' on this architecture"
        raise BaseModelError(f"'{shape.name}' cannot be planned: {message[:300]}.") from error
    # Classifiers search for the last token before the padding.
    if config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = 0
    if base.dtype in QUANTISATIONS:
        for path, *_ in places_of_projections(model):
            _quantise(model.get_submodule(path), base.dtype)
    return model


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


class _FusedAttention(TorchFunctionMode):
    """Run attention with the flash kernel, which allocates no score matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, value = inputs["query"], inputs["key"], inputs["value"]
        group = query.shape[-3] // key.shape[-3]
        if group > 1:
            key, value = (x.repeat_interleave(group, -3) for x in (key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]

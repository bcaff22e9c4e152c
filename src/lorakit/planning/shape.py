"""A base model without its weights: from a configuration file, a GGUF header, or a description we bring."""

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
"""GPT-3 175B (Brown et al. 2020, table 2.1), whose weights are not public: as a shape it can be planned."""


@dataclass(frozen=True)
class Shape:
    """What is known of a base model without its weights."""

    name: str
    note: str
    config: PretrainedConfig
    trust_remote_code: bool = False


def shape_of(base: BaseConfig) -> Shape:
    """Read a base model's configuration, and nothing of its weights.

    Raises:
        BaseModelError: There is no such model, or its configuration cannot be read.
    """
    if base.name.lower() == GPT3:
        note = (
            "GPT-3 175B, described in lorakit: 96 layers of width 12,288, 96 heads, 2,048 positions"
        )
        return Shape(GPT3, note, _gpt3())
    source = resolve(base.name, revision=base.revision)
    options: dict[str, Any] = {"trust_remote_code": base.trust_remote_code}
    where = source.path_or_id
    if source.kind == "hub":
        commit, reachable = locate_on_hub(source)
        options |= {"revision": commit, "local_files_only": not reachable}
    elif source.kind == "gguf":
        where, options = _gguf(Path(where))
    try:
        config = AutoConfig.from_pretrained(where, **options)
    # A configuration is an outside input, and its readers raise nearly every kind of exception.
    except Exception as error:
        raise BaseModelError(_refusal(source, error)) from error
    return Shape(source.name, source.note, config, base.trust_remote_code)


def _gguf(file: Path) -> tuple[str, dict[str, Any]]:
    """Where the configuration of a GGUF file is: in what was converted before, else in its header."""
    folder = conversion_of(file)
    if folder is not None:
        return str(folder), {}
    return str(file.parent), {"gguf_file": file.name}


def _refusal(source: ModelSource, error: Exception) -> str:
    message = " ".join(str(error).split())
    if "trust_remote_code" in message:
        return (
            f"'{source.name}' brings Python code of its own. Read that code, and if you trust it, set "
            "base.trust_remote_code."
        )
    return f"The configuration of '{source.name}' cannot be read ({type(error).__name__}: {message[:300]})."


def _gpt3() -> GPT2Config:
    return GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048)


# --- the model ---------------------------------------------------------------------------------------


def new_mode() -> FakeTensorMode:
    """Return what makes tensors without memory; those of one model are made by one."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def planning(fake: FakeTensorMode) -> Iterator[None]:
    """Let every tensor made inside be one without memory."""
    with fake, _FusedAttention():
        yield


def build(
    shape: Shape, base: BaseConfig, task: ModelHead, labels: int, *, device: torch.device
) -> PreTrainedModel:
    """Return the model with a head for `task`, as `load_base` would for `device`, inside :func:`planning`.

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
    except (
        Exception
    ) as error:  # an architecture may raise anything for a head or a size that it has not
        message = " ".join(str(error).split())
        if message.startswith("Unrecognized configuration class"):
            message = f"transformers has no head for the task '{task}' on this architecture"
        raise BaseModelError(f"'{shape.name}' cannot be planned: {message[:300]}.") from error
    if (
        config.get_text_config().pad_token_id is None
    ):  # classifiers look for the last token before padding
        model.config.get_text_config().pad_token_id = 0
    if base.dtype in QUANTISATIONS:
        for path, *_ in places_of_projections(model):
            _quantise(model.get_submodule(path), base.dtype)
    return model


BYTES_PER_WEIGHT = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
"""nf4: half a byte, and a float32 scale for every 64. int8: a byte; the scale of a row is next to nothing."""


def base_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model that carries no adapter yet, each once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    modules: list[Any] = list(model.modules())
    kept = {id(m.weight): m.planned_dtype for m in modules if hasattr(m, "planned_dtype")}
    return sum(
        round(t.numel() * BYTES_PER_WEIGHT[kept[key]])
        if key in kept
        else t.numel() * t.element_size()
        for key, t in tensors.items()
    )


def _quantise(layer: Any, kind: str) -> None:
    """Let a layer compute as a quantised one: its weight is expanded for each product."""
    layer.planned_dtype = kind
    layer.register_forward_pre_hook(_Expanded.begin)
    layer.register_forward_hook(_Expanded.end)


class _Expanded:
    """The whole weight that a quantised layer holds for the length of its product."""

    held: Tensor | None = None

    @classmethod
    def begin(cls, layer: Any, _: Any) -> None:
        cls.held = torch.empty_like(layer.weight)

    @classmethod
    def end(cls, layer: Any, _: Any, output: Tensor) -> None:
        cls.held = None
        if output.requires_grad and output.grad_fn is not None:
            output.grad_fn.register_prehook(lambda _: cls.begin(layer, None))
            output.grad_fn.register_hook(lambda *_: setattr(cls, "held", None))


class _FusedAttention(TorchFunctionMode):
    """Attention by the kernel that never holds a row's pairs, as on a GPU and in long rows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        query, key, value = given["query"], given["key"], given["value"]
        if shared := query.shape[-3] // key.shape[-3] - 1:
            key = key.repeat_interleave(shared + 1, -3)
            value = value.repeat_interleave(shared + 1, -3)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]

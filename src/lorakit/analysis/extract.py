"""Extraction of an adapter from the difference of two full models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorakit.adapters import attach
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.installed import base_parameters
from lorakit.adapters.loading import load
from lorakit.adapters.ties import tied_names
from lorakit.analysis.base_weights import load_float32
from lorakit.analysis.compress import check_target, decompose, fit
from lorakit.analysis.deltas import weight_matrix, weight_name, weight_parts
from lorakit.analysis.derived import Derived, LayerResult, derive
from lorakit.analysis.tuned import WholeModel, open_tuned
from lorakit.compute.agreement import agreement, logits_of_prompts
from lorakit.compute.merge_verdict import IN_FLOAT32, WHOLE
from lorakit.errors import AdapterFileError, BaseModelError, LorakitError
from lorakit.formatting import percentage
from lorakit.methods.lora import LoRA
from lorakit.methods.method import with_head
from lorakit.models.base_config import BaseConfig, as_base_config
from lorakit.models.dtypes import dtype_name
from lorakit.models.heads import output_embeddings
from lorakit.models.model_classes import head_of_class
from lorakit.models.tokenizer import tokenizer_digest
from lorakit.ops.autocast import wide_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def extract(
    base: Tensor, tuned: Tensor, *, rank: int | None = None, energy: float | None = None
) -> tuple[Tensor, Tensor, float]:
    """Return the best low-rank approximation ``B A`` of ``tuned - base``.

    Args:
        base: Base weight, (out, in).
        tuned: Fine-tuned weight, (out, in).
        rank: Maximum rank of the factors. Give rank or energy.
        energy: Minimum share of the difference's squared norm to keep.

    Returns:
        A (k, in), B (out, k), and the relative error in the Frobenius norm.

    Raises:
        ConfigurationError: Not exactly one of rank and energy is given, or it is out of range.
    """
    check_target(rank, energy)
    return decompose(_difference(base, tuned), rank).truncate(rank, energy)


@torch.no_grad()
def extract_adapter(
    base: BaseConfig | str,
    tuned: str | Path,
    *,
    targets: tuple[str, ...] | list[str] | str = "all-linear",
    train_modules: tuple[str, ...] | list[str] | str = (),
    rank: int | None = None,
    energy: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Derived:
    """Return an adapter that approximates the difference between a base model and a fine-tuned model.

    Args:
        base: The base model, or its name. It is always read in float32, because rounding could exceed the difference.
        tuned: The fine-tuned model: a folder, a hub id, or a folder of lorakit's full fine-tuning.
        targets: Layers to factor: roles, names or regular expressions.
        train_modules: Name suffixes of modules to copy in full from the fine-tuned model, such as a new head.
        rank: Maximum rank of the factors. Give rank or energy.
        energy: Minimum share of each layer's squared difference to keep.
        progress: Called with what is done next, such as "reading the base" or "layer 3 of 210".

    Returns:
        The adapter. Its notices name what else differs between the models: parameters and the configuration. Its
        agreement compares the base with the adapter and the fine-tuned model as it is. If `train_modules` names a part
        of a head that the base lacks, the adapter holds all modules that are new.

    Raises:
        BaseModelError: A model cannot be read, holds NaN or infinity, or lacks a targeted weight or has another shape.
        AdapterFileError: The models do not differ on the targeted layers, or `tuned` is an adapter already.
        TargetError: A target names no layer, or an entry of `train_modules` no module.
        ConfigurationError: Not exactly one of rank and energy is given, or it is out of range.
        WrongBaseError: lorakit's full fine-tuning started from another base.
    """
    check_target(rank, energy)
    # A template of the targeted layers with their kinds and slices; `fit` sets the ranks.
    method = LoRA(rank=1, alpha=1, targets=targets, train_modules=train_modules)
    base = as_base_config(base)
    show = progress or (lambda _: None)
    show("reading the base")
    tuned_model = open_tuned(base, tuned, method.train_modules)
    loaded = load_float32(base, *tuned_model.head)
    model, name_of_base = loaded.model, loaded.source.name
    if tuned_model.head[0] is not None:  # new modules that the adapter lacks would be random
        method = with_head(method, model, [], loaded.new_weights)
    handle = attach(model, method, name="extracted")
    template = handle.stored()
    handle.detach()
    targeted = [weight_name(path, layer) for path, layer in template.layers.items()]
    weights = tuned_model.weights(loaded, [*targeted, *template.trained])
    tokenizer, notices = None, []
    if isinstance(tuned_model, WholeModel):
        tokenizer, notices = tuned_model.tokenizer(loaded)
    notices += tuned_model.differences(loaded, weights)
    for name, tensor in template.trained.items():
        weight = _tuned_weight(weights, name, tuned)
        _require_one_shape(tensor, weight)
        template.trained[name] = weight.to(tensor.dtype).clone()
    layers, results, unchanged = {}, {}, []
    rounding: dict[str, float] = {}
    for number, (path, layer) in enumerate(template.layers.items(), start=1):
        show(f"layer {number} of {len(template.layers)}")
        name = weight_name(path, layer)
        weight = _tuned_weight(weights, name, tuned)
        difference = _difference(model.get_parameter(name), weight)
        if not difference.isfinite().all():
            damaged = name_of_base if weight.isfinite().all() else tuned
            raise BaseModelError(
                f"The weight '{name}' of '{damaged}' holds NaN or infinity, so it has no difference to extract. "
                "Download or save that model again."
            )
        parts = weight_parts(path, layer, difference)
        if not any(part.any() for part in parts):
            unchanged.append(path)
            continue
        changes = [decompose(part, rank) for part in parts]
        layers[path], results[path] = fit(layer, changes, rank=rank, energy=energy)
        rounding[path] = sum(map(_rounding_error, weight_parts(path, layer, weight)))
    if not layers:
        raise AdapterFileError(
            f"'{name_of_base}' and '{tuned}' are equal on all {len(unchanged)} layers that {targets} names, so "
            "there is nothing to extract. Set other targets or another model."
        )
    adapter = derive(template, layers)
    if tokenizer is not None and adapter.base is not None:
        record = dataclasses.replace(adapter.base, tokenizer=tokenizer_digest(tokenizer))
        adapter = dataclasses.replace(adapter, base=record)
    if unchanged:
        notices.append(f"{len(unchanged)} targeted layers are the same in both models.")
    notices += _rounding_notice(weights[targeted[0]].dtype, rounding, results)
    notices += _other_differences(_not_covered(model, weights, template), results)
    show("comparing the predictions")
    found, reader, outputs = None, loaded.tokenizer, _outputs(model)
    if reader is not None and outputs is not None:
        try:
            whole = isinstance(tuned_model, WholeModel)
            if whole and _outputs(tuned_model.empty) != outputs:
                raise BaseModelError("The fine-tuned model has another head or vocabulary.")
            handle = load(model, adapter, name="extracted")
            adapted = logits_of_prompts(model, reader)
            handle.detach()
            del loaded, model, handle  # two models may not fit into the memory
            found = agreement(logits_of_prompts(tuned_model.load(), reader), adapted)
        except Exception as error:  # almost any is possible, and the adapter is worth hours
            kind = "" if isinstance(error, LorakitError) else f"{type(error).__name__}: "
            notices.append(f"The predictions were not compared: {kind}{error}")
    return Derived(
        adapter=adapter, layers=results, notices=notices, agreement=found, tokenizer=tokenizer
    )


def _tuned_weight(weights: Mapping[str, Tensor], name: str, tuned: str | Path) -> Tensor:
    if name not in weights:
        raise BaseModelError(
            f"'{tuned}' has no weight '{name}', but the base does. Give two models of one architecture."
        )
    return weights[name]


def _difference(base: Tensor, tuned: Tensor) -> Tensor:
    _require_one_shape(base, tuned)
    dtype = wide_dtype(base, tuned)
    return tuned.detach().to("cpu", dtype) - base.detach().to("cpu", dtype)


def _require_one_shape(base: Tensor, tuned: Tensor) -> None:
    if base.shape != tuned.shape:
        raise BaseModelError(
            f"A weight has shape {tuple(base.shape)} in the base and {tuple(tuned.shape)} in the fine-tuned "
            "model: the models have different sizes. Give two models of one size, or leave the layer out of targets "
            "and train_modules."
        )


def _outputs(model: PreTrainedModel) -> tuple[str, int | None] | None:
    """Return the head of a model and its number of tokens or labels; None if it predicts nothing."""
    config = model.config
    head = head_of_class(type(model).__name__, is_encoder_decoder=config.is_encoder_decoder)
    return head and (head, getattr(output_embeddings(model), "out_features", config.num_labels))


def _rounding_error(weight: Tensor) -> float:
    """Return the expected squared norm of the error that rounding to the weight's dtype makes; 0 in float32.

    Errors are uniform within half a spacing, so an entry's is spacing^2 / 12 on average.
    """
    if torch.finfo(weight.dtype).eps <= torch.finfo(torch.float32).eps:
        return 0.0
    _, exponent = torch.frexp(weight.float())
    spacing = torch.finfo(weight.dtype).eps * torch.exp2((exponent - 1).double())
    return float(spacing[weight != 0].square().sum()) / 12


def _rounding_notice(
    dtype: torch.dtype, rounding: Mapping[str, float], results: Mapping[str, LayerResult]
) -> list[str]:
    """Return a sentence if rounding of the fine-tuned weights makes up much of what the adapter leaves out."""
    total = sum(layer.norm**2 for layer in results.values())
    left_out = sum(layer.residual**2 for layer in results.values())
    # An update below the spacing is lost as a whole, which is less than the expected error.
    rounded = sum(min(rounding[path], layer.residual**2) for path, layer in results.items())
    if rounded < (1 - WHOLE) * total or rounded < left_out / 2:
        return []
    return [
        f"The adapter leaves out {percentage(left_out, total)} of the squared difference on its layers, mostly because "
        f"the fine-tuned model is rounded to {dtype_name(dtype)}. Save it in float32 and extract again; for a merged "
        f"model: lorakit merge ADAPTER OUTPUT {IN_FLOAT32}."
    ]


def _not_covered(
    model: nn.Module, weights: Mapping[str, Tensor], template: StoredAdapter
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, base and fine-tuned tensor of the parameters, and rows of them, that the adapter does not change."""
    covered = {weight_name(path, layer): (path, layer) for path, layer in template.layers.items()}
    parameters = dict(base_parameters(model))
    for first, *others in tied_names(model):
        # A layer changes a tied tensor under its own name only.
        untied = [name for name in others if first in covered or _differ(weights, first, name)]
        parameters |= dict.fromkeys(untied, parameters[first])
    for name, parameter in parameters.items():
        if name in template.trained or name not in weights:
            continue
        if name not in covered:
            yield name, parameter, weights[name]
            continue
        path, layer = covered[name]
        if layer.slices:
            W, tuned = (weight_matrix(path, layer, W.detach()) for W in (parameter, weights[name]))
            others = torch.ones(len(W), dtype=torch.bool).index_fill(0, layer.form.rows(), False)
            yield f"{name} outside the targeted rows", W[others], tuned[others]


def _differ(weights: Mapping[str, Tensor], one: str, other: str) -> bool:
    return one in weights and other in weights and not torch.equal(weights[one], weights[other])


def _other_differences(
    tensors: Iterable[tuple[str, Tensor, Tensor]], results: Mapping[str, LayerResult]
) -> list[str]:
    """Return sentences about the tensors that differ and are not in the adapter."""
    changed: dict[str, float] = {}
    rounded: list[str] = []
    resized: list[str] = []
    for name, parameter, tuned in tensors:
        base_shape, tuned_shape = tuple(parameter.shape), tuple(tuned.shape)
        if base_shape != tuned_shape:
            resized.append(f"'{name}' is {base_shape} in the base and {tuned_shape} after tuning")
            continue
        if torch.equal(parameter.to(tuned.dtype), tuned):
            if parameter.dtype != tuned.dtype and _difference(parameter, tuned).any():
                rounded.append(dtype_name(tuned.dtype))
            continue
        changed[name] = float(torch.linalg.vector_norm(_difference(parameter, tuned)))
    notices = []
    if rounded:
        notices.append(f"{len(rounded)} other parameters differ only by rounding to {rounded[0]}.")
    if changed:
        extracted = math.hypot(*(math.sqrt(r.norm**2 - r.residual**2) for r in results.values()))
        total = math.hypot(*(r.norm for r in results.values()), *changed.values())
        largest = max(changed, key=lambda name: changed[name])
        notices.append(
            f"{len(changed)} other parameters differ but are not in the adapter, '{largest}' most. The adapter holds "
            f"{percentage((extracted / total) ** 2)} of the squared difference. To include them, add targets or "
            "train_modules."
        )
    if resized:
        notices.append(
            f"{len(resized)} other parameters differ in shape and are not in the adapter: {'; '.join(resized)}."
        )
    return notices

"""Extraction of an adapter from the difference of two full models."""

from __future__ import annotations

import dataclasses
import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit.adapters import attach, formats
from lorakit.adapters.export import tied_names
from lorakit.adapters.formats import lorakit_json
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.installed import base_parameters
from lorakit.adapters.loading import put_on
from lorakit.analysis.base_weights import load_float32, read_weights
from lorakit.analysis.compress import check_target, decompose, fit
from lorakit.analysis.deltas import weight_matrix, weight_name, weight_parts
from lorakit.analysis.derived import Derived, LayerResult, derive
from lorakit.compute.agreement import Agreement, agreement, logits_of_prompts
from lorakit.compute.merge_verdict import IN_FLOAT32, WHOLE
from lorakit.errors import AdapterFileError, BaseModelError
from lorakit.formatting import percentage
from lorakit.methods.lora import LoRA
from lorakit.models.base_config import BaseConfig, as_base_config
from lorakit.models.dtypes import dtype_name
from lorakit.models.loading import Base
from lorakit.models.model_classes import head_of_class
from lorakit.ops.autocast import wide_dtype


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
        The adapter. Its notices name the other parameters that differ between the models.

    Raises:
        BaseModelError: A model cannot be read, or their architectures differ.
        AdapterFileError: The models do not differ on the targeted layers.
        TargetError: A target names no layer.
        ConfigurationError: Not exactly one of rank and energy is given, or it is out of range.
    """
    check_target(rank, energy)
    base = as_base_config(base)
    show = progress or (lambda _: None)
    show("reading the base")
    loaded = load_float32(base)
    model = loaded.model
    # A template of the targeted layers with their kinds and slices; `fit` sets the ranks.
    method = LoRA(rank=1, alpha=1, targets=targets, train_modules=train_modules)
    handle = attach(model, method, name="extracted")
    template = handle.stored()
    handle.detach()
    targeted = [weight_name(path, layer) for path, layer in template.layers.items()]
    weights, notices = _tuned_weights(model, base, tuned, targeted)
    layers, results, unchanged = {}, {}, []
    rounding: dict[str, float] = {}
    for number, (path, layer) in enumerate(template.layers.items(), start=1):
        show(f"layer {number} of {len(template.layers)}")
        name = weight_name(path, layer)
        weight = _tuned_weight(weights, name, tuned)
        difference = _difference(model.get_parameter(name), weight)
        parts = weight_parts(path, layer, difference)
        if not any(part.any() for part in parts):
            unchanged.append(path)
            continue
        changes = [decompose(part, rank) for part in parts]
        layers[path], results[path] = fit(layer, changes, rank=rank, energy=energy)
        rounding[path] = sum(map(_rounding_error, weight_parts(path, layer, weight)))
    if not layers:
        raise AdapterFileError(
            f"'{loaded.source.name}' and '{tuned}' are equal on all {len(unchanged)} layers that {targets} names, so "
            "there is nothing to extract. Set other targets or another model."
        )
    for name, tensor in template.trained.items():
        template.trained[name] = _tuned_weight(weights, name, tuned).to(tensor.dtype).clone()
    adapter = derive(template, layers)
    if unchanged:
        notices.append(f"{len(unchanged)} targeted layers are the same in both models.")
    notices += _rounding_notice(weights[targeted[0]].dtype, rounding, results)
    untied = _untied(model, weights)
    notices += _other_differences(_not_covered(model, weights, template, untied), results)
    notices += [
        f"'{name}' is tied to '{first}' in the base but not after tuning, so the predictions were not compared."
        for name, first in untied.items()
    ]
    show("comparing the predictions")
    found = None if untied else _agreement(loaded, adapter, weights)
    return Derived(adapter=adapter, layers=results, notices=notices, agreement=found)


def _tuned_weights(
    model: nn.Module, base: BaseConfig, tuned: str | Path, targeted: Sequence[str]
) -> tuple[Mapping[str, Tensor], list[str]]:
    """Return the weights of a fine-tuned model, and notices. Weights that lorakit did not train come from the base."""
    if not (Path(tuned) / lorakit_json.NAME).is_file():
        source = dataclasses.replace(base, name=str(tuned), revision=None)
        return read_weights(source, targeted), []
    stored = formats.read(tuned)
    if stored.layers or stored.modules:
        raise AdapterFileError(
            f"'{tuned}' is an adapter already ({type(stored.method).__name__}); a fully fine-tuned model was expected. "
            "lorakit compress changes the rank of an adapter."
        )
    notices = []
    if stored.base is not None:
        live = formats.base_record(model, exclude=tuple(stored.trained))
        notices += formats.compare(stored.base, live)
    if all(name in stored.trained for name, _ in base_parameters(model)):
        notices.append(
            "All weights were trained, so whether training started from this base cannot be checked."
        )
    return ChainMap(stored.trained, dict(model.named_parameters())), notices


def _tuned_weight(weights: Mapping[str, Tensor], name: str, tuned: str | Path) -> Tensor:
    if name not in weights:
        raise BaseModelError(
            f"'{tuned}' has no weight '{name}', but the base does. Give two models of one architecture."
        )
    return weights[name]


def _difference(base: Tensor, tuned: Tensor) -> Tensor:
    if base.shape != tuned.shape:
        raise BaseModelError(
            f"A weight has shape {tuple(base.shape)} in the base and {tuple(tuned.shape)} in the fine-tuned "
            "model: the models have different sizes. Give two models of one size."
        )
    dtype = wide_dtype(base, tuned)
    return tuned.detach().to("cpu", dtype) - base.detach().to("cpu", dtype)


def _agreement(
    loaded: Base, adapter: StoredAdapter, weights: Mapping[str, Tensor]
) -> Agreement | None:
    """Compare base and adapter with the fine-tuned model, whose weights replace those of `loaded`.

    None if the models have no head or tokenizer, or the fine-tuned weights do not fit the base.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    is_pair = model.config.is_encoder_decoder
    head = head_of_class(type(model).__name__, is_encoder_decoder=is_pair)
    if tokenizer is None or head is None:
        return None
    own = dict(model.named_parameters(remove_duplicate=False))
    if any(name in weights and weights[name].shape != own[name].shape for name in own):
        return None
    handle = put_on(model, adapter, name="extracted", trainable=False)
    adapted = logits_of_prompts(model, tokenizer)
    handle.detach()
    for name, parameter in own.items():
        if name in weights:
            parameter.copy_(weights[name])
    return agreement(logits_of_prompts(model, tokenizer), adapted)


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
    model: nn.Module,
    weights: Mapping[str, Tensor],
    template: StoredAdapter,
    untied: Mapping[str, str],
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, base and fine-tuned tensor of the parameters, and rows of them, that the adapter does not change."""
    covered = {weight_name(path, layer): (path, layer) for path, layer in template.layers.items()}
    parameters = dict(base_parameters(model))
    parameters |= {name: parameters[first] for name, first in untied.items()}
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


def _untied(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names that share another name's tensor in the base but not in the fine-tuned model, with that name."""
    return {
        name: first
        for first, *others in tied_names(model)
        for name in others
        if first in weights and name in weights and not torch.equal(weights[first], weights[name])
    }


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

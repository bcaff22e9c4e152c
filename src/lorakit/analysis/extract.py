"""An adapter from the difference of two full models."""

from __future__ import annotations

import dataclasses
import math
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit.adapters import attach, formats
from lorakit.adapters.formats import lorakit_json
from lorakit.adapters.installed import base_parameters
from lorakit.analysis.base_weights import config_of, read_weights, task_of_class
from lorakit.analysis.compress import check_target, decompose, fit
from lorakit.analysis.deltas import weight_name, weight_parts
from lorakit.analysis.derived import Derived, LayerResult, derive
from lorakit.errors import AdapterFileError, BaseModelError
from lorakit.methods.lora import LoRA
from lorakit.models.base_config import BaseConfig
from lorakit.models.loading import load_base


def extract(
    base: Tensor, tuned: Tensor, *, rank: int | None = None, energy: float | None = None
) -> tuple[Tensor, Tensor, float]:
    """The best factors ``B A`` of ``tuned - base``.

    Args:
        base: The base's weight, (out, in).
        tuned: The fine-tuned weight, (out, in).
        rank: The rank of the factors; one of the two is given.
        energy: The share of the difference's squared norm to keep at least.

    Returns:
        A (k, in), B (out, k), and the error: the Frobenius norm of what they leave out, as a share of the
        difference's.

    Raises:
        ConfigurationError: Not exactly one of rank and energy is given, or it is out of range.
    """
    check_target(rank, energy)
    found = decompose(_difference(base, tuned), rank)
    k = found.rank_for(energy) if energy is not None else min(rank or 1, len(found.S))
    error = found.residual(k) / found.norm if found.norm else 0.0
    return *found.factors(k), error


def extract_adapter(
    base: BaseConfig,
    tuned: str | Path,
    *,
    targets: tuple[str, ...] | str = "all-linear",
    train_modules: tuple[str, ...] | str = (),
    rank: int | None = None,
    energy: float | None = None,
) -> Derived:
    """An adapter that turns a base model into (nearly) a fine-tuned one.

    Args:
        base: The base model. It is read in float32, whatever its `dtype` says: rounding would drown the difference.
        tuned: The fine-tuned model: a folder, a hub id, or a folder of lorakit's full fine-tuning.
        targets: The layers whose difference becomes factors; roles, names or regular expressions.
        train_modules: Modules to store as they are in the fine-tuned model, such as a new head (name suffixes).
        rank: The rank of the factors; one of the two is given.
        energy: The share of each layer's squared difference to keep at least.

    Returns:
        The adapter. Its notices name what else differs between the models and is not in it.

    Raises:
        BaseModelError: A model cannot be read, or they are not of one architecture.
        AdapterFileError: The two do not differ on the chosen layers.
        TargetError: A target names no layer.
        ConfigurationError: Not exactly one of rank and energy is given, or it is out of range.
    """
    check_target(rank, energy)
    loaded = load_base(
        base.name,
        task=task_of_class((config_of(base).architectures or [""])[0]),
        dtype="float32",
        revision=base.revision,
        trust_remote_code=base.trust_remote_code,
    )
    model = loaded.model
    weights, notices = _tuned_weights(model, base, tuned)
    # The pattern: which layers, of which kinds and slices. Its rank is of no account.
    method = LoRA(rank=1, alpha=1, targets=targets, train_modules=train_modules)
    handle = attach(model, method, name="extracted")
    pattern = handle.stored()
    layers, results, unchanged = {}, {}, []
    for path, layer in pattern.layers.items():
        name = weight_name(path, layer)
        difference = _difference(_base(model, name), _of(weights, name, tuned))
        if not difference.any():
            unchanged.append(path)
            continue
        changes = [decompose(part, rank) for part in weight_parts(path, layer, difference)]
        layers[path], results[path] = fit(layer, changes, rank=rank, energy=energy)
    if not layers:
        raise AdapterFileError(
            f"'{loaded.source.name}' and '{tuned}' are the same on all {len(unchanged)} layers that "
            f"{targets} names: there is nothing to extract."
        )
    for name in pattern.trained:
        pattern.trained[name] = _of(weights, name, tuned).to(pattern.trained[name].dtype).clone()
    adapter = derive(pattern, layers)
    if unchanged:
        notices.append(f"{len(unchanged)} targeted layers are the same in both models.")
    covered = {weight_name(path, layer) for path, layer in pattern.layers.items()} | {
        *pattern.trained
    }
    notices += _left_out(model, weights, covered, results)
    return Derived(adapter=adapter, layers=results, notices=notices)


def _tuned_weights(
    model: nn.Module, base: BaseConfig, tuned: str | Path
) -> tuple[Mapping[str, Tensor], list[str]]:
    """The weights of a fine-tuned model, or of the base with those of lorakit's full fine-tuning; notices."""
    if not (Path(tuned) / lorakit_json.NAME).is_file():
        return read_weights(dataclasses.replace(base, name=str(tuned), revision=None)), []
    stored = formats.read(tuned)
    if stored.layers or stored.modules:
        raise AdapterFileError(
            f"'{tuned}' is an adapter already ({type(stored.method).__name__}). lorakit compress changes its rank."
        )
    notices = []
    if stored.base is not None:
        live = formats.base_record(model, exclude=tuple(stored.trained))
        notices += formats.compare(stored.base, live)
    if all(name in stored.trained for name, _ in base_parameters(model)):
        notices.append(
            "All weights were trained, so that nothing in it tells whether this is the base they started from."
        )
    return ChainMap(stored.trained, dict(model.named_parameters())), notices


def _base(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(name).detach()


def _of(weights: Mapping[str, Tensor], name: str, tuned: str | Path) -> Tensor:
    if name not in weights:
        raise BaseModelError(
            f"'{tuned}' has no '{name}', which the base has. Both have to be of one architecture."
        )
    return weights[name]


def _difference(base: Tensor, tuned: Tensor) -> Tensor:
    if base.shape != tuned.shape:
        raise BaseModelError(
            f"A weight has shape {tuple(base.shape)} in the base and {tuple(tuned.shape)} in the fine-tuned "
            "model: they are of different sizes."
        )
    dtype = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    return tuned.detach().to("cpu", dtype) - base.detach().to("cpu", dtype)


def _left_out(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    covered: set[str],
    results: Mapping[str, LayerResult],
) -> list[str]:
    """What else differs between the models, in sentences."""
    changed: dict[str, float] = {}
    resized: list[str] = []
    for name, parameter in base_parameters(model):
        if name in covered or name not in weights:
            continue
        mine, theirs = tuple(parameter.shape), tuple(weights[name].shape)
        if mine != theirs:
            resized.append(f"'{name}' is {mine} in the base and {theirs} in the fine-tuned model")
            continue
        distance = float(torch.linalg.vector_norm(_difference(parameter, weights[name])))
        if distance:
            changed[name] = distance
    found = []
    if changed:
        taken = math.hypot(*(math.sqrt(r.norm**2 - r.residual**2) for r in results.values()))
        all_of_it = math.hypot(*(r.norm for r in results.values()), *changed.values())
        first = max(changed, key=lambda name: changed[name])
        found.append(
            f"{len(changed)} other parameters differ too and are not in the adapter, '{first}' most. It holds "
            f"{(taken / all_of_it) ** 2:.1%} of the squared difference. More targets, or train_modules, take them in."
        )
    if resized:
        found.append(
            f"{len(resized)} other parameters differ too, in shape, and are not in the adapter: {'; '.join(resized)}."
        )
    return found

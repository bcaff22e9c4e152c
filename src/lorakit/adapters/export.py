"""`save_pretrained` and `load_state_dict` of a model that carries adapters.

A folder written by `save_pretrained` must never give the bare base when it is loaded. So the base keys
hold the adapted (merged) weights, which every reader understands; the adapter's own tensors follow
beside them, with a mark on each layer. When such a file is loaded back into a model that carries the
adapter (a resumed training run), the mark says that its base weights are to be left as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.installed import adapted_layers
from lorakit.adapters.layer_adapters import CHILD

MARK = f"{CHILD}.holds_merged_weights"
"""Key, beside an adapted layer's weights, that says they contain the adapter."""


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    *args: Any,
    state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """Stands in for the model's `save_pretrained` while it carries adapters."""
    state = adapted_state_dict(model, model.state_dict() if state_dict is None else state_dict)
    config: Any = getattr(model, "config", None)
    tied = getattr(config, "tie_word_embeddings", None)
    if tied and unties(model, state):
        config.tie_word_embeddings = False
    try:
        return type(model).save_pretrained(model, save_directory, *args, state_dict=state, **kwargs)  # type: ignore[attr-defined]
    finally:
        if config is not None and tied is not None:
            config.tie_word_embeddings = tied


@torch.no_grad()
def adapted_state_dict(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the active adapters' effect in the base keys, and a mark on every layer it reached."""
    merged = dict(state)
    for path, layer, adapters in adapted_layers(model):
        prefix = f"{path}." if path else ""
        names = list(adapters.activation.active.weights)
        here = [name for name, _ in names if name in adapters]
        changed = set(adapters.replaced)  # a trained or merged tensor already has the base's place
        for attribute in adapters.weights_changed_by(layer, here):
            if attribute not in changed:
                merged[prefix + attribute] = adapters.effective_weight(layer, attribute, names)
                changed.add(attribute)
        if changed:
            merged[prefix + MARK] = torch.ones(1, dtype=torch.uint8)
        for name, module in adapters.items():  # copies that hold the base's place are written there
            for attribute, copy in module.trained.items():  # type: ignore[union-attr, operator]
                if layer._parameters.get(attribute) is copy:
                    merged.pop(f"{prefix}{CHILD}.{name}.trained.{attribute}", None)
    return merged


def keep_base_weights(
    model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *unused: Any
) -> None:
    """`load_state_dict` pre-hook: a marked layer keeps its base weights, the file's contain an adapter."""
    for path, layer, adapters in adapted_layers(model):
        start = f"{prefix}{path}." if path else prefix
        if state_dict.pop(start + MARK, None) is None:
            continue
        for name, module in adapters.items():
            for attribute, copy in module.trained.items():  # type: ignore[union-attr, operator]
                key = f"{start}{CHILD}.{name}.trained.{attribute}"
                if layer._parameters.get(attribute) is copy and start + attribute in state_dict:
                    state_dict.setdefault(key, state_dict[start + attribute])
        for attribute, parameter in layer._parameters.items():
            trained = any(
                layer._parameters[attribute] is module.trained.get(attribute)  # type: ignore[union-attr, operator]
                for module in adapters.values()
            )
            if parameter is not None and not trained and start + attribute in state_dict:
                state_dict[start + attribute] = parameter.detach()


def unties(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether `state` gives input embedding and output head, tied in the base, different weights."""
    keys = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    get_in, get_out = (
        getattr(model, name, lambda: None)
        for name in ("get_input_embeddings", "get_output_embeddings")
    )
    table, head = get_in(), get_out()
    if table is None or head is None:
        return False
    paths = {id(module): path for path, module in model.named_modules()}
    names = [f"{paths[id(module)]}.weight" for module in (table, head) if id(module) in paths]
    return (
        len(names) == 2
        and all(name in keys and name in state for name in names)
        and state[names[0]].data_ptr() != state[names[1]].data_ptr()
    )

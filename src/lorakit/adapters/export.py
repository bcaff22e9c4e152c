"""`save_pretrained` and `load_state_dict` of a model that carries adapters.

A folder written by `save_pretrained` must never give the bare base when it is loaded. So the base keys
hold the adapted (merged) weights, which every reader understands; the adapter's own tensors follow
beside them, with a mark on each layer. When such a file is loaded back into a model that carries the
adapter (a resumed training run), the mark says that its base weights are to be left as they are.

An adapter that no weight can hold (a bottleneck, virtual tokens) leaves the bare base in the base keys.
The configuration of such a folder names no file of weights, so that loading it as a model is an error;
a resumed training run loads the tensors itself.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import CONFIG_NAME

from lorakit import storage
from lorakit.adapters.installed import adapted_layers, base_weights
from lorakit.adapters.layer_adapters import MARK, LayerAdapters
from lorakit.errors import AdapterStateError
from lorakit.models.layers import ADAPTERS
from lorakit.models.quantised import QuantisedWeight, quantised_weights, unmarked

_LOG = logging.getLogger(__name__)

_OUR_TENSOR = re.compile(
    r"[\w-]+\.(lora_[AB]|magnitude|initial_[AB]|(down|up|norm)_(weight|bias)|trained\..+)"
)


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    *args: Any,
    state_dict: dict[str, Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """Stands in for the model's `save_pretrained` while it carries adapters.

    What is written is not quantised, whatever the base is: the adapted weights are not.

    Raises:
        AdapterStateError: Called inside `per_sample`: no single weight holds several adapters; or what is to be
            pushed to a hub is the bare base, as no weight can hold an active adapter.
    """
    beside = _active_beside_weights(model)
    if beside and kwargs.get("push_to_hub"):
        raise AdapterStateError(
            f"'{beside[0]}' cannot be merged into the weights, so that the bare base would be pushed. Push the folder "
            "that adapters.save() writes."
        )
    state = adapted_state_dict(model, model.state_dict() if state_dict is None else state_dict)
    config: Any = getattr(model, "config", None)
    tied = getattr(config, "tie_word_embeddings", None)
    if tied and unties(model, state):
        config.tie_word_embeddings = False
    # Undoing the renames of an architecture's old checkpoints would rename the adapters' keys as well.
    kwargs.setdefault("save_original_format", False)
    try:
        with unmarked(model):
            return type(model).save_pretrained(  # type: ignore[attr-defined]
                model, save_directory, *args, state_dict=state, **kwargs
            )
    finally:
        if tied is not None:
            config.tie_word_embeddings = tied
        if beside:
            _refuse_to_load(Path(save_directory), beside[0])


def _refuse_to_load(folder: Path, name: str) -> None:
    """Let `from_pretrained` fail on a folder whose base keys hold the bare base, and say why."""
    path = folder / CONFIG_NAME
    if path.exists():  # written by the first process alone
        reason = f"none: the adapter '{name}' is no part of the weights. Load the folder of adapters.save()"
        storage.write_json(path, {**storage.read_json(path), "transformers_weights": reason})
    _LOG.warning(
        "'%s' cannot be merged into the weights: '%s' can be resumed from, and from_pretrained refuses it. "
        "adapters.save() writes a folder to load.",
        name,
        folder,
    )


def _active_beside_weights(model: nn.Module) -> list[str]:
    """The active adapters that have a part which is no change of a weight."""
    return [
        name
        for _, _, adapters in adapted_layers(model)
        for name in adapters.activation.active.names
        if name in adapters and not adapters[name].merges
    ]


@torch.no_grad()
def adapted_state_dict(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the active adapters' effect in the base keys, and a mark on every layer it reached."""
    result = dict(state)
    whole = set()  # keys of quantised layers whose weight is an adapted one, which is whole
    for path, layer, adapters in adapted_layers(model):
        active = adapters.activation.active
        if active.rows is not None and active.names:
            raise AdapterStateError(
                "The model cannot be saved inside per_sample: its rows have different weights. Leave the block first."
            )
        prefix = f"{path}." if path else ""
        names = [name for name, _ in active.weights]
        for attribute in adapters.weights_changed_by(path, layer, names):
            result[prefix + attribute] = adapters.effective_weight(
                layer, attribute, list(active.weights)
            )
            result[f"{prefix}{ADAPTERS}.{MARK}"] = torch.ones(1, dtype=torch.uint8)
            whole.add(prefix + attribute)
        whole.update(prefix + attribute for attribute in adapters.replaced)
    _expand_quantised(model, result, whole)
    # A copy of a base tensor may stand at several keys (the base's own, and every tied one): write it once.
    copies = _copies(model)
    seen = {id(p) for name, p in model.named_parameters() if name not in copies}
    for key, parameter in copies.items():
        if id(parameter) in seen:
            result.pop(key, None)
        seen.add(id(parameter))
    return result


def _expand_quantised(model: nn.Module, state: dict[str, Tensor], whole: set[str]) -> None:
    """Write quantised weights as ``W_q``, all in the layout of the layer that theirs was made from."""
    for path, weight in _base_quantised(model):
        key = f"{path}.weight"
        if key not in state:
            continue
        # bitsandbytes writes scales beside the packed numbers, under names of its own.
        beside = (f"{path}.SCB", f"{path}.weight_format")
        for other in [k for k in state if k.startswith(f"{key}.") or k in beside]:
            del state[other]
        state[key] = weight.in_layout(state[key]) if key in whole else weight.whole()


def _base_quantised(model: nn.Module) -> Iterator[tuple[str, QuantisedWeight]]:
    """Path and weight of every layer whose own weight, in its place or aside, is quantised."""
    for name, weight in base_weights(model):
        if isinstance(weight, QuantisedWeight):
            yield name.removesuffix(".weight"), weight


def keep_base_weights(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    *unused: Any,
) -> None:
    """`load_state_dict` pre-hook: a marked layer keeps its base weights, for the file's contain an adapter.

    Raises:
        AdapterStateError: An adapter is merged, and its merged weights would no longer be those of its tensors;
            or the file holds an adapter for a layer that carries none here.
    """
    _refuse_strange_layers(model, state_dict, prefix)
    for path, layer, adapters in adapted_layers(model):
        start = f"{prefix}{path}." if path else prefix
        if adapters.merged and any(key.startswith(f"{start}{ADAPTERS}.") for key in state_dict):
            raise AdapterStateError(
                "An adapter is merged, and loading new tensors for it would not change the merged weights. "
                "Call unmerge() before load_state_dict()."
            )
        mark = f"{start}{ADAPTERS}.{MARK}"
        if state_dict.pop(mark, None) is not None:
            # A copy that had the base's place when the file was written stands there alone.
            for name, module in adapters.items():
                for attribute, copy in module.trained.items():
                    key = f"{start}{ADAPTERS}.{name}.trained.{attribute}"
                    if layer._parameters[attribute] is not copy and start + attribute in state_dict:
                        state_dict.setdefault(key, state_dict[start + attribute])
            for attribute, parameter in layer._parameters.items():
                copied = any(parameter is copy for copy in _copies_on(adapters))
                if parameter is not None and not copied and start + attribute in state_dict:
                    state_dict[start + attribute] = parameter.detach()
        if adapters.replaced:  # the live layer expects the key as well
            state_dict[mark] = getattr(adapters, MARK)
    _keep_quantised(model, state_dict, prefix)


def _keep_quantised(model: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """A quantised weight stays as it is, where the file holds it expanded."""
    for path, weight in quantised_weights(model):
        key = f"{prefix}{path}.weight"
        found = state_dict.get(key)
        packed = weight.packed
        if found is None or (found.shape, found.dtype) == (packed.shape, packed.dtype):
            continue
        if not (found.shape == weight.shape and found.to(packed.device).equal(weight.whole())):
            raise AdapterStateError(
                f"'{key}' is not what this model's {weight.kind} weight stands for: the file was saved from another "
                "base, or from the same one quantised otherwise. Load the base that it was saved from."
            )
        state_dict[key] = packed.detach()


def _refuse_strange_layers(model: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """A tensor of an adapter that finds no layer would be ignored where loading is not strict."""
    paths = {path for path, _, _ in adapted_layers(model)}
    for key in state_dict:
        path, found, rest = key.removeprefix(prefix).rpartition(f"{ADAPTERS}.")
        ours = rest == MARK or _OUR_TENSOR.fullmatch(rest)
        if found and ours and path.removesuffix(".") not in paths:
            raise AdapterStateError(
                f"'{key}' is of an adapter on a layer that carries none in this model. Attach the adapters that "
                "the file was saved with before you load it."
            )


def unties(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether `state` gives input embedding and output head, tied in the base, different weights."""
    table, head = (
        getattr(model, name, lambda: None)()
        for name in ("get_input_embeddings", "get_output_embeddings")
    )
    if table is None or head is None:
        return False
    names = [f"{path}.weight" for path, module in model.named_modules() if module in (table, head)]
    held = [state[name] for name in names if name in state]
    return len(held) == 2 and held[0].data_ptr() != held[1].data_ptr()


def _copies_on(adapters: LayerAdapters) -> Iterator[nn.Parameter]:
    for module in adapters.values():
        yield from module.trained.values()


def _copies(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained copies of base tensors by their keys beside the base, tied ones under every key."""
    copies = {}
    for path, _, adapters in adapted_layers(model):
        for name, module in adapters.items():
            for attribute, copy in module.trained.items():
                key = f"{ADAPTERS}.{name}.trained.{attribute}"
                copies[f"{path}.{key}" if path else key] = copy
    return copies

"""Base parameters trained in full (biases, heads), under the names that PEFT gives them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from transformers.models.auto import modeling_auto

from lorakit.adapters.formats.layout import BaseLayout
from lorakit.adapters.formats.peft.factors import NotExpressibleError
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.methods.lora import LoRA

_PREFIX = "base_model.model."


@dataclass
class TrainedForm:
    """Parameters trained in full, in PEFT's form."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    """The key of each, by its name in the base."""
    modules: list[str] = field(default_factory=list)
    """modules_to_save."""


def place(
    stored: StoredAdapter, layout: BaseLayout | None, layer_keys: Mapping[str, str]
) -> TrainedForm:
    """Decide how PEFT is to load each trained parameter: as a bias, or as part of a whole module.

    Args:
        stored: The adapter.
        layout: Of its base, where it is at hand.
        layer_keys: Path of every layer that PEFT wraps, to the start of its keys.

    Raises:
        NotExpressibleError: A parameter is neither a bias nor in a module that is trained as a whole.
    """
    names = _with_aliases(stored, layout)
    modules = _modules_to_save(stored, layout, names, layer_keys)
    along = {} if layout is None else _taken_along(modules, layout)
    _refuse_adapted((*modules, *along), layer_keys)
    form = TrainedForm(modules=modules)
    for tensors in along.values():
        form.tensors.update({_PREFIX + name: tensor for name, tensor in tensors.items()})
    for name, first in names.items():
        whole = any(name.startswith(f"{module}.") for module in modules)
        if not whole and not _is_trained_bias(name, stored, layer_keys):
            raise NotExpressibleError(
                f"'{name}' is trained, and PEFT stores whole modules and biases alone."
            )
        key = _PREFIX + (name if whole else _bias_key(name, layer_keys))
        form.tensors[key] = stored.trained[first]
        form.keys.setdefault(first, key)
    return form


def task_type(
    stored: StoredAdapter, layout: BaseLayout | None, modules: Collection[str]
) -> str | None:
    """PEFT's name for the task, where the base's class shows it."""
    if stored.base is None:
        return None
    class_name = stored.base.architecture.class_name
    for task, table in _TASKS.items():
        if class_name in getattr(modeling_auto, table).values():
            # Under SEQ_CLS PEFT takes for granted that the classification head is in the file.
            known = layout.modules if layout is not None else modules
            heads = [path for path in known if path.endswith(("classifier", "score"))]
            stored_heads = heads and all(path.endswith(tuple(modules)) for path in heads)
            return None if task == "SEQ_CLS" and not stored_heads else task
    return None


_TASKS = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}


def _with_aliases(stored: StoredAdapter, layout: BaseLayout | None) -> dict[str, str]:
    """All names of the trained parameters, each with the name it is stored under.

    Where the method means a tied parameter at several places, it is stored once; PEFT unties what it
    wraps and needs each.
    """
    names = {name: name for name in stored.trained}
    if layout is not None:
        for name in stored.trained:
            others = (n for n in layout.names_of(name) if _entries_around(n, stored))
            names.update({other: name for other in others if other not in names})
    return names


def _modules_to_save(
    stored: StoredAdapter,
    layout: BaseLayout | None,
    names: Collection[str],
    layer_keys: Mapping[str, str],
) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        wanted = _entries_around(name, stored)
        if wanted:
            found[wanted[0]] = None  # the outermost
        elif not _is_trained_bias(name, stored, layer_keys):
            found[name.rpartition(".")[0]] = None
    modules = list(found)
    if layout is not None:
        _check_whole(modules, layout, names)
    return modules


def _refuse_adapted(modules: Iterable[str], layer_keys: Mapping[str, str]) -> None:
    for module in modules:
        hit = next((path for path in layer_keys if _peft_excludes(module, path)), None)
        if hit is not None:
            raise NotExpressibleError(
                f"'{hit}' is adapted, and PEFT trains '{module}' around it as a whole."
            )


def _check_whole(modules: list[str], layout: BaseLayout, names: Collection[str]) -> None:
    for module in modules:
        if module in layout.beyond_peft:
            raise NotExpressibleError(f"'{module}': {layout.beyond_peft[module]}.")
        missing = [key for key in layout.below(module) if key not in names]
        if missing:
            raise NotExpressibleError(
                f"'{module}' is trained in part, without '{missing[0]}'; PEFT stores whole modules."
            )
        if any(inner != module and inner.startswith(f"{module}.") for inner in modules):
            raise NotExpressibleError(
                f"'{module}' is trained, and a module inside of it once more."
            )


def _taken_along(modules: list[str], layout: BaseLayout) -> dict[str, dict[str, Tensor]]:
    """The frozen modules that PEFT takes for trained ones, with the base's weights.

    It takes every module whose path ends in the letters of an entry, a dot before them or not:
    DistilBERT's pre_classifier for its classifier.
    """
    found = {}
    for path in layout.modules:
        if path in modules or not path.endswith(tuple(modules)):
            continue
        keys = layout.below(path)
        if path in layout.beyond_peft or not all(key in layout.parameters for key in keys):
            raise NotExpressibleError(
                f"PEFT would take '{path}' for a trained module, whose name its own ends in."
            )
        found[path] = {key: layout.parameters[key] for key in keys}
    return found


def _is_trained_bias(name: str, stored: StoredAdapter, layer_keys: Mapping[str, str]) -> bool:
    assert isinstance(stored.method, LoRA)
    if stored.method.bias == "all":
        return "bias" in name
    path, _, attribute = name.rpartition(".")
    adapted = path in layer_keys and attribute in ("bias", "in_proj_bias")
    return stored.method.bias == "lora_only" and adapted


def _bias_key(name: str, layer_keys: Mapping[str, str]) -> str:
    """PEFT moves an adapted layer's own parameters to its child `base_layer`."""
    path, _, attribute = name.rpartition(".")
    return f"{layer_keys[path]}.base_layer.{attribute}" if path in layer_keys else name


def _peft_excludes(module: str, path: str) -> bool:
    return re.match(rf"(^|.*\.){re.escape(module)}($|\..*)", path) is not None


def is_in_trained_module(name: str, stored: StoredAdapter) -> bool:
    """Whether a parameter lies in a module that the method trains as a whole."""
    return isinstance(stored.method, LoRA) and bool(_entries_around(name, stored))


def _entries_around(name: str, stored: StoredAdapter) -> list[str]:
    """The modules around a parameter that train_modules names, the outermost first."""
    assert isinstance(stored.method, LoRA)
    parts = name.split(".")[:-1]
    parents = [".".join(parts[: i + 1]) for i in range(len(parts))]
    entries = stored.method.train_modules
    return [p for p in parents if any(p == e or p.endswith(f".{e}") for e in entries)]

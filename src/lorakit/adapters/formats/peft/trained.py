"""Map base parameters trained in full (biases, heads) to PEFT's keys."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor
from transformers.models.auto import modeling_auto

from lorakit.adapters.formats.layout import BaseLayout
from lorakit.adapters.formats.peft.factors import NotExpressibleError
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.methods.lora import LoRA
from lorakit.models.sharding import is_sharded
from lorakit.models.tree import is_inside, parents

PREFIX = "base_model.model."
"""Prefix of every key in a PEFT file."""

_CLASSES_BY_TASK = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}
"""PEFT's task_type -> the table in transformers' modeling_auto with the model classes of this task."""


def trained_tensors(
    stored: StoredAdapter, layer_keys: Mapping[str, str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the parameters trained in full by PEFT's keys, and the entries of modules_to_save.

    A parameter is a bias, or a part of a whole module. `layer_keys` has the prefix of the keys of every layer that PEFT
    wraps, by path.

    Raises:
        NotExpressibleError: A parameter is neither a bias nor in a module that is trained in full.
    """
    assert isinstance(stored.method, LoRA)
    layout = stored.layout
    names = _with_aliases(stored, stored.method)
    modules = _modules_to_save(stored.method, names, layer_keys)
    frozen = {}
    if layout is not None:
        _check_whole(modules, layout, names)
        frozen = _also_matched(modules, layout)
    _check_not_adapted((*modules, *frozen), layer_keys)
    tensors = {PREFIX + name: t for module in frozen.values() for name, t in module.items()}
    for name, stored_name in names.items():
        in_module = is_inside(name, *modules)
        if not in_module and not is_trained_bias(name, stored.method, layer_keys):
            raise NotExpressibleError(
                f"'{name}' is trained, but PEFT saves only biases and whole modules."
            )
        key = PREFIX + (name if in_module else _bias_key(name, layer_keys))
        tensors[key] = stored.trained[stored_name]
    return tensors, modules


def task_type(stored: StoredAdapter, modules: Collection[str]) -> str | None:
    """Return PEFT's name of the task, or None if the base's class does not determine it."""
    if stored.base is None:
        return None
    class_name = stored.base.class_name
    for task, table in _CLASSES_BY_TASK.items():
        if class_name in getattr(modeling_auto, table).values():
            # With SEQ_CLS, PEFT assumes that the file contains the classification head.
            known = stored.layout.modules if stored.layout is not None else modules
            heads = [path for path in known if path.endswith(("classifier", "score"))]
            stored_heads = heads and all(path.endswith(tuple(modules)) for path in heads)
            return None if task == "SEQ_CLS" and not stored_heads else task
    return None


def _with_aliases(stored: StoredAdapter, method: LoRA) -> dict[str, str]:
    """Map every name of a trained parameter to the name it is stored under.

    A tied parameter that the method trains under several names is stored once. PEFT unties the modules
    that it wraps, so it needs one copy for each.
    """
    names = {name: name for name in stored.trained}
    if stored.layout is not None:
        for name in stored.trained:
            others = (n for n in stored.layout.names.names_of(name) if trained_parents(n, method))
            names.update({other: name for other in others if other not in names})
    return names


def _modules_to_save(
    method: LoRA, names: Collection[str], layer_keys: Mapping[str, str]
) -> list[str]:
    """Return the modules that PEFT must save whole: those with a trained parameter other than a trained bias."""
    outermost: dict[str, None] = {}
    for name in names:
        roots = trained_parents(name, method)
        if roots:
            outermost[roots[0]] = None
        elif not is_trained_bias(name, method, layer_keys):
            outermost[name.rpartition(".")[0]] = None
    return list(outermost)


def _check_not_adapted(modules: Iterable[str], layer_keys: Mapping[str, str]) -> None:
    """Reject an adapted layer that is or is inside a module of modules_to_save: PEFT would not adapt it."""
    for module in modules:
        for path in layer_keys:
            if re.match(rf"(^|.*\.){re.escape(module)}($|\..*)", path):  # PEFT's rule
                raise NotExpressibleError(
                    f"'{path}' is adapted, but PEFT trains its parent '{module}' in full."
                )


def _check_whole(modules: list[str], layout: BaseLayout, names: Collection[str]) -> None:
    """Reject a module that PEFT cannot save whole: trained in part, with another one inside, or unsupported."""
    for module in modules:
        if module in layout.beyond_peft:
            raise NotExpressibleError(f"'{module}': {layout.beyond_peft[module]}.")
        missing = [key for key in layout.below(module) if key not in names]
        if missing:
            raise NotExpressibleError(
                f"'{module}' is trained in part, without '{missing[0]}', but PEFT saves whole modules."
            )
        if any(inner != module and inner.startswith(f"{module}.") for inner in modules):
            raise NotExpressibleError(
                f"both '{module}' and a module inside it are trained, which PEFT does not support."
            )


def _also_matched(modules: list[str], layout: BaseLayout) -> dict[str, dict[str, Tensor]]:
    """Return the frozen modules that PEFT also matches, with the base's weights.

    PEFT matches every path that ends with an entry of modules_to_save, with or without a dot before
    it: DistilBERT's pre_classifier for the entry classifier.
    """
    frozen = {}
    for path in layout.modules:
        if path in modules or not path.endswith(tuple(modules)):
            continue
        keys = layout.below(path)
        parameters = {key: layout.names.parameters.get(key) for key in keys}
        if path in layout.beyond_peft or any(
            t is None or is_sharded(t) for t in parameters.values()
        ):
            raise NotExpressibleError(
                f"PEFT would also train '{path}', because it ends with the name of a trained module."
            )
        frozen[path] = parameters
    return frozen


def is_trained_bias(name: str, method: LoRA, adapted: Collection[str]) -> bool:
    """Return whether LoRA's `bias` selects the parameter; `adapted` are the paths of the adapted layers."""
    if method.bias == "all":
        return "bias" in name
    path, _, attribute = name.rpartition(".")
    of_layer = path in adapted and attribute in ("bias", "in_proj_bias")
    return method.bias == "lora_only" and of_layer


def _bias_key(name: str, layer_keys: Mapping[str, str]) -> str:
    """Return PEFT's name of a bias: PEFT moves an adapted layer's own parameters to its child `base_layer`."""
    path, _, attribute = name.rpartition(".")
    return f"{layer_keys[path]}.base_layer.{attribute}" if path in layer_keys else name


def trained_parents(name: str, method: LoRA) -> list[str]:
    """Return the modules that train_modules names and that contain the parameter, the outermost first."""
    entries = method.train_modules
    return [p for p in parents(name) if any(p == e or p.endswith(f".{e}") for e in entries)]

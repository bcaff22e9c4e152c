"""Write PEFT folders: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import conversion_mapping
from transformers.models.auto import modeling_auto

from lorakit import storage
from lorakit.adapters.formats.layout import BaseLayout
from lorakit.adapters.formats.peft import experts
from lorakit.adapters.formats.peft.attention import (
    LAST_VERSION,
    attention_paths,
    both_projections,
    written_notices,
)
from lorakit.adapters.formats.peft.factors import NotExpressibleError, to_peft
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer, located
from lorakit.file_names import PEFT_CONFIG, PEFT_TENSORS
from lorakit.formatting import listed
from lorakit.methods.lora import LoRA
from lorakit.methods.lora.forms import EmbeddingForm, LinearForm
from lorakit.models.patterns import endings
from lorakit.models.sharding import is_sharded
from lorakit.models.tree import is_inside, natural, parents
from lorakit.storage.tensors import write_safetensors

PREFIX = "base_model.model."
"""Prefix of every key in a PEFT file."""

MAGNITUDE = "lora_magnitude_vector"
B_BIAS = "lora_B.bias"

_KEYS = {
    LinearForm.kind: ("lora_A.weight", "lora_B.weight"),
    EmbeddingForm.kind: ("lora_embedding_A", "lora_embedding_B"),
}

_EXPERT_TYPES: dict[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
"""Model type -> the type whose names of experts it has. PEFT 0.21 selects by this private table of transformers."""

_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
"""PEFT's `_MOE_TARGET_MODULE_MAPPING`: the names that it replaces by those of stacked experts, on every path."""


_CLASSES_BY_TASK = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}
"""PEFT's task_type -> the table in transformers' modeling_auto with the model classes of this task."""


@dataclass(frozen=True)
class PeftForm:
    """An adapter in PEFT's form."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notices: list[str]
    """Sentences for the user on what the folder means to PEFT."""


def write_peft(stored: StoredAdapter, folder: str | Path) -> PeftForm:
    """Write the two files of a PEFT adapter into an existing folder, and return their content.

    Raises:
        NotExpressibleError: PEFT's format cannot represent this adapter; nothing is written.
    """
    form = peft_form(stored)
    write_safetensors(Path(folder, PEFT_TENSORS), form.tensors)
    storage.write_json(Path(folder, PEFT_CONFIG), form.config)
    return form


def peft_form(stored: StoredAdapter) -> PeftForm:
    """Return the adapter as PEFT would save it.

    Raises:
        NotExpressibleError: PEFT's format cannot represent it.
    """
    method = stored.method
    if not isinstance(method, LoRA):
        raise NotExpressibleError(f"PEFT's format has no method {type(method).__name__}.")
    layout = stored.layout
    for path in stored.layers:
        if layout is not None and path in layout.beyond_peft:
            raise NotExpressibleError(f"'{path}': {layout.beyond_peft[path]}.")
    attention = attention_paths(stored.layers, layout)
    entries: dict[str, StoredLayer] = {}
    for path, layer in stored.layers.items():
        with located(f"'{path}'"):
            entries[path] = to_peft(layer)
    entries |= _tied_heads(entries)
    for path in attention:
        entries.update(both_projections(path, entries))
    targets = {path for path in entries if path.rpartition(".")[0] not in attention}
    parameters = {path for path in targets if entries[path].is_stacked}
    keys = {path: _key_start(path, attention) for path in entries} | experts.key_starts(entries)
    arithmetic = written_notices(entries, attention)
    model_type = stored.base.model_type if stored.base is not None else None
    trained_tensors, modules = _trained(stored, method, keys)
    if len({layer.B_bias is None for layer in entries.values()}) > 1:
        raise NotExpressibleError(
            "PEFT's lora_bias is for all layers, but only some of them have a bias of B."
        )
    config = {
        **_ranks(entries, targets, method),
        "target_modules": target_modules(targets - parameters, layout.modules if layout else None),
        **({"target_parameters": target_parameters(parameters, layout)} if parameters else {}),
        "modules_to_save": modules or None,
        "bias": method.bias,
        "lora_dropout": method.dropout,
        "use_dora": any(layer.magnitude is not None for layer in stored.layers.values()),
        "fan_in_fan_out": any(
            layer.transposed for layer in stored.layers.values() if not layer.is_stacked
        ),
        **_base_options(stored, _task_type(stored, modules)),
        "peft_type": "LORA",
        "inference_mode": True,
        "init_lora_weights": True,
    }
    if any(layer.B_bias is not None for layer in stored.layers.values()):
        config["lora_bias"] = True  # PEFT has it since 0.14
    embeds = any(layer.kind == EmbeddingForm.kind for layer in entries.values())
    if arithmetic or (embeds and stored.from_peft is None):
        config["peft_version"] = LAST_VERSION  # decides what a reader computes
    elif version := (stored.from_peft or {}).get("peft_version"):
        config["peft_version"] = version
    tensors: dict[str, Tensor] = {}
    for path, entry in entries.items():
        tensors |= _layer_tensors(keys[path], entry)
    return PeftForm(
        config,
        tensors | trained_tensors,
        notices=[*arithmetic, *_taken_for_experts(entries.keys() - parameters, model_type)],
    )


def _tied_heads(entries: Mapping[str, StoredLayer]) -> dict[str, StoredLayer]:
    """Return the transposed factors of embeddings for the heads that share their table."""
    heads = {}
    for path, entry in entries.items():
        if entry.tied_head is not None:
            if entry.magnitude is not None:
                raise NotExpressibleError(f"'{path}': PEFT cannot tie DoRA's magnitudes to a head.")
            heads[entry.tied_head] = replace(entry, kind=LinearForm.kind, A=entry.B.T, B=entry.A.T)
    return heads


def _key_start(path: str, attention: set[str]) -> str:
    """Return the start of PEFT's keys of a layer: its path, except for the out_proj of an attention module."""
    parent, _, name = path.rpartition(".")
    return f"{parent}.base_layer.{name}" if parent in attention and name == "out_proj" else path


# --- tensors -------------------------------------------------------------------------------------


def _layer_tensors(key: str, entry: StoredLayer) -> dict[str, Tensor]:
    """Return a layer's tensors by their keys, which begin with `key` after PEFT's prefix."""
    A_name, B_name = _KEYS.get(entry.kind, _KEYS[LinearForm.kind])
    tensors = {A_name: entry.A, B_name: entry.B}
    if entry.is_stacked:
        tensors[B_name] = experts.to_file(entry.B, entry.groups)
    if entry.B_bias is not None:
        tensors[B_BIAS] = entry.B_bias
    if entry.magnitude is not None:
        # A convolution's magnitudes broadcast over (batch, channels, *space).
        shape = (1, -1, *(1 for _ in entry.A.shape[2:])) if entry.A.ndim > 2 else None
        tensors[MAGNITUDE] = entry.magnitude.view(shape) if shape else entry.magnitude
    return {f"{PREFIX}{key}.{name}": tensor for name, tensor in tensors.items()}


# --- ranks and alphas ----------------------------------------------------------------------------


def _ranks(entries: Mapping[str, StoredLayer], targets: set[str], method: LoRA) -> dict[str, Any]:
    """Return r, lora_alpha and the patterns with which PEFT computes our scalings."""
    rslora = method.scaling == "rslora" and all(
        entry.alpha / math.sqrt(entry.rank) == entry.scaling for entry in entries.values()
    )
    # llama.cpp and SGLang ignore use_rslora and compute alpha / r. Write an alpha that gives the same scaling to the
    # bit, if one for all layers does.
    alphas = {_alpha(entry) for entry in entries.values()}
    if len(alphas) == 1 and all(_alpha(e) / e.rank == e.scaling for e in entries.values()):
        rslora = False
    numbers = {}
    for path in sorted(targets):
        entry = entries[path]
        alpha = entry.alpha if rslora else _alpha(entry)
        numbers[path] = (entry.rank, int(alpha) if alpha.is_integer() else alpha)
    (rank, alpha), _ = Counter(numbers.values()).most_common(1)[0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "rank_pattern": _patterns({path: r for path, (r, _) in numbers.items()}, rank),
        "alpha_pattern": _patterns({path: a for path, (_, a) in numbers.items()}, alpha),
    }


def _alpha(entry: StoredLayer) -> float:
    """Return the alpha that gives our scaling when divided by PEFT's rank, exactly if possible."""
    # If entry.alpha is exact, both scalings are the correctly rounded value of one fraction.
    product = entry.scaling * entry.rank
    candidates = [
        *(entry.alpha, product),
        *(math.nextafter(product, 0), math.nextafter(product, 2 * product)),
    ]
    return min(candidates, key=lambda alpha: abs(alpha / entry.rank - entry.scaling))


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Return the values that differ from the default, by patterns that match only their layers."""
    by_template: dict[str, set[Any]] = {}
    for path, value in values.items():
        by_template.setdefault(_template(path), set()).add(value)
    patterns = {}
    for path, value in values.items():
        if value != default:
            same_value = len(by_template[_template(path)]) == 1
            patterns[_template(path) if same_value else f"^{re.escape(path)}"] = value
    return patterns


def _template(path: str) -> str:
    """Return a pattern for the path in which each number matches any number."""
    return "^" + r"\.".join(r"\d+" if p.isdigit() else re.escape(p) for p in path.split("."))


# --- layers --------------------------------------------------------------------------------------


def target_modules(targets: Iterable[str], modules: Sequence[str] | None) -> list[str] | str:
    """Return the shortest list of path endings that match the targets and no other module.

    Args:
        targets: Paths of the adapted layers.
        modules: Paths of all modules of the model; None if they are not known: then whole paths are
            returned.

    Returns:
        A list if possible, since every reader of PEFT files supports lists. A pattern of whole paths if
        some other module's path ends in a target's whole path: any list would match that module too.
    """
    targets = set(targets)
    others = set(modules or ()) - targets
    ambiguous = {ending for path in others for ending in endings(path)}
    chosen: set[str] = set()
    for path in targets:
        shortest_first = [*endings(path)][::-1] if modules is not None else [path]
        ending = next((e for e in shortest_first if e not in ambiguous), None)
        if ending is None:
            return "|".join(re.escape(path) for path in sorted(targets, key=natural))
        chosen.add(ending)
    return sorted(chosen, key=natural)


def target_parameters(parameters: set[str], layout: BaseLayout | None) -> list[str]:
    """Return path endings that match these stacked weights and no other parameter, with the name of their module."""
    bare = {path.rpartition(".")[2] for path in parameters}
    known = (*layout.names.parameters, *bare) if layout is not None else None
    chosen = target_modules(parameters, known)
    return chosen if isinstance(chosen, list) else sorted(parameters, key=natural)


def _taken_for_experts(paths: Collection[str], model_type: str | None) -> list[str]:
    """Return a notice if PEFT would take adapted layers of a mixture of experts for experts.

    transformers 5 stacks the experts of these models in one tensor. PEFT therefore replaces their names in
    `target_modules`, also for the linear layers with the same names: those of shared experts and of dense blocks.
    """
    names = _EXPERTS.get(_EXPERT_TYPES.get(model_type or "", ""), ())
    left_out = sorted(path for path in paths if path.rpartition(".")[2] in names)
    if not left_out:
        return []
    return [
        f"PEFT with transformers 5 takes {listed([*map(repr, left_out)], 1)} for experts, because of the names. It "
        "ignores their adapters, or refuses the folder. Load it with lorakit, or merge it: lorakit merge ADAPTER "
        "OUTPUT."
    ]


# --- parameters trained in full ------------------------------------------------------------------


def _trained(
    stored: StoredAdapter, method: LoRA, layer_keys: Mapping[str, str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the parameters trained in full by PEFT's keys, and the entries of modules_to_save.

    PEFT saves biases and whole modules: frozen parameters of a module come from the base. `layer_keys` has the start of
    the keys of every layer that PEFT wraps, by path.

    Raises:
        NotExpressibleError: PEFT cannot save a module whole, or would not adapt a layer in it.
    """
    layout, tensors = stored.layout, dict(stored.trained)
    for name in stored.trained:
        # PEFT unties the modules that it wraps, so it needs a copy for each name that the method trains.
        for other in layout.names.names_of(name) if layout is not None else ():
            if trained_parents(other, method):
                tensors.setdefault(other, stored.trained[name])
    entries: dict[str, None] = {}
    for name in tensors:
        if roots := trained_parents(name, method):
            entries[roots[0]] = None
        elif not is_trained_bias(name, method, layer_keys):
            entries[name.rpartition(".")[0]] = None
    if "" in entries:
        raise NotExpressibleError("a parameter of no module is trained, but PEFT saves modules.")
    modules = list(entries)
    if layout is not None:
        # PEFT needs no dot before an entry: it also trains DistilBERT's pre_classifier for the entry classifier.
        modules = [path for path in layout.modules if path.endswith(tuple(entries))]
    in_file: dict[str, Tensor] = {}
    for module in modules:
        for path in layer_keys:
            if re.match(rf"(^|.*\.){re.escape(module)}($|\..*)", path):  # PEFT's rule
                raise NotExpressibleError(
                    f"'{path}' is adapted, but PEFT trains its parent '{module}' in full."
                )
        if layout is None:
            continue
        if module in layout.beyond_peft:
            raise NotExpressibleError(f"'{module}': {layout.beyond_peft[module]}.")
        for key in layout.below(module):
            tensor = tensors.get(key, layout.names.parameters.get(key))
            if tensor is None or is_sharded(tensor):
                raise NotExpressibleError(
                    f"PEFT would save '{module}' whole, but '{key}' is a buffer or sharded."
                )
            in_file[PREFIX + key] = tensor
    for name, tensor in tensors.items():
        # PEFT moves an adapted layer's own parameters to its child `base_layer`.
        path, _, attribute = name.rpartition(".")
        if path in layer_keys and not is_inside(name, *entries):
            name = f"{layer_keys[path]}.base_layer.{attribute}"
        in_file[PREFIX + name] = tensor
    return in_file, list(entries)


def is_trained_bias(name: str, method: LoRA, adapted: Collection[str]) -> bool:
    """Return whether LoRA's `bias` selects the parameter; `adapted` are the paths of the adapted layers."""
    if method.bias == "all":
        return "bias" in name
    path, _, attribute = name.rpartition(".")
    of_layer = path in adapted and attribute in ("bias", "in_proj_bias")
    return method.bias == "lora_only" and of_layer


def trained_parents(name: str, method: LoRA) -> list[str]:
    """Return the modules that train_modules names and that contain the parameter, the outermost first."""
    entries = method.train_modules
    return [p for p in parents(name) if any(p == e or p.endswith(f".{e}") for e in entries)]


# --- the base ------------------------------------------------------------------------------------


def _base_options(stored: StoredAdapter, task_type: str | None) -> dict[str, Any]:
    options = {"base_model_name_or_path": None, "revision": None, "task_type": task_type}
    recorded = stored.provenance.get("peft")
    if stored.base is not None and stored.base.name is not None:
        options |= {
            "base_model_name_or_path": stored.base.name,
            "revision": stored.base.revision,
        }
    elif isinstance(recorded, Mapping):
        options = {name: value or recorded.get(name) for name, value in options.items()}
    return options


def _task_type(stored: StoredAdapter, modules: Collection[str]) -> str | None:
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

"""Read PEFT folders: every tensor must be explained, and every layer complete."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit import storage
from lorakit.adapters.formats.peft import experts
from lorakit.adapters.formats.peft.adapter_config import PeftConfig, parse
from lorakit.adapters.formats.peft.attention import as_computed
from lorakit.adapters.formats.peft.trained import PREFIX
from lorakit.adapters.formats.peft.writing import B_BIAS, MAGNITUDE
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer, located, rank_notices
from lorakit.adapters.formats.tensors import read_tensors
from lorakit.errors import AdapterFileError, ConfigurationError
from lorakit.file_names import PEFT_CONFIG, PEFT_PICKLE, PEFT_TENSORS
from lorakit.methods.lora import LoRA
from lorakit.methods.lora.forms import ExpertsForm
from lorakit.models.patterns import endings
from lorakit.models.tree import parents, without_wrappers

_PART = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)(\.weight)?"
)
_ADAPTER_NAME = re.compile(r"(?<=\.)(lora_\w+)\.default((\.weight|\.bias)?)$")
"""The default name of an adapter in a key of a live PEFT model; PEFT's own files leave it out."""
_LIVE_COPY = re.compile(r"\.modules_to_save\.default(?=\.)")
"""What a live PEFT model has in the name of a module that it trains in full."""
_OUT_PROJ = ".base_layer.out_proj"
"""End of PEFT's path of an `nn.MultiheadAttention`'s output projection, after the path of the module."""


def read_peft(folder: str | Path) -> StoredAdapter:
    """Read a PEFT LoRA folder.

    Every pair of factors must be complete and match the options, and no tensor may remain. Only a
    live model can show whether the layers exist (`expected_layers`), and whether other weights are those of embeddings,
    which PEFT saves along if they were resized (`check_targets`).

    Raises:
        AdapterFileError: The folder is damaged, incomplete or unsafe, or sets an option that lorakit
            does not implement.
    """
    folder = Path(folder)
    config_path = folder / PEFT_CONFIG
    options = storage.read_json(config_path)
    with located(f"'{config_path}'"):
        config = parse(options)
    tensors_path = _tensors_path(folder)
    with located(f"'{tensors_path}'"):
        return _adapter(options, config, _plain_names(read_tensors(tensors_path)))


def _tensors_path(folder: Path) -> Path:
    for name in (PEFT_TENSORS, PEFT_PICKLE):
        if os.path.lexists(folder / name):
            return folder / name
    raise AdapterFileError(
        f"'{folder}' has a {PEFT_CONFIG}, but neither {PEFT_TENSORS} nor {PEFT_PICKLE}: the download "
        "or save is incomplete. Download or save it again."
    )


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without PEFT's prefix, which transformers may omit, the adapter's name, and wrappers."""
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = _ADAPTER_NAME.sub(r"\1\2", without_wrappers(key).removeprefix(PREFIX))
        if name in named:
            raise AdapterFileError(
                f"it holds '{name}' twice, with and without the prefix '{PREFIX}', the adapter's name or a wrapper's."
            )
        named[name] = tensor
    return named


def _adapter(
    options: dict[str, Any], config: PeftConfig, tensors: Mapping[str, Tensor]
) -> StoredAdapter:
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _PART.fullmatch(key)
        if match is None:
            others[key] = tensor
        else:
            part = match["part"].removesuffix(".weight")
            parts.setdefault(match["path"], {})[part] = tensor
    layers = {}
    stacked = experts.paths(parts.keys(), config.target_parameters)
    for key, layer_parts in parts.items():
        if key in stacked:
            path = stacked[key]
            layers[path] = _stacked_weight(path, layer_parts, config)
            continue
        # PEFT looks up the options of an out_proj under the attention module's path, of any other layer under its own.
        options_path = key.removesuffix(_OUT_PROJ)
        is_out_proj = options_path != key
        if is_out_proj and options_path not in parts:
            raise AdapterFileError(
                f"'{key}' has factors, but its parent '{options_path}' has none."
            )
        path = f"{options_path}.out_proj" if is_out_proj else key
        if path in layers:
            raise AdapterFileError(f"'{path}' has factors under two names.")
        is_attention = key + _OUT_PROJ in parts
        layers[path] = _layer(path, options_path, layer_parts, config, is_attention=is_attention)
    notices = as_computed(layers, options.get("peft_version"))
    classified = _OtherTensors(config, parts, others)
    saved_modules = classified.saved_modules
    if config.modules_to_save and not saved_modules:
        raise AdapterFileError(
            f"modules_to_save names {', '.join(config.modules_to_save)}, but the file has no tensors for "
            "them: the trained head is missing."
        )
    return StoredAdapter(
        method=_method(config, layers, saved_modules),
        layers=layers,
        trained=classified.trained,
        base_copies=classified.base_copies,
        provenance={"peft": _provenance(options)},
        notices=[*notices, *rank_notices(layers)],
        peft_config=options,
    )


def option_notices(recorded: Mapping[str, Any]) -> list[str]:
    """Return what the user should know about the options in the record of a PEFT folder."""
    notices = []
    if recorded.get("ensure_weight_tying"):
        notices.append(
            "PEFT trained this adapter with ensure_weight_tying. The tied layers are equal in the file; "
            "further training with lorakit would untie them."
        )
    if recorded.get("loftq_config"):
        notices.append(
            "LoftQ initialised this adapter (loftq_config is set), so it belongs to the base that LoftQ quantised. "
            "Make sure that this model has those weights, not the original ones."
        )
    if recorded.get("init_lora_weights") == "mica":
        notices.append(
            "PEFT trains only A of this adapter (init_lora_weights is 'mica'); further training with lorakit would "
            "train B too."
        )
    return notices


def _layer(
    path: str,
    options_path: str,
    parts: Mapping[str, Tensor],
    config: PeftConfig,
    *,
    is_attention: bool,
) -> StoredLayer:
    """Return the layer at `path`, with the rank and alpha that PEFT looks up under `options_path`."""
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if parts.keys() - {MAGNITUDE, B_BIAS} != set(names):
        raise AdapterFileError(
            f"'{path}' has {', '.join(sorted(parts))}; {' and '.join(names)} were expected."
        )
    if config.use_dora != (MAGNITUDE in parts):
        raise AdapterFileError(
            f"'{path}' has {'a' if MAGNITUDE in parts else 'no'} {MAGNITUDE}, but use_dora is "
            f"{str(config.use_dora).lower()}."
        )
    if config.lora_bias != (B_BIAS in parts):
        raise AdapterFileError(
            f"'{path}' has {'a' if B_BIAS in parts else 'no'} {B_BIAS}, but lora_bias is "
            f"{str(config.lora_bias).lower()}."
        )
    A, B = (parts[name] for name in names)
    magnitude = parts.get(MAGNITUDE)
    if magnitude is not None and A.ndim > 2:
        expected = (1, B.shape[0], *(1 for _ in A.shape[2:]))
        if tuple(magnitude.shape) != expected:
            raise AdapterFileError(
                f"'{path}': {MAGNITUDE} has shape {tuple(magnitude.shape)}; {expected} was expected."
            )
        magnitude = magnitude.flatten()
    rank = config.rank_of(options_path)
    if A.numel() and A.shape[:1] != (rank,):  # `StoredLayer` rejects an empty one
        raise AdapterFileError(
            f"'{path}': {names[0]} has shape {tuple(A.shape)}, but {PEFT_CONFIG} gives it rank {rank}."
        )
    kind = "conv" if A.ndim > 2 else "linear"
    if embedding or is_attention:
        kind = "embedding" if embedding else "attention"
    with located(f"'{path}'"):
        layer = StoredLayer(
            kind=kind,
            A=A,
            B=B,
            B_bias=parts.get(B_BIAS),
            scaling=config.scaling_of(options_path),
            alpha=config.alpha_of(options_path),
            magnitude=magnitude,
            transposed=config.fan_in_fan_out and kind == "linear",
        )
    if layer.groups > 1:  # PEFT's A of a grouped convolution reads all input channels
        if magnitude is not None:
            raise AdapterFileError(
                f"'{path}' has DoRA (use_dora) on a grouped convolution, for which PEFT computes the norms of weights "
                "that the layer does not use. Load it with PEFT."
            )
        layer.grouped = False
    return layer


def _stacked_weight(path: str, parts: Mapping[str, Tensor], config: PeftConfig) -> StoredLayer:
    """Return the layer of a stacked weight of experts."""
    if parts.keys() != {"lora_A", "lora_B"}:
        raise AdapterFileError(
            f"'{path}' has {', '.join(sorted(parts))}; lora_A and lora_B were expected."
        )
    A, B, rank = parts["lora_A"], parts["lora_B"], config.rank_of(path)
    count = A.shape[0] // rank if A.ndim == B.ndim == 2 else 0
    if not count or A.shape[0] != count * rank or B.shape[1] != count * rank:
        raise AdapterFileError(
            f"'{path}': lora_A has shape {tuple(A.shape)} and lora_B {tuple(B.shape)}; with the rank {rank} of "
            f"{PEFT_CONFIG}, (experts * {rank}, in) and (out, {rank} * experts) were expected."
        )
    with located(f"'{path}'"):
        return StoredLayer(
            kind=ExpertsForm.kind,
            A=A,
            B=experts.from_file(B, count),
            scaling=config.scaling_of(path),
            alpha=config.alpha_of(path),
        )


class _OtherTensors:
    """The tensors other than factors, classified as PEFT would use them.

    Raises:
        AdapterFileError: The options do not explain one of them.
    """

    def __init__(
        self, config: PeftConfig, layers: Iterable[str], tensors: Mapping[str, Tensor]
    ) -> None:
        self.config, self.layers, self.tensors = config, set(layers), tensors
        self.trained: dict[str, Tensor] = {}
        self.base_copies: dict[str, Tensor] = {}
        self.saved_modules: set[str] = set()
        """The entries of modules_to_save for which the file has tensors."""
        surplus = [key for key in tensors if not self._classify(key)]
        if surplus:
            hint = ""
            if any("lora_" in key for key in surplus):
                hint = (
                    " Keys of factors end in lora_A.weight or lora_B.weight, without an adapter name other than "
                    "default."
                )
            raise AdapterFileError(
                f"it holds {len(surplus)} tensors that its options do not explain, the first "
                f"'{surplus[0]}'.{hint} Download or save the adapter again."
            )

    def _classify(self, key: str) -> bool:
        """Store a tensor as trained or as a base copy; return whether the options explain it."""
        tensor, name = self.tensors[key], self._base_name(key)
        if "lora_" in key:
            return False
        if self._is_duplicate(key):
            return True
        entry = self._entry_of(name)
        if entry is not None:
            self.saved_modules.add(entry)
            name = _LIVE_COPY.sub("", name)
            return self.trained.setdefault(name, tensor) is tensor  # not a second one of this name
        owner, _, attribute = key.rpartition(".")
        in_layer = name != key  # the key has a `base_layer`, so it belongs to an adapted layer
        if (self.config.bias == "all" and "bias" in name) or (
            self.config.bias == "lora_only" and in_layer and attribute.endswith("bias")
        ):
            self.trained[name] = tensor
        elif (
            attribute in ("weight", "bias")
            and f"{owner}.weight" in self.tensors
            # PEFT skips a weight of an adapted layer without `base_layer`, but for those of embeddings.
            and (
                in_layer or owner not in self.layers or f"{owner}.lora_embedding_A" in self.tensors
            )
        ):
            self.base_copies[name] = tensor
        else:
            return False
        return True

    def _base_name(self, key: str) -> str:
        """Return the key without PEFT's `base_layer` between a layer and its own tensors."""
        name, rest = "", key
        while rest:
            step, _, rest = rest.partition(".")
            parent = name.removesuffix(".out_proj")
            adapted = name in self.layers or (parent != name and parent + _OUT_PROJ in self.layers)
            if not (step == "base_layer" and adapted):
                name = f"{name}.{step}" if name else step
        return name

    def _entry_of(self, name: str) -> str | None:
        """Return the entry of modules_to_save under which PEFT saves this parameter, or None."""
        for path in parents(name):
            for entry in self.config.modules_to_save:
                # PEFT's rule, which does not require a dot before the entry.
                if path.endswith(entry):
                    return entry
        return None

    def _is_duplicate(self, key: str) -> bool:
        """Whether the tensor is a duplicate: with bias "all" PEFT saves biases of wrapped modules twice."""
        match = re.fullmatch(r"(.+?)\.(original_module|modules_to_save)\.(.+)", key)
        if match is None or self.config.bias != "all":
            return False
        module, wrapper, name = match.groups()
        for inner in (name, name.partition(".")[2]):  # an adapter name may precede it
            plain = self.tensors.get(f"{module}.{inner}")
            if plain is not None:
                return wrapper == "original_module" or plain.equal(self.tensors[key])
        return False


def _method(config: PeftConfig, layers: Mapping[str, StoredLayer], saved_modules: set[str]) -> LoRA:
    """Return lorakit's settings with the same meaning as PEFT's options."""
    listed = config.target_modules
    restricted = config.exclude_modules or config.layers_to_transform
    names = (*listed, *config.target_parameters) if isinstance(listed, tuple) else ()
    if names and not restricted:
        # PEFT allows names that the model lacks, in options for several models; a new adapter of lorakit does not.
        used = {ending for path in layers for ending in endings(path)}
        targets = tuple(sorted(used.intersection(names))) or tuple(layers)
    elif (
        isinstance(listed, str)
        and listed.lower() != "all-linear"
        and not (restricted or config.target_parameters)
    ):
        targets = (listed,)
    else:  # lorakit has no equal of these options, so list the layers
        targets = tuple(layers)
    try:
        return LoRA(
            rank=config.r,
            alpha=config.lora_alpha,
            targets=targets,
            dropout=config.lora_dropout,
            bias=config.bias,
            init="gaussian" if config.init_lora_weights == "gaussian" else "kaiming",
            scaling="rslora" if config.use_rslora else "standard",
            lora_bias=config.lora_bias,
            dora=config.use_dora,
            rank_pattern=config.used_entries("rank_pattern", layers),
            alpha_pattern=config.used_entries("alpha_pattern", layers),
            train_modules=tuple(e for e in config.modules_to_save if e in saved_modules),
        )
    except ConfigurationError as error:
        raise AdapterFileError(f"{PEFT_CONFIG}: {error}") from error


def _provenance(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that also matter for an adapter made from this one."""
    names = ("base_model_name_or_path", "revision", "task_type", "peft_version")
    recorded = {name: options[name] for name in names if isinstance(options.get(name), str)}
    noted = ("ensure_weight_tying", "loftq_config", "init_lora_weights")
    return recorded | {n: options[n] for n in noted if option_notices({n: options.get(n)})}

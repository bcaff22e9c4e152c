"""Validate the options in adapter_config.json, and apply PEFT's rules to select layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import regex
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakit.errors import AdapterFileError
from lorakit.models.layers import is_of_adapter

CONFIG_NAME = "adapter_config.json"

_PATTERN_SECONDS = 1.0
"""Time limit for one match; a pattern from a file could run forever."""

_NO_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",  # settings of an initialisation; init_lora_weights is checked instead
    "ensure_weight_tying",  # the tied copies are in the file
    "eva_config",
    "inference_mode",
    "lora_ga_config",
    "megatron_core",  # a package name, used only with megatron_config
    "merge_weights",  # written by the first releases
    "peft_version",
    "qalora_group_size",  # used only with use_qalora
    "revision",
    "runtime_config",
    "task_type",
}
"""Options that do not change the meaning of the tensors in the file."""

_IMPLEMENTED = {
    "alpha_pattern",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "use_dora",
    "use_rslora",
}

_NOT_IMPLEMENTED = {
    "alora_invocation_tokens": "the adapter acts only after certain tokens (aLoRA)",
    "arrow_config": "a router chooses among adapters (Arrow)",
    "enable_lora": "slices of a fused layer in the format of PEFT's first releases",
    "kasa_config": "the base weights are truncated (KaSA)",
    "layer_replication": "layers of the base are repeated",
    "loftq_config": "the base weights are replaced by quantised ones (LoftQ)",
    "lora_bias": "lora_B has a bias",
    "megatron_config": "layers are Megatron's",
    "monteclora_config": "factors are sampled (MonteCLoRA)",
    "target_parameters": "parameters outside layers are adapted (mixtures of experts)",
    "trainable_token_indices": "single rows of the embedding are trained",
    "use_bdlora": "factors are block-diagonal (BD-LoRA)",
    "use_qalora": "inputs are pooled in groups (QA-LoRA)",
    "velora_config": "gradients are compressed (VeLoRA)",
}

_INITS_ON_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base's W in ``W + scaling * B A`` unchanged."""


@dataclass(frozen=True)
class PeftConfig:
    """The validated options of a PEFT LoRA adapter that lorakit implements."""

    rank: int
    alpha: float
    dropout: float
    bias: str
    rslora: bool
    dora: bool
    gaussian: bool
    fan_in_fan_out: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...] | None
    modules_to_save: tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    task_type: str | None

    def rank_of(self, path: str) -> int:
        """Return the rank of the layer at PEFT's `path`."""
        return _first_match("rank_pattern", self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float:
        """Return the alpha of the layer at PEFT's `path`."""
        return _first_match("alpha_pattern", self.alpha_pattern, path, self.alpha)

    def scaling_of(self, path: str) -> float:
        """Return the factor on ``B A`` at `path`."""
        rank, alpha = self.rank_of(path), self.alpha_of(path)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def is_target(self, path: str) -> bool:
        """Whether PEFT would adapt the module at `path`, by exactly its rule."""
        if self._is_excluded(path) or self.target_modules is None:
            return False
        if isinstance(self.target_modules, str):
            return matches("target_modules", self.target_modules, path)
        if path in self.target_modules:
            return True
        is_listed = path.endswith(tuple(f".{target}" for target in self.target_modules))
        return is_listed and (not self.layers_to_transform or self._layer_index_fits(path))

    def _is_excluded(self, path: str) -> bool:
        excluded = self.exclude_modules
        if isinstance(excluded, str):
            if excluded and matches("exclude_modules", excluded, path):
                return True
        elif excluded and (path in excluded or path.endswith(tuple(f".{e}" for e in excluded))):
            return True
        return any(
            matches("modules_to_save", rf"(^|.*\.){module}($|\..*)", path)
            for module in self.modules_to_save
        )

    def _layer_index_fits(self, path: str) -> bool:
        patterns = [rf"(?:^|.*?\.){name}" for name in self.layers_pattern] or [r".*?\.[^.]*"]
        for pattern in patterns:
            match = _search("layers_pattern", rf"{pattern}\.(?P<index>\d+)\..*", path)
            if match is not None:
                return int(match["index"]) in (self.layers_to_transform or ())
        return False


def parse(options: Mapping[str, Any]) -> PeftConfig:
    """Validate PEFT's options.

    Raises:
        AdapterFileError: The adapter is not LoRA, a value has the wrong type, or an option that
            lorakit does not implement is set.
    """
    _check_supported(options)
    read = _Reader(options)
    config = PeftConfig(
        rank=read.check_rank("r", read.get("r", 8)),
        alpha=read.check_alpha("lora_alpha", read.get("lora_alpha", 8)),
        dropout=read.number("lora_dropout", 0.0),
        bias=read.choice("bias", ("none", "all", "lora_only")),
        rslora=read.flag("use_rslora"),
        dora=read.flag("use_dora"),
        gaussian=options.get("init_lora_weights") == "gaussian",
        fan_in_fan_out=read.flag("fan_in_fan_out"),
        rank_pattern={
            k: read.check_rank(f"rank_pattern[{k!r}]", v) for k, v in read.items("rank_pattern")
        },
        alpha_pattern={
            k: read.check_alpha(f"alpha_pattern[{k!r}]", v) for k, v in read.items("alpha_pattern")
        },
        target_modules=read.names_or_pattern("target_modules"),
        exclude_modules=read.names_or_pattern("exclude_modules"),
        modules_to_save=read.names("modules_to_save"),
        layers_to_transform=read.indices("layers_to_transform"),
        layers_pattern=read.names("layers_pattern"),
        task_type=read.text("task_type"),
    )
    if not 0 <= config.dropout < 1:
        raise AdapterFileError(
            f"lora_dropout is {config.dropout}; a number of at least 0 and below 1 was expected."
        )
    if isinstance(config.target_modules, str) and (
        config.layers_to_transform or config.layers_pattern
    ):
        raise AdapterFileError(
            "target_modules is a pattern, but PEFT combines layers_to_transform only with a list."
        )
    return config


def expected_layers(config: Mapping[str, Any], model: nn.Module) -> set[str] | None:
    """Return the layers of a live model that PEFT would adapt with these options.

    Args:
        config: The content of adapter_config.json.
        model: The base model; lorakit's adapters on it are skipped.

    Returns:
        The paths; for an `nn.MultiheadAttention` also its `out_proj`, since PEFT adapts both. None if
        the file names no target modules.

    Raises:
        AdapterFileError: The options are not valid, or a pattern takes too long.
    """
    options = parse(config)
    if options.target_modules is None:
        return None
    modules = {
        path: module for path, module in model.named_modules() if path and not is_of_adapter(path)
    }
    if isinstance(options.target_modules, str) and options.target_modules.lower() == "all-linear":
        options = replace(options, target_modules=tuple(_all_linear(options, model, modules)))
    targets = {path for path in modules if options.is_target(path)}
    attention = {path for path in targets if isinstance(modules[path], nn.MultiheadAttention)}
    return targets | {f"{path}.out_proj" for path in attention}


def _all_linear(config: PeftConfig, model: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    """Return PEFT's "all-linear": every linear layer except the output head or the classifier."""
    linear = {path for path, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    if isinstance(model, PreTrainedModel):
        head = model.get_output_embeddings()
        if head is None and config.task_type == "SEQ_CLS":
            heads = (getattr(model, name, None) for name in ("score", "classifier"))
            head = next((head for head in heads if head is not None), None)
        linear -= {path for path, module in modules.items() if module is head}
    return linear


def matches(option: str, pattern: str, path: str) -> bool:
    """Whether a pattern of the file matches the whole path.

    Raises:
        AdapterFileError: It is not a valid regular expression, or takes too long.
    """
    return _search(option, pattern, path) is not None


def _search(option: str, pattern: str, path: str) -> regex.Match[str] | None:
    try:
        return regex.fullmatch(pattern, path, timeout=_PATTERN_SECONDS)
    except regex.error as error:
        raise AdapterFileError(
            f"{option} holds {pattern!r}, which is not a valid regular expression: {error}."
        ) from error
    except TimeoutError as error:
        raise AdapterFileError(
            f"{option} holds {pattern!r}, which takes too long to match against '{path}'."
        ) from error


V = TypeVar("V")


def _first_match(option: str, patterns: Mapping[str, V], path: str, default: V) -> V:
    for key, value in patterns.items():
        if matches(option, rf"(.*\.)?({key})", path):
            return value
    return default


def _check_supported(options: Mapping[str, Any]) -> None:
    kind = options.get("peft_type")
    if kind is None:
        raise AdapterFileError(
            "it has no peft_type, so it is not the configuration of a PEFT adapter."
        )
    if kind != "LORA":
        raise AdapterFileError(f"it is a PEFT adapter of type {kind!r}; lorakit reads only LORA.")
    init = options.get("init_lora_weights", True)
    # Compare by identity, since 1 == True but JSON's 1 is not an initialisation.
    if not any(
        init is known or (isinstance(init, str) and init == known) for known in _INITS_ON_THE_BASE
    ):
        fix = (
            "Load it with PEFT on the quantised base that LoftQ made for it."
            if init == "loftq"
            else "Convert it with PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion="
            "<the adapter as saved before training>), and load that folder."
        )
        raise AdapterFileError(
            f"init_lora_weights is {init!r}: the adapter belongs to a base whose weights PEFT changed "
            f"before training. {fix}"
        )
    for option, value in options.items():
        if not value or option in _NO_EFFECT or option in _IMPLEMENTED:
            continue
        reason = _NOT_IMPLEMENTED.get(option, "an option that lorakit does not know")
        raise AdapterFileError(
            f"the option {option} is set ({_shortened(value)}): {reason}. lorakit does not implement it; "
            "load the adapter with PEFT, merge it there and use the merged model."
        )


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Reader:
    """Typed look-ups of JSON values; a missing or null value means the default."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options

    def get(self, name: str, default: Any) -> Any:
        value = self.options.get(name)
        return default if value is None else value

    def wrong(self, name: str, value: Any, expected: str) -> AdapterFileError:
        return AdapterFileError(f"{name} is {_shortened(value)}; {expected} was expected.")

    def check_rank(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(name, value, "a whole number of 1 or more")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise self.wrong(name, value, "a number")
        return float(value)

    def check_alpha(self, name: str, value: Any) -> float:
        number = not isinstance(value, bool) and isinstance(value, int | float)
        try:
            fits = number and math.isfinite(float(value)) and value != 0
        except OverflowError:
            fits = False
        if not fits:
            raise self.wrong(
                name, value, "a finite number other than 0 (0 would disable the adapter)"
            )
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.get(name, choices[0])
        if value not in choices:
            raise self.wrong(name, value, f"one of {', '.join(choices)}")
        return value

    def text(self, name: str) -> str | None:
        value = self.get(name, None)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, value, "a text")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        value = self.get(name, [])
        if isinstance(value, str):
            return (value,) if value else ()
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise self.wrong(name, value, "a list of names")
        return tuple(value)

    def names_or_pattern(self, name: str) -> str | tuple[str, ...] | None:
        value = self.options.get(name)
        return value if value is None or isinstance(value, str) else self.names(name)

    def indices(self, name: str) -> tuple[int, ...] | None:
        value = self.get(name, None)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(v, bool) or not isinstance(v, int) for v in listed):
            raise self.wrong(name, value, "a whole number or a list of them")
        return tuple(listed) or None

    def items(self, name: str) -> Iterable[tuple[str, Any]]:
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, value, "a mapping of module names")
        for key in value:
            matches(name, rf"(.*\.)?({key})", "")
        return value.items()

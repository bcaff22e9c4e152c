"""Validate the options in adapter_config.json, and apply PEFT's rules to select layers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import regex
from torch import nn
from transformers import PreTrainedModel

from lorakit.adapters.formats.layout import parameters_by_name
from lorakit.adapters.formats.other_tools import hint_of
from lorakit.configuration import conform
from lorakit.errors import AdapterFileError, ConfigurationError
from lorakit.file_names import PEFT_CONFIG
from lorakit.methods.lora.method import check_numbers
from lorakit.models.heads import output_embeddings
from lorakit.models.layers import StackedWeight, is_linear
from lorakit.models.patterns import Matcher, PatternTable, endings, pattern_errors
from lorakit.models.tree import layers_by_path, unwrapped

_NO_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",  # settings of an initialisation; init_lora_weights is checked instead
    "ensure_weight_tying",  # the tied copies are in the file
    "eva_config",
    "inference_mode",
    "loftq_config",  # kept after init_lora_weights was set to true for the quantised base
    "lora_ga_config",
    "megatron_core",  # a package name, used only with megatron_config
    "merge_weights",  # written by the first releases
    "peft_version",  # read in `attention.as_computed` and `fit.check_targets`
    "qalora_group_size",  # used only with use_qalora
    "revision",
    "runtime_config",
}
"""Options that do not change the meaning of the tensors in the file."""

_NOT_IMPLEMENTED = {
    "alora_invocation_tokens": "the adapter acts only after certain tokens (aLoRA)",
    "arrow_config": "a router chooses among adapters (Arrow)",
    "enable_lora": "slices of a fused layer in the format of PEFT's first releases",
    "kasa_config": "the base weights are truncated (KaSA)",
    "layer_replication": "layers of the base are repeated",
    "megatron_config": "layers are Megatron's",
    "monteclora_config": "factors are sampled (MonteCLoRA)",
    "trainable_token_indices": "single rows of the embedding are trained",
    "use_bdlora": "factors are block-diagonal (BD-LoRA)",
    "use_qalora": "inputs are pooled in groups (QA-LoRA)",
    "velora_config": "gradients are compressed (VeLoRA)",
}

_NOT_MERGEABLE = {"alora_invocation_tokens", "arrow_config", "layer_replication", "use_qalora"}
"""Options with which PEFT cannot merge the adapter. Repeated layers share one weight, so it merges wrong numbers."""

_INITS_ON_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Named initialisations that leave the base's W in ``W + scaling * B A`` unchanged."""


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The options of a PEFT LoRA adapter that lorakit implements, under PEFT's names.

    Raises:
        AdapterFileError: A value has the wrong type or is outside its bounds.
    """

    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    lora_bias: bool = False
    use_dora: bool = False
    init_lora_weights: Any = True
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] | None = None
    target_parameters: tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    task_type: str | None = None

    def __post_init__(self) -> None:
        try:
            conform(self)
            check_numbers(self, "r", "lora_alpha", "lora_dropout")
        except ConfigurationError as error:
            raise AdapterFileError(str(error)) from None
        _ = self._ranks, self._alphas  # rejects an invalid pattern
        for option in (
            *("target_modules", "target_parameters"),
            *("exclude_modules", "modules_to_save", "layers_pattern"),
        ):
            names = getattr(self, option)
            if isinstance(names, tuple) and "" in names:
                raise AdapterFileError(
                    f"{option} lists an empty name; names of modules were expected."
                )
        if isinstance(self.target_modules, str) and (
            self.layers_to_transform or self.layers_pattern
        ):
            raise AdapterFileError(
                "target_modules is a pattern, but PEFT combines layers_to_transform only with a list. "
                "List the names of the modules."
            )

    def rank_of(self, path: str) -> int:
        """Return the rank of the layer at PEFT's `path`."""
        with _valid("rank_pattern"):
            return self._ranks.get(path, self.r)

    def alpha_of(self, path: str) -> float:
        """Return the alpha of the layer at PEFT's `path`."""
        with _valid("alpha_pattern"):
            return self._alphas.get(path, self.lora_alpha)

    def scaling_of(self, path: str) -> float:
        """Return the factor on ``B A`` at `path`."""
        rank, alpha = self.rank_of(path), self.alpha_of(path)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def used_entries(self, option: str, paths: Collection[str]) -> dict[str, Any]:
        """Return rank_pattern or alpha_pattern without the entries that cover none of PEFT's paths."""
        table: PatternTable[Any] = self._ranks if option == "rank_pattern" else self._alphas
        with _valid(option):
            unused = set(table.unused(paths))
        return {key: value for key, value in getattr(self, option).items() if key not in unused}

    def is_target(self, path: str) -> bool:
        """Whether PEFT would adapt the module at `path`, by exactly its rule."""
        if self._is_excluded(path) or self.target_modules is None:
            return False
        if isinstance(self.target_modules, str):
            return self._match("target_modules", self.target_modules, path) is not None
        if path in self._targets:
            return True
        is_listed = not self._targets.isdisjoint(endings(path))
        return is_listed and (not self.layers_to_transform or self._layer_index_fits(path))

    def _is_excluded(self, path: str) -> bool:
        if isinstance(self.exclude_modules, str):
            pattern = self.exclude_modules
            if pattern and self._match("exclude_modules", pattern, path):
                return True
        elif self._excluded and not self._excluded.isdisjoint(endings(path)):
            return True
        return any(
            self._match("modules_to_save", rf"(^|.*\.){module}($|\..*)", path)
            for module in self.modules_to_save
        )

    def _layer_index_fits(self, path: str) -> bool:
        """Whether layers_to_transform lists the block number in `path`, by PEFT's rule."""
        patterns = [rf"(?:^|.*?\.){name}" for name in self.layers_pattern] or [r".*?\.[^.]*"]
        for pattern in patterns:
            match = self._match("layers_pattern", rf"{pattern}\.(?P<index>\d+)\..*", path)
            if match is not None:
                return int(match["index"]) in self.layers_to_transform
        return False

    def _match(self, option: str, pattern: str, path: str) -> regex.Match[str] | None:
        """Return the match of a pattern of this option with the whole path, or None.

        Raises:
            AdapterFileError: It is not a valid regular expression, or takes too long.
        """
        with _valid(option, pattern):
            return self._matcher.fullmatch(pattern, path)

    # Compiled at their first use. All patterns of a file share one time limit.

    @cached_property
    def _matcher(self) -> Matcher:
        return Matcher()

    @cached_property
    def _ranks(self) -> PatternTable[int]:
        with _valid("rank_pattern"):
            return PatternTable(self.rank_pattern, self._matcher)

    @cached_property
    def _alphas(self) -> PatternTable[float]:
        with _valid("alpha_pattern"):
            return PatternTable(self.alpha_pattern, self._matcher)

    @cached_property
    def _targets(self) -> frozenset[str]:
        return frozenset(self.target_modules or ())

    @cached_property
    def _excluded(self) -> frozenset[str]:
        return frozenset(self.exclude_modules or ())


_IMPLEMENTED = {"peft_type", *(option.name for option in fields(PeftConfig))}


def parse(options: Mapping[str, Any]) -> PeftConfig:
    """Validate PEFT's options, as adapter_config.json holds them.

    Raises:
        AdapterFileError: The adapter is not LoRA, a value has the wrong type, or an option that
            lorakit does not implement is set.
    """
    _check_supported(options)
    names = _IMPLEMENTED - {"peft_type"}
    values = {name: options[name] for name in names if options.get(name) is not None}
    for name in ("modules_to_save", "layers_pattern", "layers_to_transform"):
        value = values.get(name)
        if isinstance(value, str | int):  # PEFT also accepts one value instead of a list
            values[name] = [] if value == "" else [value]
    if isinstance(init := values.get("init_lora_weights"), str):
        values["init_lora_weights"] = init.lower()
    return PeftConfig(**values)


def expected_layers(options: Mapping[str, Any], model: nn.Module) -> set[str] | None:
    """Return the layers of a live model that PEFT would adapt with the options of an adapter_config.json.

    Returns:
        The paths; for an `nn.MultiheadAttention` also its `out_proj`, since PEFT adapts both. None if
        the file names no target modules. Stacked weights of experts are layers here, other parameters are not.

    Raises:
        AdapterFileError: The options are not valid, or a pattern takes too long.
    """
    config = parse(options)
    if config.target_modules is None:
        return None
    layers = layers_by_path(model)
    modules = {p: m for p, m in layers.items() if p and not isinstance(m, StackedWeight)}
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config = replace(config, target_modules=tuple(_all_linear(config, model, modules)))
    targets = {path for path in modules if config.is_target(path)}
    if options.get("ensure_weight_tying"):
        for first, others in parameters_by_name(model).aliases.items():
            tied = {name.removesuffix(".weight") for name in (first, *others)}
            targets |= tied if tied & targets else set()
    attention = {path for path in targets if isinstance(modules[path], nn.MultiheadAttention)}
    parameters = frozenset(config.target_parameters)
    stacked = layers.keys() - modules.keys()
    selected = {path for path in stacked if not parameters.isdisjoint(endings(path))}
    return targets | {f"{path}.out_proj" for path in attention} | selected


def _all_linear(config: PeftConfig, model: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    """Return PEFT's "all-linear": every linear layer except the output head or the classifier."""
    linear = {path for path, module in modules.items() if is_linear(module)}
    if isinstance(model, PreTrainedModel):
        head = output_embeddings(model)
        if head is None and config.task_type == "SEQ_CLS":
            heads = (getattr(model, name, None) for name in ("score", "classifier"))
            head = next((unwrapped(head) for head in heads if head is not None), None)
        linear -= {path for path, module in modules.items() if module is head}
    return linear


def _valid(option: str, pattern: str = "") -> AbstractContextManager[None]:
    """Raise an AdapterFileError that names the option if one of its patterns is invalid or takes too long."""
    return pattern_errors(option, AdapterFileError, pattern, f" in {PEFT_CONFIG}")


def _check_supported(options: Mapping[str, Any]) -> None:
    kind = options.get("peft_type")
    if kind is None:
        raise AdapterFileError(
            f"it has no peft_type, so it is not the configuration of a PEFT adapter.{hint_of(options)}"
        )
    if kind != "LORA":
        raise AdapterFileError(f"it is a PEFT adapter of type {kind!r}; lorakit reads only LORA.")
    init = options.get("init_lora_weights", True)
    if not isinstance(init, bool | None) and str(init).lower() not in _INITS_ON_THE_BASE:
        conversion = (  # that of LoftQ would leave out the rounding
            "To load it on the original base, convert it with PEFT: save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=<the adapter as saved before training>). "
        )
        raise AdapterFileError(
            f"init_lora_weights is {init!r}: the adapter belongs to a base whose weights PEFT changed before "
            f"training. {'' if init == 'loftq' else conversion}To load it on the changed base, which "
            f"peft_model.unload() returns, set init_lora_weights to true in {PEFT_CONFIG}."
        )
    for option, value in options.items():
        if not value or option in _NO_EFFECT or option in _IMPLEMENTED:
            continue
        reason = _NOT_IMPLEMENTED.get(option, "an option that lorakit does not know")
        merge = "" if option in _NOT_MERGEABLE else ", or merge it there and use the merged model"
        raise AdapterFileError(
            f"the option {option} is set ({value!r:.60}): {reason}. lorakit does not implement it; "
            f"use the adapter with PEFT{merge}."
        )

"""The options in adapter_config.json: which of them lorakit implements, and PEFT's rules for ranks and alphas."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from lorakit.configuration import conform
from lorakit.errors import AdapterFileError, ConfigurationError
from lorakit.file_names import PEFT_CONFIG
from lorakit.methods.lora.method import check_numbers
from lorakit.models.patterns import Matcher, PatternTable, pattern_errors

_NO_EFFECT = {
    # These select layers, which the file's tensors show.
    *("exclude_modules", "layers_to_transform", "layers_pattern"),
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
    "peft_version",  # read in `attention.as_computed` and `fit.fit`
    "qalora_group_size",  # used only with use_qalora
    "revision",
    "runtime_config",
    "task_type",
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
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            conform(self)
            check_numbers(self, "r", "lora_alpha", "lora_dropout")
        except ConfigurationError as error:
            raise AdapterFileError(str(error)) from None
        if "" in (*self.modules_to_save, *self.target_parameters):
            raise AdapterFileError(
                "modules_to_save or target_parameters lists an empty name, which fits every module. Remove it."
            )
        _ = self._tables  # rejects an invalid pattern

    def rank_of(self, path: str) -> int:
        """Return the rank of the layer at PEFT's `path`."""
        return self._value("rank_pattern", path, self.r)

    def alpha_of(self, path: str) -> float:
        """Return the alpha of the layer at PEFT's `path`."""
        return self._value("alpha_pattern", path, self.lora_alpha)

    def scaling_of(self, path: str) -> float:
        """Return the factor on ``B A`` at `path`."""
        rank, alpha = self.rank_of(path), self.alpha_of(path)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def used_entries(self, option: str, paths: Collection[str]) -> dict[str, Any]:
        """Return rank_pattern or alpha_pattern without the entries that cover none of PEFT's paths."""
        with pattern_errors(option, AdapterFileError, "", f" in {PEFT_CONFIG}"):
            unused = set(self._tables[option].unused(paths))
        return {key: value for key, value in getattr(self, option).items() if key not in unused}

    def _value(self, option: str, path: str, default: Any) -> Any:
        with pattern_errors(option, AdapterFileError, "", f" in {PEFT_CONFIG}"):
            return self._tables[option].get(path, default)

    @cached_property
    def _tables(self) -> dict[str, PatternTable[Any]]:
        """The patterns by their option. All of a file share one time limit."""
        matcher, tables = Matcher(), {}
        for option in ("rank_pattern", "alpha_pattern"):
            with pattern_errors(option, AdapterFileError, "", f" in {PEFT_CONFIG}"):
                tables[option] = PatternTable(getattr(self, option), matcher)
        return tables


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
    # PEFT accepts one name instead of a list.
    if isinstance(module := values.get("modules_to_save"), str):
        values["modules_to_save"] = [module]
    if isinstance(init := values.get("init_lora_weights"), str):
        values["init_lora_weights"] = init.lower()
    return PeftConfig(**values)


def _check_supported(options: Mapping[str, Any]) -> None:
    kind = options.get("peft_type")
    if kind is None:
        raise AdapterFileError(
            "it has no peft_type, so it is not the configuration of a PEFT adapter. Convert it with the software that "
            "wrote it."
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

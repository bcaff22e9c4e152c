"""Settings of a run as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lorakit import storage
from lorakit.configuration import setting
from lorakit.methods.registry import unused_settings
from lorakit.reporting.run_record import RunRecord


def setting_text(value: Any) -> str:
    """Return a setting on one line, similar to YAML."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def settings_text(run: RunRecord) -> str:
    """Return the configuration as YAML, without the settings of methods that the run does not use."""
    unused = unused_settings(run.config)
    return yaml_text({name: value for name, value in run.config.items() if name not in unused})


def yaml_text(settings: Mapping[str, Any]) -> str:
    """Return settings as YAML, in their order."""
    return storage.dump_yaml(dict(settings), sort_keys=False, width=100)


def chosen_settings(config: Mapping[str, Any], names: Iterable[str]) -> list[tuple[str, str]]:
    """Return those of the named settings that are set and have an effect, as pairs of dotted name and value."""
    found = [(name, setting(config, name)) for name in names]
    overridden = {"epochs"} if config.get("max_steps") else set()
    return [
        (name, setting_text(value))
        for name, value in found
        if value not in (None, "") and name not in overridden
    ]


def main_settings(run: RunRecord) -> list[tuple[str, str]]:
    """Return the most important settings as pairs of dotted name and value."""
    names = (
        "base.name",
        "base.dtype",
        "method",
        "from_adapter",
        "lora.rank",
        "lora.alpha",
        "lora.targets",
        "lora.dropout",
        "data.train",
        "data.validation",
        "epochs",
        "max_steps",
        "batch_size",
        "accumulation",
        "optimizer.learning_rate",
        "optimizer.schedule",
        "optimizer.warmup",
        "optimizer.weight_decay",
        "seed",
    )
    config = {**run.config, "method": run.method, "lora": run.methods.get("lora", {})}
    return chosen_settings(config, names)

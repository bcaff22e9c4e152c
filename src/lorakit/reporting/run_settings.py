"""The settings of a run, as a reader wants them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from lorakit.reporting.run_record import RunRecord


def setting(config: Mapping[str, Any], path: str) -> Any:
    """The value of a dotted name; None where it is not set."""
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def setting_text(value: Any) -> str:
    """A setting as YAML would show it on one line."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def settings_text(run: RunRecord) -> str:
    """The configuration as YAML."""
    return yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True, width=100)


def main_settings(run: RunRecord) -> list[tuple[str, str]]:
    """The settings that say most about a run, by their dotted names."""
    rows: list[tuple[str, str]] = []
    for path in (
        "base.name",
        "base.dtype",
        "method",
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
    ):
        if path.startswith("lora.") and "lora" not in run.method.split("+"):
            continue
        if path == "epochs" and run.config.get("max_steps"):
            continue
        value = setting(run.config, path)
        if value is not None:
            rows.append((path, setting_text(value)))
    return rows

"""From settings by dotted name to the configuration of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_type_hints

from lorakit.errors import ConfigurationError, nearest
from lorakit.training.config import TrainConfig


def train_config(settings: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration of a run with some settings by dotted name, such as ``lora.rank``.

    Raises:
        ConfigurationError: There is no such setting, a value cannot work, or two settings exclude each other.
    """
    hints = get_type_hints(TrainConfig)
    plain: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, dot, key = name.partition(".")
        if (section if dot else name) not in hints:
            raise ConfigurationError(f"A run has no setting '{name}'.{nearest(name, hints)}")
        if dot:
            sections.setdefault(section, {})[key] = value
        else:
            plain[name] = value
    return TrainConfig(**plain, **{name: hints[name](**own) for name, own in sections.items()})

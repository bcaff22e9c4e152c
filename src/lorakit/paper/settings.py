"""Convert settings by dotted name to the configuration of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_type_hints

from lorakit.errors import ConfigurationError, nearest
from lorakit.training.config import TrainConfig


def train_config(settings: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration of a run from settings by dotted name, such as ``lora.rank``.

    Raises:
        ConfigurationError: A setting is unknown, a value is invalid, or two settings exclude each other.
    """
    hints = get_type_hints(TrainConfig)
    top_level: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, dot, key = name.partition(".")
        if (section if dot else name) not in hints:
            raise ConfigurationError(f"A run has no setting '{name}'.{nearest(name, hints)}")
        if dot:
            sections.setdefault(section, {})[key] = value
        else:
            top_level[name] = value
    section_configs = {name: hints[name](**values) for name, values in sections.items()}
    return TrainConfig(**top_level, **section_configs)

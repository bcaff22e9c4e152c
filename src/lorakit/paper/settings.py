"""Convert settings by dotted name to a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.training.config import TrainConfig


def train_config(settings: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration of a run from settings by dotted name, such as ``lora.rank``.

    Raises:
        ConfigurationError: A setting is unknown, a value is invalid, or two settings exclude each other.
    """
    return TrainConfig(**nested(settings))


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted name as the arguments of a configuration, each section a dictionary."""
    arguments: dict[str, Any] = {}
    for name, value in settings.items():
        section, dot, key = name.partition(".")
        if dot:
            arguments.setdefault(section, {})[key] = value
        else:
            arguments[name] = value
    return arguments

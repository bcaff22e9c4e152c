"""Settings of the commands that read an adapter, alone or on its base."""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.configuration import conform
from lorakit.methods.registry import use_method
from lorakit.models.base_config import BaseConfig


@dataclass(frozen=True, kw_only=True)
class AdapterFileConfig:
    """Settings to read the files of an adapter."""

    method: str | None = None
    """Custom method of an adapter: path/to/file.py:Class."""

    def __post_init__(self) -> None:
        conform(self)
        if self.method is not None:
            use_method(self.method)


@dataclass(frozen=True, kw_only=True)
class AdaptedConfig(AdapterFileConfig):
    """Settings to open an adapter on its base."""

    base: BaseConfig | None = None
    """The base model. Default: the base recorded in the adapter."""
    allow_other_base: bool = False
    """Allow a base other than the one recorded in the adapter."""

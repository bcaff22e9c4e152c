"""Settings that name the base model and how it is computed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from lorakit.configuration import conform, converted, strict
from lorakit.errors import ConfigurationError

NO_NAME = "base.name is not set; name a model, for example --base.name smollm2-135m."
"""Message for commands that read no adapter, which could record the base."""

DType = Literal["auto", "float32", "bfloat16", "nf4", "int8"]


@strict
@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The base model: which one, and how it is computed. Its name alone is enough: `base="minilm-l6"`."""

    shorthand: ClassVar[str] = "name"

    name: str = ""
    """A hub id, a local folder, a .gguf file, or a short name (smollm2-135m, minilm-l6, mpnet-base). Commands that
    read an adapter use the base that it records if this is not set."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    dtype: DType = "auto"
    """Compute precision. auto times products of the base's shapes and takes bfloat16 if they are at least 10% faster
    than in float32, or if float32 does not fit into memory. nf4 and int8 store the weights of the projections in 4 or 8
    bits, and compute in bfloat16 where the processor multiplies it."""
    device: str = "auto"
    """Compute device: auto (a CUDA GPU if there is one, else the CPU), cpu, cuda, cuda:1, mps or xpu."""
    trust_remote_code: bool = False
    """Run Python code from the hub repository. Set it only for repositories that you have read."""

    def __post_init__(self) -> None:
        conform(self, "base")
        if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", self.device):
            raise ConfigurationError(
                f"base.device is {self.device!r}; write auto, cpu, cuda, cuda:1, mps or xpu."
            )


def as_base_config(base: BaseConfig | str | None) -> BaseConfig:
    """Return a base that may be given as its name alone; None is a base without a name.

    Raises:
        ConfigurationError: `base` is something else.
    """
    return BaseConfig() if base is None else converted(base, BaseConfig, "base")

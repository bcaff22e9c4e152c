"""Software versions, machine and model sizes of a run."""

from __future__ import annotations

import datetime
import functools
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.installed import base_parameters, base_weights
from lorakit.formatting import shell_command
from lorakit.models.processor import processor_name
from lorakit.models.sharding import held_bytes, is_sharded

PACKAGES = ("lorakit", "torch", "transformers", "tokenizers", "safetensors")


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of `PACKAGES`; None for a package that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def environment(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Return the command, start time, machine and versions of this session of so many processes."""
    return {
        "command": command(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "processor": processor_name(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "versions": versions(),
    }


def command() -> str:
    """Return the shell command that started this process."""
    program, *arguments = sys.argv or [""]
    path = Path(program)
    words = ["python", *([program] if program else [])]
    if path.name == "__main__.py":  # python -m lorakit, python -m pytest
        words = ["python", "-m", path.parent.name]
    if "lorakit" in (path.name, words[-1]):
        words = ["lorakit"]
    return shell_command([*words, *arguments])


def sizes(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the numbers of trained and base parameters, and the base's memory in bytes.

    If the base is sharded over processes, ``held_bytes`` is the memory of the part in this process.
    """
    tensors = [parameter for _, parameter in base_parameters(model)]
    held = {"held_bytes": held_bytes(tensors)} if any(map(is_sharded, tensors)) else {}
    return {
        "trained_parameters": sum(parameter.numel() for parameter in trained.values()),
        "base_parameters": sum(weight.shape.numel() for _, weight in base_weights(model)),
        "base_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        **held,
    }


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

"""Compile each block of a model separately, for training."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import nn

from lorakit.errors import ConfigurationError
from lorakit.models.blocks import blocks_of
from lorakit.ops.compiling import allow_graphs


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the blocks of `model` in place, with a backend of `torch.compile`, for batches of any length.

    Blocks are compiled instead of the model, because all blocks of a stack share one compilation. The model
    keeps its classes and keys. Functions that the compiler cannot trace (the attention of
    `lorakit.models.faster`) run eagerly between two compiled halves.

    Raises:
        ConfigurationError: The model has no list of blocks, or no compiler is installed, or on a GPU no Triton.
    """
    if backend == "inductor":
        _require_compiler(next(model.parameters()).device)
    blocks = blocks_of(model)
    if not blocks:
        raise ConfigurationError(
            f"compile is true, but {type(model).__name__} has no list of blocks to compile. Set it to false."
        )
    # One block has several graphs: sequence length 1, with and without input gradients, each set of adapters.
    allow_graphs()
    for block in blocks:
        block.compile(dynamic=True, backend=backend)


@contextmanager
def compiled_blocks_idle(model: nn.Module) -> Iterator[None]:
    """Run compiled blocks eagerly: generation has a new shape for every token."""
    compiled = {
        module: call
        for module in model.modules()
        if (call := module._compiled_call_impl) is not None
    }
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def _require_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        if find_spec("triton") is None:  # torch for Windows comes without it
            raise ConfigurationError(
                "compile is true, but the package triton is not installed; torch.compile needs it on a GPU. Install it "
                "(on Windows: pip install triton-windows), or set compile to false."
            )
        return
    chosen = os.environ.get("CXX")
    names, package = (chosen or "g++", "clang++"), "apt-get install g++"
    if sys.platform == "win32":
        names = (chosen or "cl",)
        package = "Build Tools for Visual Studio, whose command prompt finds cl"
    if not any(shutil.which(name) for name in names):
        raise ConfigurationError(
            f"compile is true, but no C++ compiler was found ({', '.join(names)}); torch.compile needs one on a CPU. "
            f"Install one ({package}), name it in the environment variable CXX, or set compile to false."
        )

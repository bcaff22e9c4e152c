"""A model as evaluation runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lorakit.models.compiling import compiled_blocks_idle


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Compute without gradients, dropout and compiled blocks; each module's mode is put back, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), compiled_blocks_idle(model):
            yield
    finally:
        for module, training in modes:  # a module before those inside it, which it sets as well
            if module.training != training:
                module.train(training)

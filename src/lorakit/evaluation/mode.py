"""A model as evaluation runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lorakit.models.compiling import compiled_blocks_idle


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Compute without gradients, dropout and compiled blocks; the model's mode is put back, whatever happens."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), compiled_blocks_idle(model):
            yield
    finally:
        model.train(was_training)

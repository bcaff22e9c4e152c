"""Evaluation mode of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lorakit.models.compiling import compiled_blocks_idle
from lorakit.models.sharding import reset_after_error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Disable gradients, dropout and compiled blocks; restore each module's mode at the end, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), compiled_blocks_idle(model):
            yield
    except Exception:
        reset_after_error(model)
        raise
    finally:
        for module, training in modes:  # parents first: train() also sets the modules inside
            if module.training != training:
                module.train(training)

"""Evaluation restores the mode of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.compute.mode import evaluating


@pytest.mark.parametrize("training", [True, False])
def test_each_module_gets_its_own_mode_back(training: bool) -> None:
    """Dropout in a frozen part is off during training and stays off after an evaluation."""
    model = nn.Sequential(nn.Sequential(nn.Dropout(), nn.Dropout()), nn.Dropout()).train(training)
    model[0].train(not training)
    model[0][1].train(training)
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before

"""`load` logs a warning for each difference that is not an error."""

import logging

import pytest
import tiny_models
import torch

import lorakit


@pytest.fixture
def folder(tmp_path):
    model = tiny_models.build("llama", "causal-lm")
    adapters = lorakit.attach(model, lorakit.LoRA(rank=2), seed=0)
    adapters.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_same_base_has_nothing_to_say(folder, caplog):
    lorakit.load(tiny_models.build("llama", "causal-lm"), folder)
    assert messages(caplog) == []


def test_another_dtype_is_reported(folder, caplog):
    lorakit.load(tiny_models.build("llama", "causal-lm").to(torch.bfloat16), folder)
    assert any("bfloat16" in message for message in messages(caplog))


def test_the_decision_for_another_base_is_logged(folder, caplog):
    other = tiny_models.build("llama", "causal-lm")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(1)
    lorakit.load(other, folder, allow_other_base=True)
    assert any("allow_other_base" in message for message in messages(caplog))

"""`load` logs a warning for each difference that is not an error."""

import logging
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_tokenizer import tiny_tokenizer

import lorakit
from lorakit.errors import AdapterStateError, WrongBaseError


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


def test_another_configuration_is_another_base(folder, caplog):
    def other():
        return tiny_models.build("llama", "causal-lm", rms_norm_eps=0.5)

    with pytest.raises(WrongBaseError, match=r"rms_norm_eps 1e-06 -> 0\.5.*allow_other_base"):
        lorakit.load(other(), folder)
    lorakit.load(other(), folder, allow_other_base=True)
    assert any("allow_other_base is set" in m and "rms_norm_eps" in m for m in messages(caplog))


def test_another_tokenizer_is_reported_where_one_is_known(tmp_path, caplog):
    adapters = lorakit.attach(tiny_models.build("llama"), lorakit.LoRA(rank=2), name="adapter")
    adapters.save(tmp_path / "adapter", tokenizer=tiny_tokenizer())
    for tokenizer in (None, tiny_tokenizer()):
        lorakit.load(tiny_models.build("llama"), tmp_path / "adapter", tokenizer=tokenizer)
    assert messages(caplog) == []
    lorakit.load(
        tiny_models.build("llama"), tmp_path / "adapter", tokenizer=tiny_tokenizer(adds_bos=True)
    )
    assert ["another tokenizer" in message for message in messages(caplog)] == [True]


def test_adapters_of_runs_have_the_names_of_the_runs(tmp_path: Path) -> None:
    attached = lorakit.attach(tiny_models.build("llama"), lorakit.LoRA(rank=2), name="a")
    for folder in ("first/adapter", "second/adapter", "train/adapter", "v1.5"):
        attached.save(tmp_path / folder)
    model = tiny_models.build("llama")
    for folder in ("first/adapter", "second/adapter", "train/adapter", "v1.5"):
        handle = lorakit.load(model, tmp_path / folder)
    assert handle.names == ("first", "second", "train_adapter", "v1_5")
    with pytest.raises(
        AdapterStateError, match=r"named 'first'\. .*\.remove\('first'\) .* \(name='first-2'\)"
    ):
        lorakit.load(model, tmp_path / "first" / "adapter")

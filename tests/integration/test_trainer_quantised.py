"""Checkpoints of transformers' Trainer on a quantised base contain the adapted model and resume to the same one."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from random_adapters import randomise
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from lorakit.adapters import attach, handle_of
from lorakit.errors import AdapterStateError
from lorakit.methods.lora.method import LoRA
from lorakit.models.quantised import quantised_weights
from lorakit.models.quantising import quantise

pytestmark = pytest.mark.filterwarnings(
    # transformers' Trainer requests pinned memory even without an accelerator.
    "ignore:'pin_memory' argument is set as true:UserWarning"
)


def by_lorakit(kind: str, folder: Path) -> PreTrainedModel:
    model = tiny_models.build("llama")
    quantise(model, kind)
    return model


def by_transformers(kind: str, folder: Path) -> PreTrainedModel:
    # bitsandbytes' 4-bit kernel for CPUs needs widths that are multiples of 64.
    wide = tiny_models.build("llama", hidden_size=64, intermediate_size=64, head_dim=16)
    wide.save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, attn_implementation="eager"
    )


def adapted(model: PreTrainedModel) -> PreTrainedModel:
    randomise(attach(model, LoRA(rank=2, targets="attention.qv", dropout=0.1), seed=0))
    return model


def trainer(model: PreTrainedModel, folder: Path, save_strategy: str = "steps") -> Trainer:
    ids = torch.randint(3, 99, (12, 8), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.02,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy=save_strategy,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model=model, args=arguments, train_dataset=rows)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model.eval()(torch.arange(3, 17).view(2, 7)).logits


@pytest.mark.parametrize(
    ("base", "kind"), [(by_lorakit, "nf4"), (by_lorakit, "int8"), (by_transformers, "nf4")]
)
def test_checkpoints_over_a_quantised_base(base, kind, tmp_path: Path) -> None:
    model = adapted(base(kind, tmp_path))
    trainer(model, tmp_path).train()
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint-4", attn_implementation="eager"
    )
    # The merged weights in the file are rounded once, to float32.
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    resumed = adapted(base(kind, tmp_path))
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(dict(quantised_weights(resumed))) == 14
    found, expected = resumed.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_int8_layers_of_transformers_train_without_checkpoints(tmp_path: Path) -> None:
    model = adapted(by_transformers("int8", tmp_path))
    adapters = handle_of(model)
    assert adapters is not None
    before = [p.clone() for p in adapters.trainable_parameters()]
    trainer(model, tmp_path, save_strategy="no").train()
    pairs = zip(before, adapters.trainable_parameters(), strict=True)
    assert not any(one.equal(other) for one, other in pairs)
    with pytest.raises(AdapterStateError, match='save_strategy="no"'):
        trainer(model, tmp_path).train()

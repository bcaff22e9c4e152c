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
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from lorakit.adapters import attach
from lorakit.methods.lora.method import LoRA
from lorakit.models.quantised import quantised_weights
from lorakit.models.quantising import quantise

pytestmark = pytest.mark.filterwarnings(
    # transformers' Trainer requests pinned memory even without an accelerator.
    "ignore:'pin_memory' argument is set as true:UserWarning"
)


def adapted(kind) -> PreTrainedModel:
    model = tiny_models.build("llama")
    quantise(model, kind)
    randomise(attach(model, LoRA(rank=2, targets="attention.qv", dropout=0.1), seed=0))
    return model


def trainer(model: PreTrainedModel, folder: Path) -> Trainer:
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
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model=model, args=arguments, train_dataset=rows)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model.eval()(torch.arange(3, 17).view(2, 7)).logits


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_checkpoints_over_a_quantised_base(kind, tmp_path: Path) -> None:
    model = adapted(kind)
    trainer(model, tmp_path).train()
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint-4", attn_implementation="eager"
    )
    # The merged weights in the file are rounded once, to float32.
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    resumed = adapted(kind)
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(dict(quantised_weights(resumed))) == 14
    found, expected = resumed.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())

"""transformers' Trainer resumes a method that cannot be merged, and from_pretrained rejects its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from method_cases import CASES, Case
from tiny_models import tensors_of
from transformers import Trainer, TrainerCallback, TrainingArguments

from lorakit import attach

pytestmark = [
    # transformers' Trainer asks PyTorch to pin memory where there is no accelerator to pin it for.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


def trainer(case: Case, folder: Path) -> Trainer:
    model = case.model()
    attach(model, case.method, seed=0)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, tiny_models.VOCABULARY, (8, 6), generator=generator)
    batch = case.batch(model)["input_ids"][0].expand(
        8, -1
    )  # virtual tokens where the method has some
    ids = torch.cat([batch, rows], dim=1)
    labels = torch.cat([torch.full_like(batch, -100), rows], dim=1)
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=[
            {"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)
        ],
    )


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["houlsby llama", "lin gpt2"])
def test_checkpoints_resume_and_do_not_load_as_a_model(name: str, tmp_path: Path) -> None:
    whole = trainer(CASES[name], tmp_path / "whole")
    before = tensors_of(whole.model)
    whole.train()
    expected = tensors_of(whole.model)
    trained = [key for key in expected if not torch.equal(expected[key], before[key])]
    assert trained
    assert all(".adapters." in key for key in trained)
    part = trainer(CASES[name], tmp_path / "part")
    part.add_callback(StopAt(2))
    part.train()
    rest = trainer(CASES[name], tmp_path / "part")
    rest.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    actual = tensors_of(rest.model)
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())
    with pytest.raises(ValueError, match="no part of the weights"):
        type(rest.model).from_pretrained(tmp_path / "part" / "checkpoint-4")

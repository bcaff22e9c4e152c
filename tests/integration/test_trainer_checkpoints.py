"""Checkpoints of transformers' Trainer contain the adapted model, and resume to a bit-identical adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_models import assert_same_tensors, logits, tensors_of
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from lorakit.adapters import Adapters, attach
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.method import LoRA
from lorakit.methods.method import Method

STEPS = 6
CASES: dict[str, tuple[str, Method]] = {
    "lora": ("llama", LoRA(rank=2, targets="all-linear", dropout=0.1)),
    "dora": ("llama", LoRA(rank=2, targets="attention.qv", dora=True)),
    "pissa": ("gpt2", LoRA(rank=2, targets="attention", init="pissa")),
    "bias and head": ("gpt2", LoRA(rank=2, bias="all", train_modules="ln_f")),
    "tied embedding": ("gpt2", LoRA(rank=2, targets=("embedding", "mlp"))),
    "full, tied": ("gpt2", FullFineTuning()),
    "stacked experts": ("mixtral", LoRA(rank=2, targets="attention")),
}

pytestmark = [
    # transformers' Trainer requests pinned memory even without an accelerator.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


def dataset() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, tiny_models.VOCABULARY, (12, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def adapted(arch: str, method: Method) -> tuple[PreTrainedModel, Adapters]:
    model = tiny_models.build(arch)
    return model, attach(model, method, seed=0)


def trainer(model: PreTrainedModel, folder: Path, **settings) -> Trainer:
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **(arguments | settings)),
        train_dataset=dataset(),
        eval_dataset=dataset()[:4],
    )


class StopAt(TrainerCallback):
    """Ends a run early, as if it were killed after its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_checkpoints_load_and_resume(case: str, tmp_path: Path) -> None:
    arch, method = CASES[case]
    base = logits(tiny_models.build(arch))
    model, adapters = adapted(arch, method)
    trainer(model, tmp_path / "whole").train()
    expected = tensors_of(model)
    adapted_logits = logits(model.eval())
    assert (adapted_logits - base).abs().max() > 1e-2

    loaded = type(model).from_pretrained(
        tmp_path / "whole" / f"checkpoint-{STEPS}", attn_implementation="eager"
    )
    torch.testing.assert_close(logits(loaded), adapted_logits, atol=2e-4, rtol=0)

    interrupted, _ = adapted(arch, method)
    run = trainer(interrupted, tmp_path / "parts")
    run.add_callback(StopAt(4))
    run.train()
    resumed, resumed_adapters = adapted(arch, method)
    assert any(not torch.equal(t, expected[n]) for n, t in tensors_of(interrupted).items())
    trainer(resumed, tmp_path / "parts").train(resume_from_checkpoint=True)
    assert_same_tensors(tensors_of(resumed), expected)
    assert torch.equal(logits(resumed.eval()), adapted_logits)

    for handle, of in ((adapters, model), (resumed_adapters, resumed)):
        handle.detach()
        assert_same_tensors(tensors_of(of), tensors_of(tiny_models.build(arch)))


@pytest.mark.parametrize("case", ["lora", "bias and head", "full, tied"])
def test_the_best_checkpoint_is_put_back(case: str, tmp_path: Path) -> None:
    arch, method = CASES[case]
    model, adapters = adapted(arch, method)
    seen: dict[int, dict[str, Tensor]] = {}

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs) -> None:
            seen[state.global_step] = tensors_of(model)

    run = trainer(
        model,
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # select the worst checkpoint, so that it is not the last one
        eval_strategy="steps",
        eval_steps=2,
    )
    run.add_callback(Watch())
    run.train()
    best = int(Path(run.state.best_model_checkpoint).name.rpartition("-")[2])
    assert best < STEPS
    assert any(not torch.equal(seen[best][name], tensor) for name, tensor in seen[STEPS].items())
    assert_same_tensors(tensors_of(model), seen[best])
    adapters.detach()
    assert_same_tensors(tensors_of(model), tensors_of(tiny_models.build(arch)))


@pytest.mark.slow
def test_gradient_checkpointing_trains_the_same(tmp_path: Path) -> None:
    """With a frozen base, reentrant checkpointing would see no input that requires a gradient."""
    results = []
    fields = TrainingArguments.__dataclass_fields__  # renamed within transformers 5
    field = next(f for f in ("activation_checkpointing", "gradient_checkpointing") if f in fields)
    for enabled in (False, True):
        model, _ = adapted("llama", LoRA(rank=2, targets="all-linear"))
        settings = {"save_strategy": "no", field: enabled}
        trainer(model, tmp_path / str(enabled), **settings).train()
        results.append(tensors_of(model))
    assert any(n.endswith("lora_B") and t.abs().max() > 0 for n, t in results[0].items())
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_vision_model_resumes(tmp_path: Path) -> None:
    """The checkpoint has other tensor names than the model (an older layout), but the adapter must resume."""
    generator = torch.Generator().manual_seed(0)
    images = [
        {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": i % 3}
        for i in range(8)
    ]
    method = LoRA(rank=2, targets="attention.qv", train_modules="classifier")

    def run(folder: str, stop: int | None = None, resume: bool = False) -> dict[str, Tensor]:
        model, _ = adapted("vit", method)
        one = trainer(model, tmp_path / folder)
        one.train_dataset = images
        if stop:
            one.add_callback(StopAt(stop))
        one.train(resume_from_checkpoint=resume)
        return tensors_of(model)

    expected = run("whole")
    run("parts", stop=4)
    assert_same_tensors(run("parts", resume=True), expected)

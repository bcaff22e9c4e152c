"""TRL as a system of the benchmark: it trains on the same batches, and computes the same loss as PEFT in Trainer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_tokenizer import tiny_tokenizer

from benchmarks.examples import IGNORED, Prepared
from benchmarks.measure import held_out_loss
from benchmarks.systems import peft_trainer, trl_trainer
from benchmarks.training import PRECISIONS, trl_settings
from benchmarks.workloads import WORKLOADS, Workload

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # inside TRL
]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    """Return three batches of three examples of different lengths, for a tiny Llama."""
    tokenizer = tiny_tokenizer()
    base = tmp_path / "base"
    model = tiny_models.build("llama", vocab_size=len(tokenizer))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    generator = random.Random(0)

    def example() -> dict[str, Any]:
        tokens = [generator.randrange(4, len(tokenizer)) for _ in range(generator.randint(6, 20))]
        prompt = generator.randint(1, 4)
        return {"input_ids": tokens, "labels": [IGNORED] * prompt + tokens[prompt:]}

    return Prepared(
        workload=Workload(name="tiny", title="Tiny", batch_size=3, learning_rate=0.05),
        folder=tmp_path,
        base=str(base),
        source="random",
        examples=[example() for _ in range(9)],
        held_out=[example() for _ in range(4)],
        batches={
            "plain": [[0, 1, 2], [3, 4, 5], [6, 7, 8]],
            "bucketed": [[8, 0, 4], [1, 2, 3], [5, 6, 7]],
        },
        pad_id=tokenizer.pad_token_id,
    )


def test_it_trains_on_the_batches_of_the_row(prepared: Prepared, tmp_path: Path) -> None:
    trainer = trl_trainer.sft_trainer(prepared, {"defaults": True, "order": "bucketed"}, tmp_path)
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == 3
    for batch, examples in zip(batches, prepared.in_order("bucketed"), strict=True):
        expected = prepared.collate(examples)
        assert {name: tensor.tolist() for name, tensor in batch.items()} == {
            name: tensor.tolist() for name, tensor in expected.items()
        }


def test_the_defaults_are_those_of_trl(prepared: Prepared, tmp_path: Path) -> None:
    trainer = trl_trainer.sft_trainer(prepared, {"defaults": True, "order": "plain"}, tmp_path)
    arguments = trainer.args
    assert arguments.bf16
    assert arguments.gradient_checkpointing
    assert not arguments.padding_free
    assert not arguments.packing
    settings = {"precision": "bfloat16", "order": "plain"}
    chosen = trl_trainer.sft_trainer(prepared, settings, tmp_path)
    assert not chosen.args.bf16
    assert not chosen.args.gradient_checkpointing
    weights = {p.dtype for p in chosen.model.parameters() if not p.requires_grad}
    assert weights == {torch.bfloat16}


@pytest.mark.parametrize("padding_free", [False, True])
def test_it_learns_what_peft_learns(prepared: Prepared, tmp_path: Path, padding_free: bool) -> None:
    """Padding-free batches keep the examples separate, or their loss and gradients would differ."""
    settings: dict[str, Any] = {"precision": "float32", "order": "plain"}
    of_peft = peft_trainer.train(prepared, settings, tmp_path / "peft")
    settings["padding_free"] = padding_free
    of_trl = trl_trainer.train(prepared, settings, tmp_path / "trl")
    losses = [held_out_loss(trained.in_float32(), prepared) for trained in (of_peft, of_trl)]
    untrained = held_out_loss(
        tiny_models.build("llama", vocab_size=len(tiny_tokenizer())), prepared
    )
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert abs(losses[0] - untrained) > 1e-3


def test_the_settings_that_run() -> None:
    rows = {workload.name: workload for workload in WORKLOADS}
    assert trl_settings(rows["mrpc"], every=True) == []
    names = [system.name for system in trl_settings(rows["e2e"], every=True)]
    assert len(set(names)) == len(names) == 1 + len(PRECISIONS) + 1
    short = [system.name for system in trl_settings(rows["e2e-grouped"], every=False)]
    assert short == ["TRL, defaults", "TRL, bf16 weights, grouped"]

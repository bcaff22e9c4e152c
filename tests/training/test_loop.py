"""Results of training runs, and the files they write."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_runs
import torch
import yaml
from safetensors.torch import load_file
from tiny_runs import adapter_bytes, metrics
from tiny_tokenizer import tiny_tokenizer
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from lorakit.compute import base as opening
from lorakit.compute.adapter_file import AdapterFile
from lorakit.data import DataConfig
from lorakit.errors import ConfigurationError, DataError, LorakitError
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.method import LoRA
from lorakit.models.base_config import BaseConfig
from lorakit.models.compiling import compile_blocks
from lorakit.training import loggers, setup, validation
from lorakit.training.checkpoint import State
from lorakit.training.config import HeldOutConfig, OptimizerConfig
from lorakit.training.distributed import Processes
from lorakit.training.loop import train
from lorakit.training.noise import seed_batch
from lorakit.training.optimizer import build_optimizer
from lorakit.training.progress import first_lines
from lorakit.training.setup import enable_gradient_checkpointing, prepare

CONSTANT = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup=0, clip=0)


def test_a_run_learns_and_leaves_what_is_documented(tmp_path: Path, base: str) -> None:
    config = tiny_runs.config(tmp_path, base, evaluation=HeldOutConfig(samples=3, max_new_tokens=4))
    result = train(config)
    run = tmp_path / "run"
    assert {entry.name for entry in run.iterdir() if entry.name[0] != "."} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "samples.jsonl",
        "result.json",
        "checkpoints",
        "best",
        "adapter",
    }
    assert result.steps == 18
    tokenizer = tiny_tokenizer()
    texts = [row["prompt"] + row["completion"] for row in tiny_runs.pairs(72)]
    ends = len(texts)  # each has one more token, the end
    assert result.tokens == 2 * (sum(map(len, tokenizer(texts)["input_ids"])) + ends)
    assert result.scores["loss"] < 0.9 * result.scores_before["loss"]
    assert result.scores["perplexity"] == pytest.approx(math.exp(result.scores["loss"]))
    assert result.best_scores["loss"] == min(r["loss"] for r in metrics(run, "validation")[1:])
    assert [r["step"] for r in metrics(run, "train")] == list(range(1, 19))
    assert [r["step"] for r in metrics(run, "validation")] == [0, 9, 18]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [0] * 3 + [9] * 3 + [18] * 3
    assert set(samples[0]) == {"step", "prompt", "output", "references", "special_tokens"}
    session = json.loads((run / "environment.json").read_text())["sessions"][0]
    assert session["versions"]["torch"] == version("torch")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000015", "step-000018"]
    for folder in ("adapter", "best"):
        files = {entry.name for entry in (run / folder).iterdir()}
        assert {"adapter_model.safetensors", "lorakit.json", "tokenizer.json"} <= files
    recorded = AdapterFile.read(run / "adapter").stored.provenance  # the adapter's card shows these
    for name in ("train_loss", "scores", "scores_before"):
        assert recorded[name] == getattr(result, name)
    assert recorded["step"] == 18
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["base"]["dtype"] == "float32"
    assert settings["lora"]["rank"] == 8
    assert "resume" not in settings


def test_the_totals_of_a_run_are_sums_over_its_steps() -> None:
    state = State()
    for loss, tokens in ((2.0, 10), (1.5, 30)):
        state.advance(
            loss,
            tokens=tokens,
            computed_tokens=tokens - 2,
            seconds=tokens / 8,
            processor_seconds=tokens / 4,
        )
    assert (state.step, state.train_loss, state.losses) == (2, 1.5, [2.0, 1.5])
    assert (state.tokens, state.computed_tokens) == (40, 36)
    assert (state.seconds, state.processor_seconds) == (5.0, 10.0)


@pytest.mark.slow
def test_the_same_settings_give_the_same_bytes_and_another_seed_others(tmp_path, base) -> None:
    outputs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = tiny_runs.config(tmp_path, base, output=str(tmp_path / name), seed=seed)
        train(config)
        outputs.append(adapter_bytes(tmp_path / name))
    assert outputs[0] == outputs[1] != outputs[2]


def step_gradients(config, batches: list[list[int]]) -> dict[str, torch.Tensor]:
    """Return the gradients of one step over `batches` of example indices."""
    job = prepare(config)
    job.model.eval()  # without dropout
    collated = [job.collate([job.train[i] for i in batch]) for batch in batches]
    with torch.no_grad():
        for name, parameter in job.parameters.items():
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
            )
            assert "lora" in name or "vectors" in name
    targets = sum(job.objective.count(batch) for batch in collated)
    for batch in collated:
        (job.objective.loss_sum(job.model, batch) / targets).backward()
    return {name: p.grad for name, p in job.parameters.items() if p.grad is not None}


def test_four_batches_of_four_are_one_batch_of_sixteen(tmp_path: Path, base: str) -> None:
    config = tiny_runs.config(tmp_path, base)
    # Completions have very different lengths, so a mean of batch means would differ.
    rows = [{"prompt": "river:", "completion": " pub" * (1 + 7 * (i % 2))} for i in range(16)]
    tiny_runs.write_rows(tmp_path / "train.jsonl", rows)
    whole = step_gradients(config, [list(range(16))])
    parts = step_gradients(config, [[i, i + 2, i + 4, i + 6] for i in (0, 1, 8, 9)])
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "lora+prefix_embedding"])
def test_conversations_of_several_turns_are_packed(tmp_path: Path, method: str) -> None:
    base = tiny_runs.save_base(tmp_path / "base", max_position_embeddings=128)
    turns = [("The river?", "A pub."), ("Cheap?", "Yes."), ("And the park?", "It is near.")]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    rows = [{"messages": messages[:length]} for length in (6, 4, 6, 2)]
    tiny_runs.write_rows(tmp_path / "train.jsonl", rows)
    tiny_runs.write_rows(tmp_path / "validation.jsonl", rows[:1])
    config = tiny_runs.config(tmp_path, base, method=method)
    job = prepare(config)
    assert job.computation.packed
    assert job.computation.notes[0] == "shared prefixes computed once"
    batches = [[0, 1], [2, 3]]
    packed = step_gradients(config, batches)
    separate = step_gradients(dataclasses.replace(config, packing=False), batches)
    assert packed.keys() == separate.keys()
    for name, gradient in separate.items():
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("split", [None, "train", "validation"])
def test_a_window_that_one_long_example_exceeds_rules_out_packing(
    tmp_path: Path, split: str | None
) -> None:
    base = tiny_runs.save_base(tmp_path / "base", "mistral", sliding_window=16)
    config = tiny_runs.config(tmp_path, base)
    short = {"prompt": "pub:", "completion": " park"}
    for name in ("train", "validation"):
        long = {**short, "completion": " park" * 12} if name == split else short
        tiny_runs.write_rows(tmp_path / f"{name}.jsonl", [short, short, long])
    assert ("reaches back 16 tokens" if split else "computed once") in prepare(
        config
    ).computation.notes[0]


CUTS = ((8, 1), (4, 2), (2, 4), (3, 3))
"""Batch sizes and accumulations. The first three have 8 examples in a step, the last 9."""


def unequal_rows(count: int) -> list[dict[str, str]]:
    """Rows of 24 prompts, whose completions have 1 to 15 words."""
    rows = tiny_runs.pairs(24)
    return [
        {**rows[i % 24], "completion": rows[i % 24]["completion"] * (1 + 7 * (i % 3))}
        for i in range(count)
    ]


@pytest.mark.parametrize("sampling", ["random", "grouped"])
def test_a_step_has_the_same_examples_however_it_is_cut(tmp_path, base, sampling) -> None:
    tiny_runs.write_rows(tmp_path / "train.jsonl", unequal_rows(75))
    tiny_runs.write_rows(tmp_path / "validation.jsonl", tiny_runs.pairs(2))
    plans = []
    for batch_size, accumulation in CUTS:
        config = tiny_runs.config(
            tmp_path, base, batch_size=batch_size, accumulation=accumulation, sampling=sampling
        )
        job = prepare(config)
        steps = list(job.step_plan.steps())
        for step in steps:
            batches = job.share(step)
            assert [i for batch in batches for i in batch] == step
            assert max(map(len, batches)) == min(batch_size, len(step))
        plans.append(steps)
    assert plans[0] == plans[1] == plans[2] != plans[3]
    for epoch in (plans[0][:10], plans[0][10:]):
        assert sorted(map(len, epoch)) == [3, *[8] * 9]
        assert sorted(i for step in epoch for i in step) == list(range(75))


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
def test_every_cut_of_a_step_trains_the_same_weights(tmp_path: Path, packing: bool) -> None:
    """The loss and the weights of two epochs differ by float32 rounding only: by less than 1e-5 of their size."""
    base = tiny_runs.save_base(tmp_path / "base")  # without dropout
    tiny_runs.write_rows(tmp_path / "train.jsonl", unequal_rows(75))
    tiny_runs.write_rows(tmp_path / "validation.jsonl", tiny_runs.pairs(2))
    losses, weights = [], []
    for batch_size, accumulation in CUTS[:3]:
        run = tmp_path / f"{batch_size}x{accumulation}"
        train(
            tiny_runs.config(
                tmp_path,
                base,
                output=str(run),
                batch_size=batch_size,
                accumulation=accumulation,
                packing=packing,
                optimizer=CONSTANT,
                evaluation=HeldOutConfig(),
            )
        )
        losses.append([r["loss"] for r in metrics(run, "train")])
        weights.append(load_file(run / "adapter" / "adapter_model.safetensors"))
    assert losses[0][0] > 1.1 * losses[0][-1]
    for loss, tensors in zip(losses[1:], weights[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        for name, expected in weights[0].items():
            assert (tensors[name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_loss_in_metrics_is_the_mean_over_targets(
    tmp_path: Path, base: str, smoothing: float
) -> None:
    """Label smoothing is in the training loss and not in the held-out loss."""
    config = tiny_runs.config(
        tmp_path, base, max_steps=1, seed=5, packing=False, label_smoothing=smoothing
    )
    job = prepare(config)
    job.model.train()
    (step,) = job.step_plan.steps()
    batches = [job.collate([job.train[i] for i in indices]) for indices in job.share(step)]
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    total, count = 0.0, 0
    for number, (batch, model_inputs) in enumerate(zip(batches, inputs, strict=True)):
        seed_batch(job, 0, number)
        logits = job.model(**model_inputs).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=smoothing
        ).item()
        count += int((labels != -100).sum())
    job.model.eval()
    with torch.no_grad():
        held_out = [tiny_runs.summed_loss(job.model, example) for example in job.validation]
    losses, counts = zip(*held_out, strict=True)
    result = train(config)
    assert metrics(tmp_path / "run", "train")[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result.scores_before["loss"] == pytest.approx(float(sum(losses)) / sum(counts), rel=1e-5)


def test_trained_parameters_are_the_adapters_alone_and_the_base_stays(tmp_path, base) -> None:
    job = prepare(tiny_runs.config(tmp_path, base))
    assert {name.rsplit(".", 1)[-1] for name in job.parameters} == {"lora_A", "lora_B"}
    assert len(job.parameters) == 2 * 2 * 2  # two layers, q and v, A and B
    assert all(p.dtype == torch.float32 for p in job.parameters.values())


@pytest.mark.slow
def test_early_stopping_waits_for_patience_and_keeps_the_best(tmp_path: Path, base: str) -> None:
    # At this learning rate the loss soon rises.
    config = tiny_runs.config(
        tmp_path,
        base,
        epochs=20,
        optimizer=OptimizerConfig(learning_rate=0.3, schedule="constant", warmup=0),
        evaluation=HeldOutConfig(every=1, patience=3),
    )
    result = train(config)
    scores = metrics(tmp_path / "run", "validation")[1:]
    best = min(range(len(scores)), key=lambda i: scores[i]["loss"])
    assert result.stopped_early
    assert len(scores) == best + 1 + 3
    assert result.steps == scores[-1]["step"] < 180
    assert result.best_step == scores[best]["step"]
    assert adapter_bytes(tmp_path / "run", "best") != adapter_bytes(tmp_path / "run")
    for folder, scores in (("best", result.best_scores), ("adapter", result.scores)):
        assert AdapterFile.read(tmp_path / "run" / folder).stored.provenance["scores"] == scores


@pytest.mark.slow
def test_best_adapter_has_the_score_that_was_recorded_for_it(tmp_path: Path, base: str) -> None:
    config = tiny_runs.config(
        tmp_path,
        base,
        optimizer=OptimizerConfig(learning_rate=0.3),
        evaluation=HeldOutConfig(every=2),
    )
    result = train(config)
    again = tiny_runs.config(
        tmp_path,
        base,
        output=str(tmp_path / "again"),
        from_adapter=str(tmp_path / "run" / "best"),
        max_steps=1,
    )
    assert train(again).scores_before["loss"] == pytest.approx(result.best_scores["loss"], rel=1e-5)


@pytest.mark.slow
def test_from_adapter_starts_from_its_weights_with_a_new_optimizer(tmp_path, base) -> None:
    first = train(tiny_runs.config(tmp_path, base))
    config = tiny_runs.config(
        tmp_path, base, output=str(tmp_path / "second"), from_adapter=str(first.adapter)
    )
    second = train(config)
    assert second.scores_before["loss"] == pytest.approx(first.scores["loss"], rel=1e-5)
    assert metrics(tmp_path / "second", "train")[0]["step"] == 1
    assert second.scores["loss"] < first.scores["loss"]


def test_lora_plus_changes_the_result(tmp_path: Path, base: str) -> None:
    job = prepare(tiny_runs.config(tmp_path, base))
    optimizer = build_optimizer(job.parameters, OptimizerConfig(lr_ratio=16), 1e-3)
    peaks = {name: g["peak"] for g in optimizer.param_groups for name in g["names"]}
    assert peaks == {
        name: pytest.approx(1.6e-2 if name.endswith("lora_B") else 1e-3) for name in job.parameters
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_bfloat16_keeps_float32_masters(tmp_path: Path, base: str, method: str) -> None:
    config = tiny_runs.config(
        tmp_path,
        base,
        base=BaseConfig(name=base, dtype="bfloat16", device="cpu"),
        method=method,
        max_steps=4,
    )
    job = prepare(config)
    assert all(p.dtype == torch.float32 for p in job.parameters.values())
    result = train(config)
    assert result.scores["loss"] < result.scores_before["loss"]


def test_full_fine_tuning_trains_the_base(tmp_path: Path, base: str) -> None:
    config = tiny_runs.config(tmp_path, base, method="full", max_steps=4)
    names = set(prepare(config).parameters)
    assert len(names) == len(list(tiny_models.build("llama").parameters()))
    result = train(config)
    assert result.scores["loss"] < result.scores_before["loss"]


def test_full_fine_tuning_of_the_top_layer(tmp_path: Path, base: str) -> None:
    config = tiny_runs.config(tmp_path, base, method="full", full=FullFineTuning(top_layers=1))
    assert all("layers.1." in name for name in prepare(config).parameters)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_classification_trains_the_head_too(tmp_path: Path, arch: str) -> None:
    base = tiny_runs.save_base(tmp_path / "base", arch, "base")
    tiny_runs.write_rows(tmp_path / "labels.jsonl", tiny_runs.labelled(80))
    config = tiny_runs.config(
        tmp_path,
        base,
        data=DataConfig(train=str(tmp_path / "labels.jsonl"), validation_fraction=0.2),
        evaluation=HeldOutConfig(metric="accuracy"),
        optimizer=OptimizerConfig(learning_rate=2e-2),
        epochs=10,
    )
    trained = {name for name in prepare(config).parameters if "lora" not in name}
    head = "score" if arch == "llama" else "classifier"
    assert trained
    assert all(name.startswith(head) for name in trained)
    result = train(config)
    assert set(result.scores) == {"loss", "accuracy", "f1", "matthews"}
    assert result.best_scores["accuracy"] >= max(0.8, result.scores_before["accuracy"] + 0.2)


def test_a_score_that_is_no_number_ends_the_run_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task of the user may return NaN; the run stops before it trains a step."""

    def undefined(*args: Any, **settings: Any) -> Any:
        evaluation = held_out(*args, **settings)
        return dataclasses.replace(evaluation, scores={**evaluation.scores, "kappa": math.nan})

    held_out = validation.held_out
    monkeypatch.setattr(validation, "held_out", undefined)
    config = tiny_runs.config(tmp_path, tiny_runs.save_base(tmp_path / "base"))
    with pytest.raises(
        LorakitError,
        match=r"The kappa of the validation data is nan.*Return 0 where kappa is undefined",
    ):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_regression_reports_correlations(tmp_path: Path) -> None:
    base = tiny_runs.save_base(tmp_path / "base", "bert", "base")
    rows = [
        {"text": row["text"], "score": 4.0 * row["label"] + 0.5} for row in tiny_runs.labelled(80)
    ]
    tiny_runs.write_rows(tmp_path / "scores.jsonl", rows)
    config = tiny_runs.config(
        tmp_path,
        base,
        data=DataConfig(train=str(tmp_path / "scores.jsonl"), validation_fraction=0.2),
        evaluation=HeldOutConfig(metric="pearson"),
        optimizer=OptimizerConfig(learning_rate=2e-2),
        epochs=6,
    )
    result = train(config)
    assert set(result.scores) == {"loss", "pearson", "spearman", "mse"}
    assert result.scores["loss"] == pytest.approx(result.scores["mse"], rel=1e-5)
    assert result.best_scores["pearson"] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("arch", tiny_models.ENCODER_DECODERS)
def test_encoder_decoders_learn_completions(tmp_path: Path, arch: str) -> None:
    base = tiny_runs.save_base(tmp_path / "base", arch)
    config = tiny_runs.config(
        tmp_path, base, evaluation=HeldOutConfig(samples=2, max_new_tokens=4), max_steps=9
    )
    result = train(config)
    assert result.scores["loss"] < result.scores_before["loss"] - 0.2
    assert (tmp_path / "run" / "samples.jsonl").read_text().count("\n") == 4


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_weights(tmp_path: Path, base: str) -> None:
    for name, checkpointing in (("off", False), ("on", True)):
        train(
            tiny_runs.config(
                tmp_path,
                base,
                output=str(tmp_path / name),
                gradient_checkpointing=checkpointing,
                max_steps=3,
            )
        )
    assert adapter_bytes(tmp_path / "off") == adapter_bytes(tmp_path / "on")


def test_gradient_checkpointing_of_a_model_without_it_is_refused() -> None:
    config = OpenAIGPTConfig(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8)
    with pytest.raises(
        ConfigurationError, match=r"true, but OpenAIGPTLMHeadModel does not .*Set it"
    ):
        enable_gradient_checkpointing(OpenAIGPTLMHeadModel(config))


@pytest.mark.slow
def test_without_validation_data_there_are_no_scores_and_no_best(tmp_path: Path, base: str) -> None:
    config = tiny_runs.config(tmp_path, base)
    config = dataclasses.replace(
        config, data=DataConfig(train=config.data.train), evaluation=HeldOutConfig()
    )
    result = train(config)
    assert result.scores == {}
    assert result.best is None
    assert not (tmp_path / "run" / "best").exists()


def test_a_diverging_loss_stops_with_the_step(tmp_path: Path, base: str) -> None:
    config = tiny_runs.config(
        tmp_path,
        base,
        method="full",
        optimizer=OptimizerConfig(learning_rate=1e30, clip=0, warmup=0),
    )
    with pytest.raises(LorakitError, match=r"diverged at step \d+.*learning_rate"):
        train(config)
    assert not (tmp_path / "run" / "result.json").exists()


def test_tensorboard_gets_the_metrics(tmp_path: Path, base: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_runs.config(tmp_path, base, loggers=("tensorboard",), max_steps=3))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = {
        name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.scalars.Keys()
    }
    expected: dict[str, list[tuple[int, float]]] = {}
    for split, steps in (("train", [1, 2, 3]), ("validation", [0, 3])):
        records = metrics(tmp_path / "run", split)
        assert [record["step"] for record in records] == steps
        for name in records[0].keys() - {"step", "split"}:
            values = [record[name] for record in records]
            expected[f"{split}/{name}"] = [*zip(steps, np.float32(values).tolist(), strict=True)]
    assert found == expected
    assert {"train/loss", "train/learning_rate", "validation/loss"} <= found.keys()


def test_weights_and_biases_gets_the_metrics(tmp_path: Path, base: str, monkeypatch) -> None:
    logged: list[tuple[int, dict]] = []
    axes: dict[str, str | None] = {}
    run = SimpleNamespace(
        define_metric=lambda name, step_metric=None: axes.update({name: step_metric}),
        log=lambda values: logged.append((values.pop("step"), values)),
        finish=lambda exit_code: logged.append((-1 - exit_code, {})),
    )
    opened: dict = {}
    wandb = SimpleNamespace(
        login=lambda: None, init=lambda **settings: opened.update(settings) or run
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(tiny_runs.config(tmp_path, base, loggers=("wandb",), max_steps=2))
    assert opened["name"] == "run"
    assert opened["config"]["lora"]["rank"] == 8
    assert axes == {"step": None, "*": "step"}
    assert [step for step, _ in logged] == [0, 1, 2, 2, -1]
    assert {"train/loss", "train/learning_rate"} <= logged[1][1].keys()
    assert {"validation/loss", "validation/perplexity"} == logged[0][1].keys()


def test_an_error_of_weights_and_biases_does_not_end_the_run(
    tmp_path: Path, base: str, monkeypatch, caplog
) -> None:
    """Its service process can end. A run that then fails is not marked as finished."""
    logged, codes = [], []

    def log(values: dict) -> None:
        logged.append(values["step"])
        if logged[-1] == 1:
            raise BrokenPipeError("the service has ended")

    run = SimpleNamespace(
        define_metric=lambda *_, **__: None,
        log=log,
        finish=lambda exit_code: codes.append(exit_code),
    )
    wandb = SimpleNamespace(login=lambda: None, init=lambda **_: run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = tiny_runs.config(tmp_path, base, loggers=("wandb",), max_steps=3)
    with monkeypatch.context() as patch:
        tiny_runs.crash_in_step(patch, 3)
        with pytest.raises(tiny_runs.Crash):
            train(config)
    assert logged == [0, 1]
    assert codes == [1]
    (message,) = [r.getMessage() for r in caplog.records if "Weights & Biases" in r.getMessage()]
    assert "from step 1 on, which metrics.jsonl has: the service has ended." in message
    assert [record["step"] for record in metrics(tmp_path / "run", "train")] == [1, 2]


def test_a_logger_that_does_not_close_leaves_the_run_finished(
    tmp_path: Path, base: str, monkeypatch, caplog
) -> None:
    """Weights & Biases without a network."""

    def finish(exit_code: int) -> None:
        assert exit_code == 0
        raise ConnectionError("no route to host")

    run = SimpleNamespace(define_metric=lambda *_, **__: None, log=print, finish=finish)
    wandb = SimpleNamespace(login=lambda: None, init=lambda **_: run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    result = train(tiny_runs.config(tmp_path, base, loggers=("wandb",), max_steps=1))
    assert result.adapter.is_dir()
    assert "WeightsAndBiases may lack the last numbers" in caplog.text
    assert "no route to host" in caplog.text


def test_a_logger_that_cannot_be_opened_closes_those_before_it(tmp_path: Path, monkeypatch) -> None:
    closed = []
    opened = SimpleNamespace(close=lambda *, failed: closed.append(failed))
    monkeypatch.setattr(loggers, "TensorBoard", lambda *_, **__: opened)

    def refuse(*_: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(loggers, "WeightsAndBiases", refuse)
    config = SimpleNamespace(loggers=("tensorboard", "wandb"), as_dict=dict)
    run: Any = SimpleNamespace(path=tmp_path, metrics=None, config=config)
    state, processes = State(), SimpleNamespace(is_first=True)
    with pytest.raises(ConnectionError), loggers.Loggers(run, state, processes):  # type: ignore[arg-type]
        pass
    assert closed == [True]


@pytest.mark.parametrize("way", [{"overwrite": True}, {"resume": True, "max_steps": 2}], ids=str)
def test_a_logger_that_cannot_start_leaves_the_old_run(tmp_path, base, monkeypatch, way) -> None:
    config = tiny_runs.config(tmp_path, base, max_steps=1)
    result = train(config)

    def files() -> dict[Path, bytes]:
        paths = [path for path in result.folder.rglob("*") if path.is_file()]
        return {path: path.read_bytes() for path in paths if path.name[0] != "."}

    before = files()

    def login() -> None:
        raise RuntimeError("api_key not configured (no-tty)")

    for package, message in (
        (None, "pip install wandb"),
        (SimpleNamespace(login=login), r"not configured \(no-tty\)\. Run wandb login"),
    ):
        monkeypatch.setitem(sys.modules, "wandb", package)
        with pytest.raises(ConfigurationError, match=message):
            train(dataclasses.replace(config, loggers=("wandb",), **way))
        assert files() == before


def test_a_metric_of_another_task_is_refused_before_the_base_is_loaded(tmp_path: Path) -> None:
    config = tiny_runs.config(tmp_path, "no/such-base", evaluation=HeldOutConfig(metric="f1"))
    with pytest.raises(ConfigurationError, match=r"task completion, evaluation\.metric is 'f1'"):
        train(config)


def test_long_rows_are_refused_before_the_base_is_loaded(tmp_path, base, monkeypatch) -> None:
    monkeypatch.setattr(opening, "load_base", lambda *_, **__: pytest.fail("loaded the base"))
    config = tiny_runs.config(tmp_path, base)
    data = dataclasses.replace(config.data, max_length=2)
    with pytest.raises(DataError, match="are longer than max_length 2"):
        train(dataclasses.replace(config, data=data))


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "gaussian"])
def test_other_starts_and_dora_train_as_well(tmp_path: Path, base: str, init) -> None:
    lora = LoRA(init=init, dora=init != "pissa", targets=("all-linear",), dropout=0.1)
    result = train(tiny_runs.config(tmp_path, base, lora=lora))
    assert result.scores["loss"] < 0.9 * result.scores_before["loss"]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # dynamo inspects its inputs
)
def test_a_compiled_run_trains_the_same_weights(tmp_path: Path, monkeypatch) -> None:
    """With a backend that runs the traced graph, and needs no compiler."""
    # Without dropout: compiled blocks draw other random numbers.
    base = tiny_runs.save_base(tmp_path / "base", num_hidden_layers=1)
    traced = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        traced.append(graph)
        return graph

    monkeypatch.setattr(setup, "compile_blocks", partial(compile_blocks, backend=backend))
    torch._dynamo.reset()
    weights = []
    for compiled in (False, True):
        output = tmp_path / f"compiled-{compiled}"
        settings = {"max_steps": 2, "accumulation": 1, "compile": compiled, "output": str(output)}
        train(tiny_runs.config(tmp_path, base, **settings))
        weights.append(load_file(output / "adapter/adapter_model.safetensors"))
        assert bool(traced) == compiled
    torch._dynamo.reset()
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


def test_a_template_with_an_escaped_line_feed_is_said(tmp_path, base) -> None:
    """A shell passes "...\\n..." as it is, and the run would train on that text."""
    config = tiny_runs.config(tmp_path, base)
    for template, said in ((r"Q:\n{prompt}", True), ("Q:\n{prompt}", False)):
        data = dataclasses.replace(config.data, prompt_template=template)
        lines = "\n".join(first_lines(prepare(dataclasses.replace(config, data=data))))
        assert ("prompt_template contains a backslash and an n" in lines) == said


def test_a_warm_up_beyond_the_last_step_is_said(tmp_path, base) -> None:
    def lines(warmup: float) -> str:
        rate = OptimizerConfig(warmup=warmup)
        job = prepare(tiny_runs.config(tmp_path, base, max_steps=4, optimizer=rate))
        return "\n".join(first_lines(job))

    assert "optimizer.warmup of 20 steps is longer than the run" in lines(20)
    assert "ends at 20% of its peak. To reach the peak, set at most 4." in lines(20)
    assert "optimizer.warmup" not in lines(4)


def test_more_processes_than_examples_in_a_step_are_said(tmp_path, base) -> None:
    job = prepare(tiny_runs.config(tmp_path, base, batch_size=3, accumulation=2, max_steps=1))

    def lines(count: int) -> str:
        job.processes = Processes(count=count)
        return "\n".join(first_lines(job))

    said = "a step has 6 examples, so 2 of 8 processes have none: "
    assert f"{said}start fewer, or in a new run raise batch_size" in lines(8)
    assert "a step has" not in lines(6)
    job.train = dataclasses.replace(job.train, examples=job.train.examples[:5])
    assert "a step has 5 examples, so 1 of 6 processes have none" in lines(6)
    job.config = dataclasses.replace(job.config, shard=True)
    assert f"{said.replace('6', '5').replace('2', '3')}in a new run raise" in lines(8)

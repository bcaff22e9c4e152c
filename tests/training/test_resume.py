"""A resumed run ends with the same bytes as an uninterrupted run."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from rich.console import Console
from scenarios import require_close_weights
from tiny_runs import Crash, adapter_bytes, crash_at, crash_in_step

from lorakit import storage
from lorakit.cli.parsing import parse
from lorakit.compute.adapted import base_of
from lorakit.compute.adapter_file import AdapterFile
from lorakit.compute.batch_size import BatchSize
from lorakit.errors import ConfigurationError, RunFolderError
from lorakit.methods.lora.method import LoRA
from lorakit.models import dtype_choice
from lorakit.models.base_config import BaseConfig
from lorakit.models.dtype_choice import DtypeChoice
from lorakit.training import checkpoint, validation
from lorakit.training import step as optimizer_steps
from lorakit.training.config import CheckpointConfig, HeldOutConfig, OptimizerConfig, TrainConfig
from lorakit.training.job import Job
from lorakit.training.loop import train
from lorakit.training.run_folder import read_settings
from lorakit.training.setup import prepare

STEPS = 18


def settings(folder: Path, base: str, **overrides) -> TrainConfig:
    """A run with all kinds of state: dropout, samples, a best adapter, accumulation."""
    return tiny_runs.config(
        folder,
        base,
        lora=LoRA(dropout=0.2),
        evaluation=HeldOutConfig(every=4, samples=2, max_new_tokens=3),
        **overrides,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, base: str) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(settings(folder, base))
    return folder / "run"


def records(path: Path) -> list[dict]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def assert_same_run(run: Path, other: Path) -> None:
    assert adapter_bytes(run) == adapter_bytes(other)
    assert adapter_bytes(run, "best") == adapter_bytes(other, "best")
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert records(run / name) == records(other / name)
    results = [storage.read_record(f / "result.json", RunFolderError) for f in (run, other)]
    for varying in ("seconds", "processor_seconds", "peak_memory"):
        assert all(result.pop(varying) > 0 for result in results)
    assert results[0] == results[1]
    leftovers = [p for p in run.rglob("*") if ".tmp-" in p.name]
    assert not leftovers


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, STEPS])
def test_a_crash_in_a_step(tmp_path, base, undisturbed, monkeypatch, step: int) -> None:
    config = settings(tmp_path, base)
    with monkeypatch.context() as patch:
        crash_in_step(patch, step)
        with pytest.raises(Crash):
            train(config)
    train(dataclasses.replace(config, resume=True))
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "function", "call"),
    [
        (validation, "held_out", 1),  # before the first step
        (validation, "generated", 2),
        (checkpoint, "write_safetensors", 1),  # the first file of the first checkpoint
        (checkpoint.storage, "write_record", 3),
        (shutil, "rmtree", 1),  # deleting an old checkpoint
    ],
)
def test_a_crash_elsewhere(
    tmp_path, base, undisturbed, monkeypatch, module, function, call
) -> None:
    config = settings(tmp_path, base)
    with monkeypatch.context() as patch:
        crash_at(patch, module, function, call)
        with pytest.raises(Crash):
            train(config)
    train(dataclasses.replace(config, resume=True))
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["clip_gradients", "save_adapter"])
def test_the_best_adapter_is_the_one_of_the_result(tmp_path, base, monkeypatch, place) -> None:
    """Also if a resumed run computes other numbers, as on another processor."""
    config = tiny_runs.config(
        tmp_path,
        base,
        evaluation=HeldOutConfig(every=1),
        checkpoints=CheckpointConfig(every=4),
        max_steps=8,
    )
    with monkeypatch.context() as patch:
        if place == "clip_gradients":  # after seven evaluations, each better than the one before
            crash_at(patch, optimizer_steps, place, 8)
        else:  # between a checkpoint and the best adapter of its step
            crash_at(patch, Job, place, 7)
        with pytest.raises(Crash):
            train(config)
    held_out = validation.held_out

    def worse(*args, **kwargs):
        evaluation = held_out(*args, **kwargs)
        scores = {name: score + 1.0 for name, score in evaluation.scores.items()}
        return dataclasses.replace(evaluation, scores=scores)

    monkeypatch.setattr(validation, "held_out", worse)
    result = train(dataclasses.replace(config, resume=True))
    best = AdapterFile.read(str(tmp_path / "run" / "best")).stored.provenance
    assert (best["step"], best["scores"]) == (result.best_step, result.best_scores)
    assert result.best_step == 7


@pytest.mark.slow
def test_several_crashes_in_one_run(tmp_path, base, undisturbed, monkeypatch) -> None:
    config = dataclasses.replace(settings(tmp_path, base), resume=True)
    for step in (2, 4, 5, 4, 7):
        with monkeypatch.context() as patch:
            crash_in_step(patch, step)
            with pytest.raises(Crash):
                train(config)
    train(config)
    assert_same_run(tmp_path / "run", undisturbed)
    sessions = json.loads((tmp_path / "run" / "environment.json").read_text())["sessions"]
    assert [s["from_step"] for s in sessions] == [0, 0, 3, 6, 9, 15]


def signal_in_step(patch: pytest.MonkeyPatch, step: int, number: int) -> None:
    original, calls = optimizer_steps.clip_gradients, iter(range(1, 100))

    def signalling(*args):
        if next(calls) == step:
            signal.raise_signal(number)
        return original(*args)

    patch.setattr(optimizer_steps, "clip_gradients", signalling)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_ends_the_step_and_writes_a_checkpoint(
    request, tmp_path, base, undisturbed, monkeypatch, capsys, number, error
) -> None:
    config = settings(tmp_path, base)
    # A shell without job control starts background jobs with SIGINT ignored, also pytest.
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    inherited = signal.signal(number, before)
    request.addfinalizer(lambda: signal.signal(number, inherited))
    with monkeypatch.context() as patch:
        signal_in_step(patch, 5, number)
        # A terminal with a live line, on which the command stays on one line.
        patch.setattr("rich.console.Console", partial(Console, force_terminal=True, width=40))
        with pytest.raises(error) as raised:
            train(config)
    assert signal.getsignal(number) == before
    command = f"lorakit train --config {tmp_path / 'run' / 'config.yaml'} --resume"
    resume = f"Resume with resume=True in Python, or with:\n{command}\n"
    assert f"Stopped at step 5. {resume}" in capsys.readouterr().err
    if number == signal.SIGTERM:
        assert raised.value.code == 75
    assert [r["step"] for r in tiny_runs.metrics(tmp_path / "run", "train")][-1] == 5
    assert (tmp_path / "run" / "checkpoints" / "step-000005").is_dir()
    train(dataclasses.replace(config, resume=True))
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(("batch", "stopped"), [(0, 2), (1, 3)])
def test_a_signal_gives_up_a_step_before_its_last_batch(
    tmp_path, base, monkeypatch, capsys, batch: int, stopped: int
) -> None:
    """A step of many batches takes minutes, and a killer waits for seconds."""
    config = tiny_runs.config(tmp_path, base, max_steps=4, evaluation=HeldOutConfig(every=100))
    train(dataclasses.replace(config, output=str(tmp_path / "whole")))
    original = optimizer_steps.seed_batch

    def signalling(job, step, number):
        if (step, number) == (2, batch):
            signal.raise_signal(signal.SIGTERM)
        return original(job, step, number)

    with monkeypatch.context() as patch:
        patch.setattr(optimizer_steps, "seed_batch", signalling)
        with pytest.raises(SystemExit):
            train(config)
    assert f"Stopped at step {stopped}. Resume" in capsys.readouterr().err
    train(dataclasses.replace(config, resume=True))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "step", [4, 12, STEPS]
)  # evaluations are due, and at 12 and 18 checkpoints
def test_an_interrupted_run_evaluates_when_it_resumes(
    tmp_path, base, undisturbed, monkeypatch, step: int
) -> None:
    """It writes one checkpoint and leaves: the system may kill it soon after SIGTERM."""
    config = settings(tmp_path, base)
    saved = []
    with monkeypatch.context() as patch:
        signal_in_step(patch, step, signal.SIGTERM)
        save = checkpoint.save
        patch.setattr(
            checkpoint, "save", lambda *args, **kw: saved.append(args[1].step) or save(*args, **kw)
        )
        with pytest.raises(SystemExit):
            train(config)
    assert saved.count(step) == 1
    evaluated = [record["step"] for record in tiny_runs.metrics(tmp_path / "run", "validation")]
    assert evaluated == list(range(0, step, 4))
    config = dataclasses.replace(config, resume=True)
    with monkeypatch.context() as patch:
        # After the evaluation, whose lines must not be recorded twice.
        crash_at(patch, checkpoint, "write_safetensors", 1)
        with pytest.raises(Crash):
            train(config)
    train(config)
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "work"),
    # At 12 a checkpoint is due too.
    [(0, "generation"), (4, "scoring"), (12, "scoring")],
)
def test_a_signal_ends_an_evaluation_after_a_batch(
    tmp_path, base, undisturbed, monkeypatch, step: int, work: str
) -> None:
    """Samples take minutes. The checkpoint is of the step before, and the resumed run evaluates."""
    config = settings(tmp_path, base)
    at = 1 + step // 4 * {"scoring": 3, "generation": 1}[work]  # batches of each evaluation
    saved, batches = [], []
    with monkeypatch.context() as patch:
        save, fit = checkpoint.save, BatchSize.fit
        patch.setattr(
            checkpoint, "save", lambda *args, **kw: saved.append(args[1].step) or save(*args, **kw)
        )

        def counted(self, *args, during, **kwargs):
            if work in during:
                batches.append(during)
            if len(batches) == at:
                signal.raise_signal(signal.SIGTERM)
            return fit(self, *args, during=during, **kwargs)

        patch.setattr(BatchSize, "fit", counted)
        with pytest.raises(SystemExit):
            train(config)
    assert len(batches) == at
    assert saved.count(step) == (2 if step == 12 else 1)  # also before the evaluation
    assert saved[-1] == step
    evaluated = (
        [r["step"] for r in tiny_runs.metrics(tmp_path / "run", "validation")] if step else []
    )
    assert evaluated == list(range(0, step, 4))
    train(dataclasses.replace(config, resume=True))
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_last_evaluation_that_fails_leaves_the_weights(tmp_path, base, monkeypatch) -> None:
    """A task of the user can fail on a text that only a trained model writes."""
    config = tiny_runs.config(tmp_path, base, max_steps=2)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        crash_at(patch, validation, "held_out", 2)
        with pytest.raises(Crash):
            train(config)
    assert not (run / "result.json").exists()
    stored = AdapterFile.read(str(run / "adapter")).stored
    assert (stored.provenance["step"], stored.provenance["scores"]) == (2, {})
    trained = adapter_bytes(run)
    train(dataclasses.replace(config, resume=True))
    assert adapter_bytes(run) == trained
    assert [record["step"] for record in tiny_runs.metrics(run, "validation")] == [0, 2]
    sessions = json.loads((run / "environment.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, 2]


@pytest.mark.slow
def test_an_ignored_signal_stays_ignored(tmp_path, base, monkeypatch) -> None:
    original = optimizer_steps.clip_gradients
    monkeypatch.setattr(
        optimizer_steps,
        "clip_gradients",
        lambda *a: signal.raise_signal(signal.SIGINT) or original(*a),
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert train(settings(tmp_path, base, max_steps=2)).steps == 2
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_early_stopping_survives_a_crash(tmp_path, base, monkeypatch) -> None:
    settings = {
        "epochs": 20,
        "optimizer": OptimizerConfig(learning_rate=0.3, schedule="constant", warmup=0),
        "evaluation": HeldOutConfig(every=1, patience=3),
    }
    result = train(tiny_runs.config(tmp_path, base, **settings))
    assert result.stopped_early
    config = tiny_runs.config(tmp_path, base, output=str(tmp_path / "other"), **settings)
    with monkeypatch.context() as patch:
        # After the last evaluation but one: two evaluations without a new best are on the count.
        crash_in_step(patch, result.steps)
        with pytest.raises(Crash):
            train(config)
    again = train(dataclasses.replace(config, resume=True))
    assert again.steps == result.steps
    assert adapter_bytes(tmp_path / "other") == adapter_bytes(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoRA(init="pissa", dropout=0.1), LoRA(dora=True, dropout=0.1)])
def test_other_kinds_of_adapter(tmp_path, base, monkeypatch, lora: LoRA) -> None:
    config = tiny_runs.config(tmp_path, base, lora=lora, max_steps=6)
    train(config)
    config = dataclasses.replace(config, output=str(tmp_path / "other"))
    with monkeypatch.context() as patch:
        crash_in_step(patch, 5)
        with pytest.raises(Crash):
            train(config)
    # The checkpoint has the singular vectors, and they are not computed again.
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", None)
        train(dataclasses.replace(config, resume=True))
    assert adapter_bytes(tmp_path / "other") == adapter_bytes(tmp_path / "run")


def half_a_run(folder: Path, base: str, monkeypatch) -> TrainConfig:
    config = settings(folder, base)
    with monkeypatch.context() as patch:
        crash_in_step(patch, 8)
        with pytest.raises(Crash):
            train(config)
    return dataclasses.replace(config, resume=True)


def test_an_unfinished_run_refuses_a_new_run_and_other_settings(
    tmp_path, base, monkeypatch
) -> None:
    config = half_a_run(tmp_path, base, monkeypatch)
    with pytest.raises(RunFolderError, match=r"unfinished run.*resume.*overwrite"):
        train(dataclasses.replace(config, resume=False))
    other = dataclasses.replace(config, batch_size=8, optimizer=OptimizerConfig(learning_rate=1e-3))
    with pytest.raises(ConfigurationError) as raised:
        train(other)
    assert "batch_size was 4 and is 8" in str(raised.value)
    assert "optimizer.learning_rate was 0.02 and is 0.001" in str(raised.value)


@pytest.mark.slow
def test_a_resumed_run_may_have_another_device_other_checkpoints_and_test_data(
    tmp_path, base, undisturbed, monkeypatch
) -> None:
    config = half_a_run(tmp_path, base, monkeypatch)
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("device: cpu", "device: cuda:1"))
    data = dataclasses.replace(config.data, test="owner/name", test_split="test")
    train(dataclasses.replace(config, checkpoints=CheckpointConfig(every=1, keep=1), data=data))
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_run_that_is_out_of_memory_resumes_with_settings_that_need_less(
    tmp_path, base, undisturbed, monkeypatch, capsys
) -> None:
    config = half_a_run(tmp_path, base, monkeypatch)
    evaluation = dataclasses.replace(config.evaluation, batch_size=2)
    config = dataclasses.replace(config, gradient_checkpointing=True, evaluation=evaluation)
    with monkeypatch.context() as patch:
        signal_in_step(patch, 1, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train(config)
    options = "--resume --evaluation.batch_size 2 --gradient_checkpointing true\n"
    assert options in capsys.readouterr().err
    require_close_weights(train(config).adapter, undisturbed / "adapter")


@pytest.mark.slow
def test_the_printed_command_repeats_what_this_session_changed(
    tmp_path, base, undisturbed, monkeypatch, capsys
) -> None:
    """The folder was moved, and memory was short: config.yaml has the first session's settings."""
    first = half_a_run(tmp_path, base, monkeypatch)
    (tmp_path / "run").rename(tmp_path / "moved")
    changed = dataclasses.replace(
        first,
        output=str(tmp_path / "moved"),
        batch_size=2,
        accumulation=4,
        checkpoints=CheckpointConfig(every=2, keep=1),
        optimizer=dataclasses.replace(first.optimizer, on_divergence="rewind"),
        loggers=("tensorboard",),
    )
    with pytest.raises(ConfigurationError, match=rf"--output {tmp_path}/moved; a higher --max"):
        train(dataclasses.replace(first, output=changed.output, seed=1))
    with monkeypatch.context() as patch:
        signal_in_step(patch, 1, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train(changed)
    command = shlex.split(capsys.readouterr().err.splitlines()[-1])
    assert command[:2] == ["lorakit", "train"]
    again = parse(TrainConfig, "train", "Train.", command[2:])
    assert again == changed
    assert train(again).steps == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_a_finished_run_goes_on_with_more_steps(tmp_path, base, capsys, schedule: str) -> None:
    """The schedule extends to the new last step, which the run says; a constant one gives a longer run's weights."""
    rate = OptimizerConfig(learning_rate=1e-2, schedule=schedule, warmup=0)
    short = settings(tmp_path, base, max_steps=3, optimizer=rate)
    long = dataclasses.replace(short, max_steps=5, resume=True)
    assert train(short).steps == 3
    capsys.readouterr()
    result = train(long)
    err = capsys.readouterr().err
    assert result.steps == 5
    rates = [record["learning_rate"] for record in tiny_runs.metrics(result.folder, "train")]
    expected = {"linear": [3 / 3, 2 / 3, 1 / 3, 2 / 5, 1 / 5], "constant": [1.0] * 5}[schedule]
    assert rates == pytest.approx([1e-2 * factor for factor in expected])
    line = f"{schedule} over 5 steps, instead of max_steps 3; the next step has the rate {rates[3]:.2e}"
    assert line in err
    assert ("so the result differs" in err) == (schedule == "linear")
    assert read_settings(result.folder)["max_steps"] == 5
    assert train(long).steps == 5  # finished: nothing is trained again
    assert "over 5 steps" not in capsys.readouterr().err
    if schedule == "constant":
        whole = train(dataclasses.replace(long, output=str(tmp_path / "whole")))
        assert adapter_bytes(result.folder) == adapter_bytes(whole.folder)


@pytest.mark.slow
def test_steps_added_to_a_run_of_epochs(tmp_path, base, capsys) -> None:
    short = settings(tmp_path, base, epochs=0.2)  # 2 steps
    assert train(short).steps == 2
    with pytest.raises(ConfigurationError, match=r"max_steps is 1, .*checkpoint at step 2"):
        train(dataclasses.replace(short, max_steps=1, resume=True))
    assert (tmp_path / "run" / "result.json").exists()
    assert train(dataclasses.replace(short, max_steps=3, resume=True)).steps == 3
    assert "over 3 steps, instead of epochs 0.2" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match=r"max_steps is 2, but .* max_steps 3"):
        train(dataclasses.replace(short, max_steps=2, resume=True))


@pytest.mark.slow
def test_a_run_of_epochs_cannot_become_shorter(tmp_path, base, monkeypatch) -> None:
    config = settings(tmp_path, base, epochs=1)  # 9 steps
    with monkeypatch.context() as patch:
        crash_in_step(patch, 6)
        with pytest.raises(Crash):
            train(config)
    with pytest.raises(
        ConfigurationError, match=r"max_steps is 6, .* epochs 1\.0, which is 9 steps"
    ):
        train(dataclasses.replace(config, max_steps=6, resume=True))
    assert train(dataclasses.replace(config, resume=True)).steps == 9


@pytest.mark.slow
def test_a_resumed_run_needs_the_method_that_it_began_with(tmp_path, base, monkeypatch) -> None:
    """Neither the file of a custom method nor the adapter at the start may change in between."""
    own = tmp_path / "own.py"
    own.write_text(Path("examples/own_method.py").read_text())
    first = train(settings(tmp_path, base, max_steps=1))
    stored = json.loads((first.adapter / "adapter_config.json").read_text())
    changes = {
        "method .*own.py:IA3": (
            {"method": f"{own}:IA3", "lora": LoRA()},
            lambda: own.write_text(own.read_text() + "# changed"),
        ),
        "method": (
            {"from_adapter": str(first.adapter), "lora": LoRA()},
            lambda: train(
                dataclasses.replace(
                    settings(tmp_path, base, max_steps=1), lora=LoRA(alpha=3), overwrite=True
                )
            ),
        ),
    }
    assert stored["lora_alpha"] == 16
    for name, (overrides, change) in changes.items():
        config = dataclasses.replace(
            settings(tmp_path, base, output=str(tmp_path / "more"), overwrite=True), **overrides
        )
        with monkeypatch.context() as patch:
            crash_in_step(patch, 5)
            with pytest.raises(Crash):
                train(config)
        change()
        with pytest.raises(RunFolderError, match=rf"The {name} has changed since"):
            train(dataclasses.replace(config, overwrite=False, resume=True))


def test_a_run_that_stopped_early_does_not_go_on(tmp_path, base) -> None:
    evaluation = HeldOutConfig(every=1, patience=1, samples=0)
    config = settings(tmp_path, base, max_steps=3)
    config = dataclasses.replace(config, evaluation=evaluation)
    train(config)
    path = tmp_path / "run" / "result.json"
    record = storage.read_record(path, RunFolderError)
    storage.write_record(path, {**record, "stopped_early": True})
    with pytest.raises(ConfigurationError, match=r"stopped early .*from_adapter"):
        train(dataclasses.replace(config, max_steps=9, resume=True))


@pytest.mark.parametrize("is_due", [True, False])
def test_patience_that_ends_with_the_last_step(tmp_path, base, monkeypatch, is_due) -> None:
    """A longer run would have stopped there only if it evaluates there too."""
    evaluation = HeldOutConfig(every=1 if is_due else 2, patience=1)
    config = tiny_runs.config(tmp_path, base, max_steps=3, evaluation=evaluation)
    held_out, losses = (
        validation.held_out,
        iter([9.0, 1.0, 0.5, 2.0] if is_due else [9.0, 1.0, 2.0]),
    )

    def scored(*args, **kwargs):
        scores = {**held_out(*args, **kwargs).scores, "loss": next(losses)}
        return dataclasses.replace(held_out(*args, **kwargs), scores=scores)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "held_out", scored)
        assert not train(config).stopped_early
    more = dataclasses.replace(config, max_steps=4, resume=True)
    if is_due:
        with pytest.raises(ConfigurationError, match=r"stopped early .* at step 3.*from_adapter"):
            train(more)
    else:
        assert train(more).steps == 4


def test_a_long_epoch_has_checkpoints(tmp_path, base) -> None:
    job = prepare(settings(tmp_path, base, checkpoints=CheckpointConfig()))
    job.step_plan = SimpleNamespace(steps_per_epoch=1200, total=1250)
    assert [step for step in range(1, 1251) if job.saves_after(step)] == [500, 1000, 1250]
    job.step_plan.steps_per_epoch = 400
    assert [step for step in range(1, 1251) if job.saves_after(step)] == [400, 800, 1200, 1250]


def test_keeps_as_many_checkpoints_as_asked(tmp_path, base) -> None:
    train(settings(tmp_path, base, checkpoints=CheckpointConfig(every=2, keep=3)))
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000014", "step-000016", "step-000018"]


@pytest.mark.slow
def test_checkpoints_are_as_readable_as_other_files(undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    files = [path for path in (undisturbed / "checkpoints").rglob("*") if path.is_file()]
    modes = {path.stat().st_mode & 0o777 for path in files}
    assert modes == {(tmp_path / "usual").stat().st_mode & 0o777}


@pytest.mark.slow
def test_killed_processes_resume_to_the_same_bytes(tmp_path) -> None:
    """Short form of kill_resume.py: SIGKILL at random instants and between the writes of a save."""
    script = Path(__file__).with_name("kill_resume.py")
    done = subprocess.run(
        [sys.executable, script, "--instants", "2", "--every", "80", "--folder", tmp_path],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed" in done.stdout
    assert "killed 2 runs at drawn instants" in done.stdout


@pytest.mark.slow
def test_a_resumed_run_keeps_its_dtype(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The faster dtype may be another one on the machine that resumes."""

    def choose(dtype: torch.dtype) -> None:
        choice = DtypeChoice(dtype, "it is faster")
        monkeypatch.setattr(dtype_choice, "choose_dtype", lambda *_, **__: choice)

    auto = BaseConfig(name=base, device="cpu")
    config = dataclasses.replace(settings(tmp_path, base), base=auto, max_steps=2)
    choose(torch.bfloat16)
    result = train(config)
    assert read_settings(result.folder)["base"]["dtype"] == "bfloat16"
    assert "dtype     bfloat16: it is faster" in capsys.readouterr().err
    choose(torch.float32)
    train(dataclasses.replace(config, max_steps=3, resume=True))
    assert read_settings(result.folder)["base"]["dtype"] == "bfloat16"
    assert "dtype     bfloat16: the run began with it" in capsys.readouterr().err
    adapter = AdapterFile.read(result.folder / "adapter")
    assert base_of(None, adapter).dtype == "bfloat16"
    assert base_of(BaseConfig(name=base, dtype="float32"), adapter).dtype == "float32"

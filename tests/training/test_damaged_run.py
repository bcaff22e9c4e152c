"""Run folders with damaged, exchanged or missing files: a helpful error, or the same weights."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import Crash, adapter_bytes, crash_at, crash_in_step

from lorakit import storage
from lorakit.errors import RunFolderError
from lorakit.training import checkpoint, loop
from lorakit.training.config import CheckpointConfig, TrainConfig
from lorakit.training.loop import train
from lorakit.training.setup import prepare

BEFORE, NEWEST = Path("checkpoints", "step-000004"), Path("checkpoints", "step-000006")


def stop_in_step(monkeypatch: pytest.MonkeyPatch, config: TrainConfig, step: int) -> None:
    """Crash a run of `config` in a step."""
    with monkeypatch.context() as patch:
        crash_in_step(patch, step)
        with pytest.raises(Crash):
            train(config)


def nine_steps(folder: Path, base: str, **settings) -> TrainConfig:
    """A run with checkpoints after steps 3, 6 and 9."""
    return tiny_runs.config(folder, base, max_steps=9, **settings)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, base: str) -> Path:
    return train(nine_steps(tmp_path_factory.mktemp("undisturbed"), base)).folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, base: str) -> TrainConfig:
    config = nine_steps(tmp_path_factory.mktemp("stopped"), base)
    with pytest.MonkeyPatch.context() as patch:
        stop_in_step(patch, config, 8)
    return config


@pytest.fixture
def half(tmp_path: Path, stopped: TrainConfig) -> TrainConfig:
    """A run to resume: it crashed in its eighth step and has checkpoints of steps 4 and 6."""
    run = shutil.copytree(stopped.output, tmp_path / "run")
    return dataclasses.replace(stopped, output=str(run), resume=True)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# --- checkpoints ----------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[Path], object]] = {
    **{f"a bit of {n}": lambda f, n=n: flip(f / n, -1) for n in checkpoint.TENSOR_FILES},
    **{f"no {n}": lambda f, n=n: (f / n).unlink() for n in checkpoint.TENSOR_FILES},
    "a digit of state.json": lambda f: flip(
        f / "state.json", (f / "state.json").read_text().index("1")
    ),
    "state.json cut off": lambda f: (f / "state.json").write_text('{"step": 6,'),
    "state.json of nothing": lambda f: (f / "state.json").write_text("{}"),
    "state.json of a list": lambda f: (f / "state.json").write_text("[6]"),
    "state.json empty": lambda f: (f / "state.json").write_text(""),
    "no state.json": lambda f: (f / "state.json").unlink(),
    "a folder for state.json": lambda f: ((f / "state.json").unlink(), (f / "state.json").mkdir()),
    "an empty folder": lambda f: (shutil.rmtree(f), f.mkdir()),
}


IN_RUNS = ("a bit of weights.safetensors", "a folder for state.json", "an empty folder")
"""Damages with which a whole run is resumed."""


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    damage, half: TrainConfig, caplog: pytest.LogCaptureFixture
) -> None:
    before, newest = Path(half.output, BEFORE), Path(half.output, NEWEST)
    damage(newest)
    path, state = checkpoint.newest_whole([before, newest])
    assert (path, state.step) == (before, 4)
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("lorakit")]
    assert "step-000006" in message
    assert "resumes from step 4" in message
    with pytest.raises(RunFolderError, match=r"No checkpoint.*overwrite.*step-000006"):
        checkpoint.newest_whole([newest])


@pytest.mark.slow
@pytest.mark.parametrize("damage", IN_RUNS)
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(
    damage: str, half: TrainConfig, undisturbed: Path
) -> None:
    run = Path(half.output)
    DAMAGE[damage](run / NEWEST)
    train(half)
    assert adapter_bytes(run) == adapter_bytes(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("damage", IN_RUNS)
def test_without_a_whole_checkpoint_the_run_is_refused(damage: str, half: TrainConfig) -> None:
    run = Path(half.output)
    shutil.rmtree(run / BEFORE)
    DAMAGE[damage](run / NEWEST)
    with pytest.raises(RunFolderError, match=r"No checkpoint.*overwrite.*step-000006"):
        train(half)


def test_no_bit_of_a_state_changes_unseen(half: TrainConfig) -> None:
    """A wrong counter would skip data or stop early."""
    path = Path(half.output, NEWEST)
    _, state = checkpoint.newest_whole([path])
    text = (path / "state.json").read_bytes()
    for position in range(0, len(text) - 1, 3):
        flip(path / "state.json", position)
        try:
            _, flipped = checkpoint.newest_whole([path])
        except RunFolderError:
            pass
        else:  # a space between two values
            assert flipped == state
        (path / "state.json").write_bytes(text)


@pytest.mark.parametrize(("part", "name"), [("state", "new_counter"), ("files", "new.safetensors")])
def test_a_checkpoint_of_another_version_says_so(part: str, name: str, half: TrainConfig) -> None:
    path = Path(half.output) / NEWEST / "state.json"
    record = storage.read_record(path, RunFolderError)
    record[part][name] = "1"
    storage.write_record(path, record)
    with pytest.raises(RunFolderError, match=rf"another version.*{name}"):
        train(half)


def test_checkpoints_that_are_deleted_while_the_base_loads(half: TrainConfig, monkeypatch) -> None:
    """The adapter was prepared for the weights of a checkpoint, so it cannot start as a new one."""

    def prepare_and_delete(*args: Any, **settings: Any) -> Any:
        job = prepare(*args, **settings)
        shutil.rmtree(Path(half.output, "checkpoints"))
        return job

    monkeypatch.setattr(loop, "prepare", prepare_and_delete)
    with pytest.raises(RunFolderError, match=r"had a checkpoint .*Start the command again"):
        train(half)


def test_a_file_where_the_checkpoints_were(half: TrainConfig) -> None:
    folder = Path(half.output, "checkpoints")
    shutil.rmtree(folder)
    folder.touch()
    with pytest.raises(RunFolderError, match=r"checkpoints.* is a file.*folder"):
        train(half)


# --- inputs of a run -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_changed_base_is_refused(tmp_path: Path, base: str, monkeypatch) -> None:
    """The changed base has the same shapes, so the trained weights would fit neither base."""
    folder = shutil.copytree(base, tmp_path / "model")
    config = nine_steps(tmp_path, str(folder))
    stop_in_step(monkeypatch, config, 8)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += 0.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunFolderError, match=r"base model.*has changed") as raised:
        train(dataclasses.replace(config, resume=True))
    message = str(raised.value)
    recorded = storage.read_record(tmp_path / "run" / NEWEST / "state.json", RunFolderError)
    assert str(folder) in message
    assert recorded["state"]["inputs"]["base model"]["sha256"][:12] in message
    assert "from_adapter" in message


@pytest.mark.slow
def test_a_changed_base_of_full_fine_tuning_is_refused(tmp_path, base, monkeypatch) -> None:
    folder = shutil.copytree(base, tmp_path / "model")
    config = nine_steps(tmp_path, str(folder), method="full")
    stop_in_step(monkeypatch, config, 8)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 0.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunFolderError, match=r"base model.*has changed"):
        train(dataclasses.replace(config, resume=True))


def edit_json(path: Path, **changes) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_rules(folder: Path) -> None:
    """Make a tokenizer lowercase its input: the same vocabulary, other ids."""
    edit_json(folder / "tokenizer.json", normalizer={"type": "Lowercase"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: edit_json(folder / "config.json", rms_norm_eps=0.5),
            r"base configuration of '.*model' has changed since .*: rms_norm_eps 1e-06 -> 0\.5\. .*from_adapter",
        ),
        (
            lambda folder: edit_json(
                folder / "config.json", rope_parameters={"rope_theta": 10.0, "rope_type": "default"}
            ),
            r"has changed since .*: rope_parameters\.rope_theta 10000 -> 10\. ",
        ),
        (
            lambda folder: edit_json(folder / "config.json", attention_dropout=0.3),
            r"has changed since .*: attention_dropout 0\.1 -> 0\.3\. ",
        ),
        (rewrite_rules, r"tokenizer has changed since .*\(tokenizers \d.*from_adapter"),
        (
            lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
            "tokenizer has changed since",
        ),
    ],
    ids=["eps", "rope", "dropout", "tokenizer", "chat template"],
)
def test_a_changed_configuration_or_tokenizer_is_refused(
    tmp_path: Path, base: str, monkeypatch, change, message: str
) -> None:
    folder = shutil.copytree(base, tmp_path / "model")
    config = nine_steps(tmp_path, str(folder))
    stop_in_step(monkeypatch, config, 8)
    change(folder)
    with pytest.raises(RunFolderError, match=message):
        train(dataclasses.replace(config, resume=True))


@pytest.mark.slow
def test_what_does_not_change_the_computation_may_change(
    tmp_path: Path, base: str, undisturbed: Path, monkeypatch
) -> None:
    folder = shutil.copytree(base, tmp_path / "model")
    config = nine_steps(tmp_path, str(folder))
    stop_in_step(monkeypatch, config, 8)
    edit_json(folder / "config.json", use_cache=False, transformers_version="4.0", dtype=None)
    edit_json(folder / "tokenizer_config.json", model_max_length=500)
    run = train(dataclasses.replace(config, resume=True)).folder
    assert adapter_bytes(run) == adapter_bytes(undisturbed)


@pytest.mark.slow
def test_a_checkpoint_that_records_less_of_its_base_resumes(
    half: TrainConfig, undisturbed: Path
) -> None:
    """Checkpoints of earlier versions record only the weights."""
    path = Path(half.output, NEWEST, "state.json")
    record = storage.read_record(path, RunFolderError)
    for name in ("base configuration", "tokenizer"):
        del record["state"]["inputs"][name]
    storage.write_record(path, record)
    assert adapter_bytes(train(half).folder) == adapter_bytes(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "validation"])
def test_changed_data_is_refused(tmp_path: Path, base: str, split: str, monkeypatch) -> None:
    config = nine_steps(tmp_path, base)
    stop_in_step(monkeypatch, config, 8)
    path = tmp_path / f"{split}.jsonl"
    tiny_runs.write_rows(path, tiny_runs.pairs(72, seed=9))
    with pytest.raises(RunFolderError, match=rf"{split} data has changed.*from_adapter") as raised:
        train(dataclasses.replace(config, resume=True))
    assert str(path) in str(raised.value)


# --- files of the run -----------------------------------------------------------------------------

RECORDS = {
    "cut off": lambda path: path.write_text(path.read_text()[:-20]),
    "of nothing": lambda path: path.write_text("{}"),
    "of a list": lambda path: path.write_text("[]"),
    "a bit": lambda path: flip(path, path.read_text().index("1")),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base: str) -> TrainConfig:
    config = tiny_runs.config(tmp_path_factory.mktemp("finished"), base, max_steps=1)
    train(config)
    return config


@pytest.mark.parametrize("damage", RECORDS.values(), ids=RECORDS)
def test_a_damaged_result(damage, tmp_path: Path, finished: TrainConfig) -> None:
    run = shutil.copytree(finished.output, tmp_path / "run")
    damage(run / "result.json")
    with pytest.raises(RunFolderError, match=r"result\.json"):
        train(dataclasses.replace(finished, output=str(run), resume=True))


def test_a_result_of_another_version(tmp_path: Path, base: str) -> None:
    config = tiny_runs.config(tmp_path, base, max_steps=1)
    path = train(config).folder / "result.json"
    storage.write_record(path, {**storage.read_record(path, RunFolderError), "new_number": 1})
    with pytest.raises(RunFolderError, match=r"another version.*new_number"):
        train(dataclasses.replace(config, resume=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda run: flip(run / "checkpoints/step-000001/weights.safetensors", 0),
            "No checkpoint .* is undamaged",
        ),
        (lambda run: flip(run / "environment.json", 0), r"environment\.json"),
        (lambda run: flip(run / "metrics.jsonl", 0), r"metrics\.jsonl:1 is damaged"),
        (lambda run: shutil.rmtree(run / "checkpoints"), r"no checkpoint to .*from_adapter"),
    ],
    ids=["checkpoint", "environment", "metrics", "no checkpoint"],
)
def test_a_finished_run_survives_an_extension_that_fails(
    tmp_path: Path, finished: TrainConfig, damage, message: str
) -> None:
    run = shutil.copytree(finished.output, tmp_path / "run")
    damage(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match=message):
        train(dataclasses.replace(finished, output=str(run), max_steps=2, resume=True))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", RECORDS.values(), ids=RECORDS)
def test_a_damaged_environment(damage, half: TrainConfig) -> None:
    damage(Path(half.output) / "environment.json")
    with pytest.raises(RunFolderError, match=r"environment\.json"):
        train(half)


@pytest.mark.parametrize("damage", [RECORDS["not text"], RECORDS["a folder"]])
def test_damaged_settings(damage, half: TrainConfig) -> None:
    damage(Path(half.output) / "config.yaml")
    with pytest.raises(RunFolderError, match=r"config\.yaml"):
        train(half)


@pytest.mark.slow
@pytest.mark.parametrize("line", ["not JSON", "[1]", "{}", '{"step": "6"}', '{"step": true}', ""])
def test_a_damaged_line_among_whole_ones(half: TrainConfig, line: str) -> None:
    """A killed process damages only the last line. Another damaged line must not drop the rest of the file."""
    path = Path(half.output, "metrics.jsonl")
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:3.*Delete that line"):
        train(half)


@pytest.mark.slow
def test_a_run_resumes_once_its_damaged_line_is_deleted(half: TrainConfig) -> None:
    path = Path(half.output, "metrics.jsonl")
    whole = path.read_text()
    path.write_text("not JSON\n" + whole)
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:1.*Delete that line"):
        train(half)
    path.write_text(whole)
    train(half)


def test_a_folder_where_the_metrics_were(half: TrainConfig) -> None:
    RECORDS["a folder"](Path(half.output, "metrics.jsonl"))
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl.* is a folder.*file"):
        train(half)


def test_every_line_of_a_text_with_line_separators_is_kept(tmp_path: Path) -> None:
    """Generated text may contain line separators of str.splitlines."""
    from lorakit.training.run_folder import JsonLines

    lines = JsonLines(tmp_path / "samples.jsonl")
    for step in range(3):
        lines.append(step=step, output="one\u2028two\x85three")
    lines.truncate(checkpoint.State(step=1, evaluated=True))
    records = [json.loads(line) for line in lines.path.read_text().split("\n") if line]
    assert [record["step"] for record in records] == [0, 1]


def test_a_line_holds_values_that_json_lacks(tmp_path: Path) -> None:
    """A row of a user's own task may have a date, or NaN at any depth."""
    from lorakit.training.run_folder import JsonLines, read_lines

    lines = JsonLines(tmp_path / "samples.jsonl")
    lines.append(step=1, gold={"day": datetime.date(2024, 5, 1), "score": float("nan")})
    ((_, record),) = read_lines(lines.path)
    assert record == {"step": 1, "gold": {"day": "2024-05-01", "score": None}}


def test_a_last_line_without_its_end_is_read_alike(tmp_path: Path) -> None:
    """A killed process may leave a whole record without its line feed: resume and report both keep it."""
    from lorakit.training.run_folder import JsonLines, read_lines

    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        lines.append(step=step)
    lines.path.write_bytes(lines.path.read_bytes()[:-1])
    assert [record["step"] for _, record in read_lines(lines.path)] == [1, 2]
    lines.truncate(checkpoint.State(step=2, evaluated=True))
    assert lines.path.read_text().endswith('{"step": 2}\n')


@pytest.mark.slow
def test_the_last_line_may_be_cut_off(half: TrainConfig, undisturbed: Path) -> None:
    path = Path(half.output, "metrics.jsonl")
    path.write_bytes(path.read_bytes()[:-9])
    run = train(half).folder
    steps = [record["step"] for record in tiny_runs.metrics(run, "train")]
    assert steps == [record["step"] for record in tiny_runs.metrics(undisturbed, "train")]


@pytest.mark.slow
def test_a_finished_run_without_its_adapter_goes_on_to_write_it(tmp_path: Path, base: str) -> None:
    config = tiny_runs.config(tmp_path, base, max_steps=3)
    run = train(config).folder
    before = adapter_bytes(run)
    shutil.rmtree(run / "adapter")
    train(dataclasses.replace(config, resume=True))
    assert adapter_bytes(run) == before


@pytest.mark.slow
def test_overwriting_a_run_with_links_in_it(tmp_path: Path, base: str) -> None:
    """Overwriting deletes the link and keeps its target."""
    config = tiny_runs.config(tmp_path, base, max_steps=1)
    run = train(config).folder
    shutil.move(run / "checkpoints", tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    train(dataclasses.replace(config, overwrite=True))
    assert not (run / "checkpoints").is_symlink()
    assert list((tmp_path / "elsewhere").iterdir())


@pytest.mark.slow
def test_keeping_one_checkpoint_is_enough_to_resume(tmp_path, base, monkeypatch) -> None:
    config = nine_steps(tmp_path, base, checkpoints=CheckpointConfig(every=3, keep=1))
    stop_in_step(monkeypatch, config, 8)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000006"]
    train(dataclasses.replace(config, resume=True))


def test_checkpoint_of_another_model(tmp_path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([{"params": [weight], "names": ["q.lora_B"]}])
    checkpoint.save(tmp_path, checkpoint.State(step=3), {"q.lora_B": weight}, {}, keep=2)
    with pytest.raises(RunFolderError, match=r"only in the model, for example .*from_adapter"):
        checkpoint.restore(tmp_path, {"k.lora_B": weight}, optimizer, inputs={})


def test_a_damaged_later_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([{"params": [weight], "names": ["weight"]}])
    for step in (100, 200):
        checkpoint.save(tmp_path, checkpoint.State(step=step), {"weight": weight}, {}, keep=2)
    flip(tmp_path / "step-000200" / checkpoint.WEIGHTS, -1)
    assert checkpoint.restore(tmp_path, {"weight": weight}, optimizer, inputs={}).step == 100
    checkpoint.save(tmp_path, checkpoint.State(step=150), {"weight": weight}, {}, keep=1)
    assert checkpoint.restore(tmp_path, {"weight": weight}, optimizer, inputs={}).step == 150
    assert [path.name for path in tmp_path.iterdir()] == ["step-000150"]


def test_a_checkpoint_that_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = {"weight": torch.ones(2)}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        for step in (1, 2, 3, 4):
            checkpoint.save(tmp_path, checkpoint.State(step=step), weights, {}, keep=2)
        with pytest.raises(RunFolderError, match=r"step-000004': Directory not empty"):
            checkpoint.delete_after(tmp_path, 3)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2  # one for each save that had to delete
    assert "step-000002' (Directory not empty). " in messages[-1]
    # What could not be deleted has another name, so nothing takes half of it for a checkpoint.
    assert [path.name for path in checkpoint.checkpoints_in(tmp_path)] == ["step-000003"]
    checkpoint.save(tmp_path, checkpoint.State(step=4), weights, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]


def test_a_kill_during_a_rewind_leaves_no_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest checkpoint, which has diverged the most, is deleted first: a resumed run reads what is then newest."""
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, checkpoint.State(step=step), {}, {}, keep=3)
    crash_at(monkeypatch, shutil, "rmtree", 2)
    with pytest.raises(Crash):
        checkpoint.delete_after(tmp_path, 1)
    assert [path.name for path in checkpoint.checkpoints_in(tmp_path)] == ["step-000001"]


def test_no_checkpoint_is_deleted_if_the_one_before_is_damaged(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, checkpoint.State(step=step), {}, {}, keep=2)
    flip(tmp_path / "step-000001" / checkpoint.WEIGHTS, -1)
    with pytest.raises(RunFolderError, match=r"No checkpoint in .* is undamaged"):
        checkpoint.delete_after(tmp_path, 1)
    assert (tmp_path / "step-000002").is_dir()


def refuse(path: Path, ignore_errors: bool = False) -> None:
    """Fail as `shutil.rmtree` does on NFS, if another program has a file of the folder open."""
    if not ignore_errors:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

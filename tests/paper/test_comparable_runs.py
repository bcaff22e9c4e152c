"""A grid adds no run that differs from the recorded ones in more than its seed, rate or method."""

from __future__ import annotations

import shutil

import pytest

from lorakit.errors import ConfigurationError
from lorakit.models.processor import processor_name
from lorakit.paper import comparable
from lorakit.paper import runs as runs_module
from lorakit.paper.grid import open_grid
from lorakit.paper.record import Record, changed_settings
from lorakit.training.environment import versions


def silent(text: str) -> None:
    """Discard progress."""


@pytest.fixture
def one_run(table2, data, tmp_path, monkeypatch):
    """A grid with one recorded seed on a copy of the data, the call that adds another, and the copy."""
    root = tmp_path / "data"
    shutil.copytree(data, root)

    def train(runner, run):
        config = runner.train_config(run)
        record = Record(
            data_set="mrpc",
            variant="lora",
            rate=run.rate,
            seed=run.seed,
            held_out={"accuracy": 0.5},
            settings=changed_settings(config),
            inputs=comparable.digests_of(config),
            processor=processor_name(),
            device=runs_module.device_name("cpu"),
            versions=versions(),
        )
        return runner._write(run, record)

    monkeypatch.setattr(runs_module.Runner, "_train", train)
    monkeypatch.setattr(runs_module.Runner, "_score", lambda *_: {"scores": {"accuracy": 0.5}})

    def call(**changes):
        config = table2(methods=("lora",), trials=1, data={"root": str(root)}, **changes)
        with open_grid(config, silent) as grid:
            grid.run(after_each=lambda: None)
            return len(grid.all_records())

    assert call(seeds=1) == 1
    return call, root


def test_a_seed_from_other_data_is_refused(one_run):
    call, root = one_run
    path = root / "mrpc" / "train.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[1:]), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"seed-0 is not comp.*: train data has other"):
        call(seeds=2)
    assert call(seeds=1) == 1  # nothing is to be trained, and nothing was recorded
    path.write_text("".join(lines), encoding="utf-8")
    assert call(seeds=2) == 2


def test_a_seed_with_other_settings_is_refused(one_run, monkeypatch):
    """A later version of lorakit may have them. What changes no number may differ."""
    call, _ = one_run
    monkeypatch.setattr(runs_module, "CHECKPOINT_STEPS", 7)
    assert call(seeds=2) == 2
    monkeypatch.setattr(runs_module, "WARMUP", 0.1)
    with pytest.raises(ConfigurationError, match=r"optimizer.warmup was 0.06 and is 0.1"):
        call(seeds=3)


@pytest.mark.parametrize(
    ("name", "value", "was"),
    [("gradient_checkpointing", True, None), ("evaluation.batch_size", 3, 32)],
)
def test_a_seed_that_rounds_otherwise_is_refused(one_run, monkeypatch, name, value, was):
    """Only the sessions of one run may differ in these settings."""
    call, _ = one_run
    original = runs_module.Runner.settings
    monkeypatch.setattr(
        runs_module.Runner, "settings", lambda *args: {**original(*args), name: value}
    )
    with pytest.raises(ConfigurationError, match=f"{name} was {was} and is {value}"):
        call(seeds=2)


def test_a_seed_from_another_base_of_the_same_name_is_refused(one_run, monkeypatch):
    call, _ = one_run
    real = comparable.digests_of
    monkeypatch.setattr(
        comparable, "digests_of", lambda config: {**real(config), "base model": "another"}
    )
    with pytest.raises(ConfigurationError, match="base model has other content"):
        call(seeds=2)
    # Another processor initialises the head with other last bits.
    monkeypatch.setattr(runs_module, "device_name", lambda _: "cpu (AVX2)")
    assert call(seeds=2) == 2

"""A log is a file of others: what is wrong in it is an error, and it controls neither the terminal nor this machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lorakit import storage
from lorakit.cli import main
from lorakit.errors import ConfigurationError, RunFolderError
from lorakit.paper import reproduction
from lorakit.paper.comparison import compare
from lorakit.paper.grid import open_grid, recorded_grid
from lorakit.paper.log import recorded_config
from lorakit.paper.paper_config import PaperConfig

LOG = Path(__file__).parents[2] / "docs" / "results" / "runs" / "table2-minilm-l6"
RUN = "runs/mrpc/lora/rate-0.0005-seed-0.json"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return Path(shutil.copytree(LOG, tmp_path / "log"))


def change(path: Path, **values: Any) -> None:
    """Change values of a record, with a valid checksum."""
    storage.write_record(path, {**storage.read_record(path, RunFolderError), **values})


def open_log(log: Path) -> None:
    compare(recorded_grid(recorded_config(log)))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"scores": {"accuracy": "high"}}, r"scores\['accuracy'\] is 'high'; it must be a number"),
        ({"held_out": None}, "held_out is None; it must be a mapping"),
        ({"processor_seconds": []}, "processor_seconds is"),
    ],
)
def test_a_record_with_values_of_other_types_is_damaged(log, values, told):
    open_log(log)
    change(log / RUN, **values)
    with pytest.raises(RunFolderError, match=f"{RUN}' is damaged: {told}.*Restore the file"):
        open_log(log)


@pytest.mark.parametrize("seed", ["x", "1000000000"])
def test_a_name_without_a_usual_seed_is_refused(log, seed):
    shutil.copy(log / RUN, log / f"runs/mrpc/lora/rate-0.0005-seed-{seed}.json")
    with pytest.raises(RunFolderError, match=f"seed-{seed}.json' is not the record of a run"):
        open_log(log)


@pytest.mark.parametrize(
    "values", [{"held_out": {"mrpc": "x"}}, {"counts": {"mrpc": {"lora": {"head": "x"}}}}]
)
def test_a_plan_with_values_of_other_types_is_refused(log, values):
    content = storage.read_record(log / "grid.json", RunFolderError)
    change(log / "grid.json", plan={**content["plan"], **values})
    with pytest.raises(RunFolderError, match=r"Another version of lorakit wrote '.*grid.json'"):
        open_log(log)


def test_a_plan_without_a_dtype_is_refused(log):
    plan = storage.read_record(log / "grid.json", RunFolderError)["plan"]
    change(log / "grid.json", plan={**plan, "dtype": ""})
    with pytest.raises(ConfigurationError, match=r"base\.dtype is ''"):
        open_log(log)


@pytest.mark.parametrize("name", ["out/../out", "link"])
def test_an_output_folder_can_be_the_log_under_another_name(table2, tmp_path, name):
    (tmp_path / "link").symlink_to("out")
    config = table2(output=str(tmp_path / "out"), log=str(tmp_path / name))
    with open_grid(config, lambda _: None) as grid:
        assert grid.finished == 0
    assert (tmp_path / "out" / "grid.json").exists()


def test_a_log_sends_no_control_characters_to_the_terminal(monkeypatch, capsys):
    found = reproduction.Reproduction(scores=(), differences=("processor: EPYC\x1b[2J",))

    def reproduce(config: PaperConfig, say: Any, **_: Any) -> reproduction.Reproduction:
        say("rte/lora: \x1b[2J")
        return found

    monkeypatch.setattr(reproduction, "reproduce", reproduce)
    assert main(["paper", "table2", "--log", "log", "--reproduce", "rte/lora"]) == 0
    printed = capsys.readouterr()
    assert "processor: EPYC\\u001b[2J" in printed.out
    assert "\x1b[2J" not in printed.out + printed.err


def test_a_log_cannot_ask_for_code_of_a_model_repository(log):
    settings = storage.read_record(log / "grid.json", RunFolderError)["settings"]
    change(log / "grid.json", settings={**settings, "base.trust_remote_code": True})
    config = PaperConfig(table="table2", log=str(log), reproduce="mrpc/lora/0")
    assert not reproduction._recorded(config).base.trust_remote_code

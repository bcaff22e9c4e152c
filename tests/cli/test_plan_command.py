"""`lorakit plan`: options and output."""

from __future__ import annotations

import json
import sys

import pytest
import tiny_models
import tiny_runs
import torch

from lorakit.cli import main
from lorakit.models.dtype_choice import DtypeChoice
from lorakit.models.processor import threads
from lorakit.planning import machine


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """Use a machine with round numbers instead of measuring this one or reading its calibration."""
    made = machine.Machine(
        products=1e9, traffic=1e9, draws=1e9, software=10**6, origin="a machine of tests"
    )
    monkeypatch.setattr("lorakit.planning.planner.find_machine", lambda *_, **__: made)


@pytest.fixture
def base(tmp_path) -> str:
    config = tiny_models.ARCHITECTURES["llama"]()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_prints_every_part(base, capsys):
    assert main(["plan", "--base.name", base, "--length", "32", "--lora.rank", "4"]) == 0
    shown = capsys.readouterr().out
    for part in (
        *("trained parameters", "saved file", "time per step", "peak memory"),
        *("base", "adapter", "gradients", "optimizer", "activations", "logits", "temporary"),
        *("in a step", "interpreter", "Loading the base briefly needs"),
        *("FullFineTuning", "a machine of tests", "32 tokens per example, 16 of them targets"),
    ):
        assert part in shown


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
def test_the_stage_is_shown_on_a_terminal_only(base, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert main(["plan", "--base.name", base, "--length", "32"]) == 0
    shown = capsys.readouterr().err
    if terminal:
        stages = [line.removesuffix("\033[K") for line in shown.split("\r")]
        assert stages.index("reading the data ...") < stages.index("simulating a step ...")
        assert stages[-1] == ""
    else:
        assert shown == ""


@pytest.mark.slow
def test_processes_share_the_cores(base, capsys, monkeypatch):
    seen = []
    known = sys.modules["lorakit.planning.planner"].find_machine
    monkeypatch.setattr(
        "lorakit.planning.planner.find_machine",
        lambda *args, **options: seen.append(torch.get_num_threads()) or known(*args, **options),
    )
    before = torch.get_num_threads()
    with threads(2):
        for count in ("1", "2", "8"):
            assert main(["plan", "--base.name", base, "--length", "32", "--processes", count]) == 0
    assert torch.get_num_threads() == before
    assert seen == [2, 1, 1]
    shown = " ".join(capsys.readouterr().out.split())
    assert "shared 2 processes compute each step; memory and time are those of one" in shown
    assert main(["plan", "--base.name", base, "--length", "32", "--processes", "0"]) == 1
    assert "processes" in capsys.readouterr().err
    assert main(["plan", "--base.name", base, "--length", "32", "--shard"]) == 1
    assert "shard is true, but the plan has one process" in capsys.readouterr().err


@pytest.mark.slow
def test_a_plan_uses_its_calibration(base, capsys, tmp_path, monkeypatch):
    """It is made with the threads of one of the processes, in the dtype that auto chooses for this base."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lorakit.planning.planner.find_machine", machine.find_machine)
    seen = []

    def calibrate(device, dtype):
        seen.append((device.type, dtype, torch.get_num_threads()))
        return machine.Machine(products=1e9, traffic=1e9, draws=1e9, origin="a calibration")

    monkeypatch.setattr("lorakit.planning.calibration.calibrate", calibrate)
    # For products of usual sizes bfloat16 is faster, but not for those of a tiny base.
    monkeypatch.setattr("lorakit.models.dtype_choice.choose_dtype", _by_config)
    arguments = ["plan", "--base.name", base, "--length", "32", "--processes", "2"]
    with threads(4):
        assert main([*arguments, "--calibrate", "true"]) == 0
        assert main(arguments) == 0
    assert seen == [("cpu", torch.float32, 2)]
    shown = capsys.readouterr().out
    assert shown.count("machine  a calibration") == 2


def _by_config(device, config=None, **_):
    return DtypeChoice(torch.bfloat16 if config is None else torch.float32, "made up")


@pytest.mark.slow
def test_prints_json(base, capsys):
    arguments = ["--base.name", base, "--length", "32", "--target_tokens", "8", "--json", "true"]
    assert main(["plan", *arguments]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["chosen"]["trained"] < record["full"]["trained"] == record["parameters"]
    memory = record["chosen"]["memory"]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")


@pytest.mark.slow
def test_takes_a_file_of_train(base, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        f"base:\n  name: {base}\n  dtype: float32\nmax_steps: 20\noutput: somewhere\n"
    )
    assert main(["plan", "--config", str(tmp_path / "run.yaml"), "--length", "16"]) == 0
    assert "20 steps" in capsys.readouterr().out
    assert not (tmp_path / "somewhere").exists()


@pytest.mark.slow
def test_writes_page_and_figure(base, tmp_path, capsys):
    page, figure = tmp_path / "plan.html", tmp_path / "memory.svg"
    arguments = ["plan", "--base.name", base, "--length", "32", "--lora.rank", "4"]
    written = ["--report", str(page), "--plot", str(figure)]
    assert main([*arguments, *written]) == 0
    shown = capsys.readouterr().out
    assert f"Report in {page}." in shown
    assert f"Figure in {figure}." in shown
    text = page.read_text()
    for part in ("A LoRA adapter of rank 4", "Full fine-tuning", "a machine of tests", "rank: 4"):
        assert part in text
    assert "Memory of a step by part" in figure.read_text()
    # An existing report is an error before planning, unless overwrite is set.
    page.write_text("mine")
    assert main([*arguments, *written]) == 1
    assert "(--overwrite on the command line) to replace it" in capsys.readouterr().err
    assert page.read_text() == "mine"
    assert main([*arguments, *written, "--overwrite", "true", "--json", "true"]) == 0
    assert json.loads(capsys.readouterr().out)["chosen"]["trained"]
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target_tokens", "4"], "set length too"),
        (["--targets", "q_proj"], "Did you mean '--lora.targets'?"),
        (["--length", "1"], "length is 1"),
        (["--length", "32", "--lora.rank", "64"], "Rank 64 exceeds"),
        (["--length", "32", "--lora.targets", "attention.qw"], "attention.q"),
        (["--data.train", "absent.jsonl"], "absent.jsonl"),
        (["--lenght", "32"], "length"),
        (["--length", "32", "--report", "plan.pdf"], "ends in .html"),
        (["--length", "32", "--plot", "plan.html"], ".png, .svg or .pdf"),
    ],
)
def test_mistakes_are_named(base, capsys, arguments, message):
    assert main(["plan", "--base.name", base, *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_ends_with_its_prediction(tmp_path, capsys, monkeypatch):
    base = tiny_runs.save_base(tmp_path / "base")
    data = tiny_runs.write_rows(tmp_path / "train.jsonl", tiny_runs.pairs(16))
    arguments = ["train", "--base.name", base, "--data.train", data, "--max_steps", "1"]
    assert main([*arguments, "--output", str(tmp_path / "first")]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("planned")]
    assert main(["plan", *arguments[1:]]) == 0
    (row,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("peak memory")]
    assert " ".join(row.split()[:4]) in line  # of plan and of train: peak memory 398 MB
    # A failed prediction does not fail a finished run.
    planned = []

    def fail(config, **_):
        planned.append(config.base.dtype)
        return 1 / 0

    monkeypatch.setattr("lorakit.planning.plan", fail)
    assert main([*arguments, "--output", str(tmp_path / "second")]) == 0
    assert "planned  no prediction: division by zero" in capsys.readouterr().out
    assert planned == ["float32"]  # not auto, which depends on the free memory

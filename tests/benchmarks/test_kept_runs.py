"""Results of finished runs are cached, and never mixed with those of another machine."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import report, runs
from benchmarks.__main__ import PARTS, prepare_work


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Record commands instead of running them; each writes its number as its result."""
    found: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        found.append(command)
        Path(command[-1]).write_text(json.dumps({"number": len(found)}))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return found


def test_a_finished_run_is_not_repeated(tmp_path: Path, commands: list[list[str]]) -> None:
    samples = iter([{"rate": 3.0}])
    command = ("0 PEFT, float32", "benchmarks.run", "peft")
    first = runs.Runs(tmp_path).run(*command, sample=lambda: next(samples))
    assert first["number"] == 1
    assert first["rate"] == 3.0
    assert commands[0][1:5] == ["-m", "benchmarks.run", "peft", "--result"]
    assert runs.Runs(tmp_path).run(*command, sample=lambda: next(samples)) == first
    assert runs.Runs(tmp_path).cached("0 PEFT, float32") == first
    assert runs.Runs(tmp_path).run("1 PEFT, float32", "benchmarks.run", "peft")["number"] == 2


def test_a_failed_run_is_told_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stderr="Traceback ... MemoryError")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="MemoryError"):
        runs.Runs(tmp_path).run("0 PEFT", "benchmarks.run")
    assert runs.Runs(tmp_path).cached("0 PEFT") is None


def test_a_new_benchmark_forgets_the_runs_of_its_parts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: list[list[str]]
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for part in ("training", "merge"):
        runs.runs_of(part, "row", False).run("0", "module")
    prepare_work(["training", "merge"], quick=False, resume=True)
    assert runs.runs_of("training", "row", False).cached("0")
    prepare_work(["training"], quick=False, resume=False)
    assert runs.runs_of("training", "row", False).cached("0") is None
    assert runs.runs_of("merge", "row", False).cached("0")


def test_runs_of_another_machine_are_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    prepare_work(list(PARTS), quick=False, resume=False)
    here = report.machine()
    monkeypatch.setattr(report, "machine", lambda: {**here, "date": "1999-12-31"})
    prepare_work(list(PARTS), quick=False, resume=True)
    monkeypatch.setattr(report, "machine", lambda: {**here, "threads": 99})
    with pytest.raises(SystemExit, match="threads differ"):
        prepare_work(list(PARTS), quick=False, resume=True)

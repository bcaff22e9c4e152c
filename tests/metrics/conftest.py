"""Fixtures of the metric tests: the golden E2E files, a working Java and a broken one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Golden:
    """Outputs, references and their scores by the official scorer."""

    outputs: list[str]
    references: list[list[str]]
    scores: dict[str, float]


@pytest.fixture(scope="session")
def golden(shared: Path) -> Golden:
    folder = shared / "metrics" / "e2e_golden"
    groups = (folder / "references.txt").read_text(encoding="utf-8").strip().split("\n\n")
    return Golden(
        outputs=(folder / "outputs.txt").read_text(encoding="utf-8").splitlines(),
        references=[group.splitlines() for group in groups],
        scores=json.loads((folder / "scores.json").read_text()),
    )


@pytest.fixture(scope="session")
def java() -> str:
    """Return the path of Java for tests that run the official programs."""
    path = shutil.which("java")
    if path is None:
        pytest.skip("Java is not installed: apt-get install default-jre-headless")
    return path


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replace Java by a shell script."""
    if os.name != "posix":
        pytest.skip("the fake Java is a shell script")

    def install(script: str) -> None:
        program = tmp_path / "java"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return install

"""A short run of the harness with fixed seeds, and the cases that it found before.

``make fuzz`` runs it for longer, with new seeds.
"""

from __future__ import annotations

import faulthandler
import os
import warnings
from pathlib import Path

import pytest
from fuzz_running import CASES, limit_process, replay, run
from fuzz_targets import BY_NAME, TARGETS

EXECUTIONS = {"gguf": 120, "tokenizer": 400}
"""Inputs of each reader; 600 of the others."""
KNOWN: dict[str, tuple[str, ...]] = {
    # a token that occurs twice
    "gguf": ("tokens differ from the file",),
}
"""Findings that are not mended yet: parts of their kind, by reader. Delete an entry with its mend."""

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", [target.name for target in TARGETS])
def test_a_reader_accepts_or_rejects_every_file(name: str) -> None:
    report = run(BY_NAME[name], EXECUTIONS.get(name, 600))
    known = KNOWN.get(name, ())
    new = [f for f in report.findings.values() if not any(part in f.kind for part in known)]
    assert not new, "\n".join(f"{f.kind} (input {f.index}): {f.detail}" for f in new)
    assert min(report.accepted, report.refused) > report.executions // 25  # it finds both paths


def test_a_crash_of_a_worker_prints_no_stack(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns about threads
        child = os.fork()
    if child == 0:
        try:
            limit_process(tmp_path)
            os._exit(faulthandler.is_enabled())
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("case", sorted(CASES.glob("*-*")), ids=lambda case: case.name)
def test_a_case_that_was_found_before(case: Path) -> None:
    verdict, kind, detail = replay(case)
    assert verdict != "finding", f"{kind}: {detail}"

"""A short run of the harness with fixed seeds, the cases that it found before, and the faults that it must find.

``make fuzz`` runs it for longer, with new seeds.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_faults import FAULTS, Fault, planted
from fuzz_running import CASES, Report, replay, run
from fuzz_targets import BY_NAME, TARGETS

EXECUTIONS = {"gguf": 120, "tokenizer": 400}
"""Inputs of each reader; 600 of the others."""
KNOWN: dict[str, tuple[str, ...]] = {
    # a lone surrogate in a text; a name of any length in a message
    "peft": ("accepts what a strict parser rejects: UnicodeEncodeError", "message too long"),
    # unknown and missing keys; what a layer's `pissa`, `dora` and `rank` say is not compared with its tensors
    "lorakit_json": (
        *("keys unknown or missing", "keys of a layer unknown or missing", "message too long"),
        *(
            "pissa differs",
            "dora differs",
            "rank differs",
            "UnicodeEncodeError records.py:_checksum",
        ),
    ),
    # two members of a zip file with one name
    "loralib": ("accepts what a strict parser rejects: ValueError", "message too long"),
    # a missing setting gets the default of transformers; NaN in a weight; a token that occurs twice
    "gguf": (
        *("a setting is missing, and a default is taken", "numbers that are not finite"),
        *("tokens differ from the file", "message too long", "hang"),
    ),
    # 010 is 8 and 1:30 is 90, as in YAML 1.1
    "yaml": ("a int is read as int", "a str is read as int"),
    # NaN and Infinity
    "jsonl": ("accepts a line that is not strict JSON",),
    # a footer with fewer groups of rows than rows
    "parquet": ("another number of rows than the footer's",),
    # ids beyond the vocabulary; a vocabulary that fails when a text is tokenized
    "tokenizer": ("ids out of range", "PanicException"),
}
"""Findings that are not mended yet: parts of their kind, by reader. Delete an entry with its mend."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return {}


def _report(name: str, reports: dict[str, Report]) -> Report:
    if name not in reports:
        reports[name] = run(BY_NAME[name], EXECUTIONS.get(name, 600))
    return reports[name]


@pytest.mark.parametrize("name", [target.name for target in TARGETS])
def test_a_reader_accepts_or_rejects_every_file(name: str, reports: dict[str, Report]) -> None:
    report = _report(name, reports)
    known = KNOWN.get(name, ())
    new = [f for f in report.findings.values() if not any(part in f.kind for part in known)]
    assert not new, "\n".join(f"{f.kind} (input {f.index}): {f.detail}" for f in new)
    assert min(report.accepted, report.refused) > report.executions // 25  # it finds both paths


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.reader}-{fault.check}")
def test_a_missing_check_is_found(fault: Fault, reports: dict[str, Report]) -> None:
    usual = _report(fault.reader, reports)
    with planted(fault):
        report = run(BY_NAME[fault.reader], usual.executions, until=usual.failed)
    assert report.failed - usual.failed


@pytest.mark.parametrize("case", sorted(CASES.glob("*-*")), ids=lambda case: case.name)
def test_a_case_that_was_found_before(case: Path) -> None:
    verdict, kind, detail = replay(case)
    assert verdict != "finding", f"{kind}: {detail}"

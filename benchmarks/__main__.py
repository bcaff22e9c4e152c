"""Run the benchmarks.

python -m benchmarks                              every part but compiled, planner, accuracy, profile
python -m benchmarks compiled planner             parts of those that run when asked for
python -m benchmarks --quick                      a few rows, one round: results/quick/
python -m benchmarks --resume                     go on with an interrupted one
python -m benchmarks training --rows e2e mrpc     some rows of the training tables
python -m benchmarks --results results-here       the figures of this machine, and not into benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from importlib import import_module
from pathlib import Path

from benchmarks import report
from benchmarks.workloads import WORKLOADS

PARTS = {
    "training": "benchmarks.training",
    "inference": "benchmarks.inference",
    "table1": "benchmarks.table1",
    "adapter": "benchmarks.adapter",
    "merge": "benchmarks.merge_drift",
    "compiled": "benchmarks.compiled",
    "planner": "benchmarks.planner",
    "accuracy": "benchmarks.accuracy",
    "profile": "benchmarks.profile",
}

ASKED_FOR = ("compiled", "planner", "accuracy", "profile")
"""Parts that run where they are named: with them the others would not be done within an hour."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"{', '.join(PARTS)}; if none is named all but {', '.join(ASKED_FOR)}",
    )
    parser.add_argument("--quick", action="store_true", help="a few rows and updates, one round")
    parser.add_argument("--rows", nargs="*", default=[], choices=[w.name for w in WORKLOADS])
    parser.add_argument(
        "--resume", action="store_true", help="keep the runs that an interrupted one has finished"
    )
    parser.add_argument(
        "--results", type=Path, default=report.RESULTS, help="folder of tables and figures"
    )
    args = parser.parse_args()
    report.put_results_into(args.results)
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"'{name}' is none of the parts {', '.join(PARTS)}")
    # What is on this machine is measured, and nothing is asked of the network on the way.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parts = args.parts or [name for name in PARTS if name not in ASKED_FOR]
    if args.rows and parts != ["training"]:
        parser.error("--rows chooses rows of the training tables: name the part, training")
    places = [f"training/{row}" for row in args.rows] or parts
    prepare_work(places, quick=args.quick, resume=args.resume)
    began = time.monotonic()
    for name in parts:
        import_module(PARTS[name]).main(quick=args.quick, rows=args.rows)
    report.say(f"\n{(time.monotonic() - began) / 60:.1f} minutes")


def prepare_work(places: list[str], *, quick: bool, resume: bool) -> None:
    """Empty these places in the work folder, or see to it that what is resumed was measured on this machine."""
    work = report.work(quick)
    here = {name: value for name, value in report.machine().items() if name != "date"}
    witness = work / "machine.json"
    if resume and witness.exists():
        there = json.loads(witness.read_text(encoding="utf-8"))
        changed = [name for name in here if here[name] != there.get(name)]
        if changed:
            sys.exit(
                f"The runs in {work} are of another machine or software ({', '.join(changed)} differ), and "
                "figures of two are not compared. Start anew, without --resume."
            )
    elif not resume:
        for place in places:
            shutil.rmtree(work / place, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    witness.write_text(json.dumps(here), encoding="utf-8")
    if any((work / place).exists() for place in places):
        report.say(f"Runs that are finished in {work} are kept.")


if __name__ == "__main__":
    main()

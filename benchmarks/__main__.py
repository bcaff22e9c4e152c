"""Run the benchmarks.

python -m benchmarks                              all parts except those that --help lists as asked for
python -m benchmarks compiled planner             named parts only
python -m benchmarks --quick                      a few rows, one round: results/quick/
python -m benchmarks --resume                     resume an interrupted run
python -m benchmarks training --rows e2e mrpc     some rows of the training tables
python -m benchmarks --results results-here       write somewhere else than benchmarks/results
python -m benchmarks soak --minutes 10            check every answer of a busy server; see its --help
python -m benchmarks page --minutes 30            use the playground, and watch its memory
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

DEFAULT = {
    "training": "benchmarks.training",
    "inference": "benchmarks.inference",
    "mixed": "benchmarks.mixed_batch",
    "table1": "benchmarks.table1",
    "adapter": "benchmarks.adapter",
    "experts": "benchmarks.experts",
    "merge": "benchmarks.merge_drift",
}

ASKED_FOR = {
    "compiled": "benchmarks.compiled",
    "dtypes": "benchmarks.dtypes",
    "float32": "benchmarks.float32",
    "planner": "benchmarks.planner",
    "accuracy": "benchmarks.accuracy",
    "serving": "benchmarks.serving",
    "processes": "benchmarks.processes",
    "profile": "benchmarks.profile",
}
"""Parts that run only if named, because the others take hours already."""

PARTS = DEFAULT | ASKED_FOR

COMMANDS = {"soak": "benchmarks.soak", "page": "benchmarks.page_use"}
"""Long trials with options of their own."""


def main() -> None:
    if (command := sys.argv[1:2]) and command[0] in COMMANDS:
        sys.exit(import_module(COMMANDS[command[0]]).run(sys.argv[2:]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"{', '.join(PARTS)}; default: all except {', '.join(ASKED_FOR)}",
    )
    parser.add_argument("--quick", action="store_true", help="a few rows and updates, one round")
    parser.add_argument("--rows", nargs="*", default=[], choices=[w.name for w in WORKLOADS])
    parser.add_argument(
        "--resume", action="store_true", help="keep the finished runs of an interrupted benchmark"
    )
    parser.add_argument(
        "--results", type=Path, default=report.RESULTS, help="folder to write results to"
    )
    args = parser.parse_args()
    report.write_results_to(args.results)
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"unknown part '{name}'; choose from {', '.join(PARTS)}")
    # Use local files only, so that no network request affects a measurement.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parts = args.parts or list(DEFAULT)
    if args.rows and parts != ["training"]:
        parser.error("--rows selects rows of the training tables: use training --rows ROW")
    places = [f"training/{row}" for row in args.rows] or parts
    prepare_work(places, quick=args.quick, resume=args.resume)
    began = time.monotonic()
    options = {"rows": args.rows} if args.rows else {}
    for name in parts:
        import_module(PARTS[name]).main(quick=args.quick, **options)
    report.say(f"\n{(time.monotonic() - began) / 60:.1f} minutes")


def prepare_work(places: list[str], *, quick: bool, resume: bool) -> None:
    """Delete the old runs of `places`, or check that the runs to resume come from this machine.

    Exits with a message if they do not.
    """
    work = report.work(quick)
    machine = {name: value for name, value in report.machine().items() if name != "date"}
    record = work / "machine.json"
    if resume and record.exists():
        earlier = json.loads(record.read_text(encoding="utf-8"))
        changed = [name for name in machine if machine[name] != earlier.get(name)]
        if changed:
            sys.exit(
                f"The runs in {work} come from another machine or software ({', '.join(changed)} differ), so "
                "their results are not comparable. Start again without --resume."
            )
    elif not resume:
        for place in places:
            shutil.rmtree(work / place, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(machine), encoding="utf-8")
    if any((work / place).exists() for place in places):
        report.say(f"Reusing the finished runs in {work}.")


if __name__ == "__main__":
    main()

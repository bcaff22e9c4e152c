"""Run the benchmarks.

python -m benchmarks                              every part
python -m benchmarks --quick                      a few rows, one round: results/quick/
python -m benchmarks training --rows e2e mrpc     some rows of one part
"""

from __future__ import annotations

import argparse
import os
import time

from benchmarks import report, training
from benchmarks.workloads import WORKLOADS

PARTS = {"training": training.main}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="parts to run; all if none")
    parser.add_argument("--quick", action="store_true", help="a few rows and updates, one round")
    parser.add_argument("--rows", nargs="*", default=[], choices=[w.name for w in WORKLOADS])
    args = parser.parse_args()
    # What is on this machine is measured, and nothing is asked of the network on the way.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    began = time.monotonic()
    for name in args.parts or PARTS:
        PARTS[name](quick=args.quick, rows=args.rows)
    report.say(f"\n{(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()

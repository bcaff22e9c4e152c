"""Run one system on the examples in a folder, in a separate process, and print the results as JSON.

python -m benchmarks.run peft_trainer FOLDER --settings '{"precision": "float32", "order": "plain"}'
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.before import BEFORE
from benchmarks.examples import Prepared
from benchmarks.measure import Meter, held_out_loss, right_labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system", help="a module of benchmarks.systems")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="also compute the held-out loss of the trained model",
    )
    parser.add_argument("--labels", action="store_true", help="also compare its labels")
    parser.add_argument("--result", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    system = import_module(f"benchmarks.systems.{args.system}")
    prepared = Prepared.read(args.folder)
    warmup = prepared.workload.warmup
    with TemporaryDirectory() as scratch:
        with Meter(warmup, BEFORE) as meter:
            trained = system.train(prepared, args.settings, Path(scratch))
        figures = {
            "seconds": meter.seconds,
            "tokens": prepared.tokens(trained.order)[warmup:],
            "memory": meter.memory,
            "loading_memory": meter.loading_memory,
            "trained": meter.trained,
        }
        if len(figures["seconds"]) != len(figures["tokens"]):
            raise RuntimeError(
                f"{args.system} made {len(meter.seconds)} counted updates; expected {len(figures['tokens'])}"
            )
        if args.held_out:
            model = trained.in_float32()
            figures["held_out"] = held_out_loss(model, prepared)
            if args.labels:
                figures["right"] = right_labels(model, prepared)
    print(json.dumps(figures))
    if args.result:
        args.result.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()

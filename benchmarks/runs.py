"""Run the processes of a benchmark one at a time, and cache their results."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import report


class Runs:
    """The runs of one row of a benchmark, each a JSON file in the folder of the row.

    ``--resume`` continues an interrupted benchmark, because only a new benchmark without it empties the folder.

    Args:
        folder: Folder of the row inside :func:`benchmarks.report.work`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def cached(self, key: str) -> dict[str, Any] | None:
        """Return the results of a finished run, or None if it has not finished."""
        path = self._path(key)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def run(
        self, key: str, *command: str, sample: Callable[[], dict[str, Any]] = dict
    ) -> dict[str, Any]:
        """Run ``python -m COMMAND --result FILE`` in a separate process, unless its results are cached.

        Args:
            key: Name of the run within its row.
            command: A module that writes its results as JSON to the file of ``--result``, and its arguments.
            sample: Called before the process; its values are added to the results.

        Raises:
            RuntimeError: The process failed. The message ends with its stderr.
        """
        figures = self.cached(key)
        if figures is not None:
            return figures
        result = self.folder / "unfinished.json"
        result.unlink(missing_ok=True)
        sampled = sample()
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", *command, "--result", str(result)],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} failed with exit status {done.returncode}:\n{done.stderr[-3000:]}"
            )
        figures = json.loads(result.read_text(encoding="utf-8"))
        figures |= {**sampled, "process_seconds": time.perf_counter() - began}
        result.write_text(json.dumps(figures), encoding="utf-8")
        os.replace(result, self._path(key))
        return figures

    def _path(self, key: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', key)}.json"


def process_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a process that :meth:`Runs.run` starts, to which its module adds its own arguments."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--result", type=Path, required=True, help="JSON file to write")
    return parser


def write_result(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Write the results of this process to the file of ``--result``."""
    args.result.write_text(json.dumps(figures), encoding="utf-8")


def runs_of(part: str, row: str, quick: bool) -> Runs:
    """Return the runs of a row of a part."""
    return Runs(report.work(quick) / part / row)

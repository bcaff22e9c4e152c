"""Processes of a benchmark, one at a time, whose figures are kept: what was measured is not measured again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import report


class Runs:
    """The runs of one row of a benchmark, each a file of figures in the row's folder.

    A benchmark that was interrupted goes on where it stopped, since the folder is emptied at the start of the
    next one alone, and not with ``--resume``.

    Args:
        folder: The row's folder inside :func:`benchmarks.report.work`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def kept(self, key: str) -> dict[str, Any] | None:
        """Return the figures of a finished run, None where it has not finished yet."""
        path = self._path(key)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def run(self, key: str, *command: str, **beside: Any) -> dict[str, Any]:
        """Run ``python -m COMMAND --result FILE`` in a process of its own, unless it has been run.

        Args:
            key: Name of the run within its row.
            command: A module that writes its figures as JSON into the file of ``--result``, and its arguments.
            beside: Figures that are kept beside those of the process.

        Raises:
            RuntimeError: The process failed; the message ends with what it wrote.
        """
        figures = self.kept(key)
        if figures is not None:
            return figures
        result = self.folder / "unfinished.json"
        result.unlink(missing_ok=True)
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
                f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}"
            )
        figures = json.loads(result.read_text(encoding="utf-8"))
        figures |= {**beside, "process_seconds": time.perf_counter() - began}
        result.write_text(json.dumps(figures), encoding="utf-8")
        os.replace(result, self._path(key))
        return figures

    def _path(self, key: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', key)}.json"


def runs_of(part: str, row: str, quick: bool) -> Runs:
    """Return the runs of a part's row."""
    return Runs(report.work(quick) / part / row)

"""Outputs that another run holds, or that would replace what is not theirs."""

from __future__ import annotations

import os
import subprocess
import sys

from user_mistakes import (
    Shell,
)

from lorakit import storage
from lorakit.cli import main

# --- in use by another run ------------------------------------------------------------------------

HOLD = """
import sys
from lorakit import storage
with storage.lock_folder("run"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_output_folder_in_use_by_another_run(shell: Shell, base: str, data: str) -> None:
    run = f"train --base.name {base} --data.train {data} --output run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == "locked\n"
            for options in ("", " --resume true", " --overwrite true"):
                shell.refuses(
                    run + options, "run", f"in use by another run (pid {other.pid})", "folder"
                )
        finally:
            other.stdin.close()
    assert main(run.split()) == 0


def test_output_folder_in_use_by_this_process(shell: Shell, base: str, data: str) -> None:
    with storage.lock_folder("run"):
        shell.refuses(
            f"train --base.name {base} --data.train {data} --output run",
            f"in use by another run (pid {os.getpid()})",
        )

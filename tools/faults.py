"""Plant ten faults, one at a time, into a scratch copy of the checkout: each must fail a test.

python tools/faults.py              all faults; status 1 if one of them passes its tests
python tools/faults.py scaling ...  some of them

A fault is a line of code and what replaces it, with the tests that are run until the first one fails. When the line
moves, move the fault with it: a line that is not found exactly once is an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).parents[1]
COPIED = ("src", "tests", "examples", "pyproject.toml", "README.md")


class Fault(NamedTuple):
    """A line to replace."""

    path: str
    """The file, below src/lorakit."""
    line: str
    instead: str
    tests: str
    """Folders and files of the tests to run, below tests."""


FAULTS = {
    "scaling": Fault(
        "methods/lora/layer.py",
        "return self._product(A.to(dtype), B.to(dtype)) * self.scaling",
        "return self._product(A.to(dtype), B.to(dtype))",
        "adapters parity",
    ),
    "slices": Fault(
        "methods/lora/forms.py",
        "return torch.cat([s.rows(device) for s in self.slices])",
        "return torch.cat([s.rows(device) for s in self.slices[::-1]])",
        "methods parity",
    ),
    "transposed": Fault(
        "methods/lora/forms.py",
        "return matrix.mT.contiguous() if self.transposed else matrix",
        "return matrix",
        "methods adapters parity",
    ),
    "bias": Fault(
        "methods/lora/layer.py",
        'deltas["bias"] = bias.to(wide_dtype(bias)) * self.scaling',
        "del bias",
        "parity methods",
    ),
    "tensor": Fault(
        "adapters/formats/peft/writing.py",
        "tensors | trained_tensors,",
        "tensors,",
        "adapters/formats parity",
    ),
    "dropout": Fault(
        "methods/lora/linear.py",
        "in_place = output_is_unshared(layer)",
        "in_place, output = output_is_unshared(layer), self.drop(output)",
        "methods",
    ),
    "padding": Fault(
        "data/batches.py",
        'batch["labels"] = padded_rows(targets, IGNORED, width=width)',
        'batch["labels"] = padded_rows(targets, pad_id, width=width)',
        "data compute",
    ),
    "recomputation": Fault(
        "adapters/activation.py",
        "now = recorded",
        "now = now",
        "adapters",
    ),
    "optimizer": Fault(
        "training/checkpoint.py",
        "_restore_optimizer(optimizer, read_safetensors(path / OPTIMIZER, RunFolderError, mapped=True))",
        "read_safetensors(path / OPTIMIZER, RunFolderError, mapped=True)",
        "training",
    ),
    "target": Fault(
        "models/roles.py",
        "    if not hits:\n        names = names_of_adaptable(modules)",
        "    if not hits and False:\n        names = names_of_adaptable(modules)",
        "models methods",
    ),
}


def plant(fault: Fault, copy: Path) -> None:
    """Replace the fault's line in a copy of the checkout."""
    path = copy / "src" / "lorakit" / fault.path
    text = path.read_text(encoding="utf-8")
    if text.count(fault.line) != 1:
        raise SystemExit(f"{fault.path} has the line {text.count(fault.line)} times: {fault.line}")
    path.write_text(text.replace(fault.line, fault.instead), encoding="utf-8")


def first_failure(copy: Path, tests: str) -> str | None:
    """Run tests in the copy until one fails, and return its name; None if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-rfE"]
    command += [f"tests/{name}" for name in tests.split()]
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy / "src"),
        "LORAKIT_SHARED": os.environ.get("LORAKIT_SHARED", str(CHECKOUT.parent / "shared")),
    }
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if run.returncode not in (0, 1):
        raise SystemExit(run.stdout[-2000:] + run.stderr[-2000:])
    failures = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failures[0][:150] if run.returncode else None


def main() -> int:
    """Plant the faults that the command line names, and return the exit status."""
    missed = 0
    for name in sys.argv[1:] or FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            for each in COPIED:
                source, target = CHECKOUT / each, Path(folder, each)
                (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
            plant(FAULTS[name], Path(folder))
            failure = first_failure(Path(folder), FAULTS[name].tests)
        missed += failure is None
        print(f"{name:<14} {failure or 'NO TEST FAILED'}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

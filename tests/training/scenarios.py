"""What tests of scenarios share: a script runs all scenarios once, and the tests read what it has written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from safetensors.torch import load_file

BOUNDS = {"gradient": 1e-12, "weight": 1e-9, "losses": 1e-7}
"""Largest differences between several processes and one, in float64 and relative to the size of a tensor.

Some losses are summed in float32."""


def made_once(script: str, factory: pytest.TempPathFactory) -> Path:
    """Return the folder that a script of this folder has filled. One worker of a session runs it for all.

    printed.txt has what the script printed.
    """
    path = Path(__file__).with_name(script)
    session = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent  # of all workers
    shared = session / path.stem
    with filelock.FileLock(f"{shared}.lock"):
        if not (shared / "done").exists():
            shutil.rmtree(shared, ignore_errors=True)
            shared.mkdir()
            done = subprocess.run([sys.executable, path, shared], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            (shared / "printed.txt").write_text(done.stdout)
            (shared / "done").touch()
    return shared


def outcomes(root: Path, scenario: str) -> Any:
    return json.loads((root / f"{scenario}.json").read_text())


def require_success(processes: list[dict[str, Any]]) -> None:
    for process in processes:
        assert process["status"] == 0, process["output"]


def require_equality(root: Path, way: str, count: int, steps: int) -> None:
    """Require that the gradients, losses and weights of `count` processes are those of one process."""
    for processes in outcomes(root, "equality").values():
        require_success(processes)
    alone = load_file(root / f"{way} 1 0.safetensors")
    several = [load_file(root / f"{way} {count} {rank}.safetensors") for rank in range(count)]
    own = torch.stack([tensors.pop("examples") for tensors in several])
    assert torch.equal(own.sum(0), alone.pop("examples"))
    assert len(own[0]) == steps
    assert (own == 0).any()  # a process without examples
    gradient = torch.stack([t.norm() for n, t in alone.items() if n.startswith("gradient")]).norm()
    for tensors in several:
        assert tensors.keys() == alone.keys()
        for name, expected in alone.items():
            assert torch.equal(tensors[name], several[0][name]), f"{name} differs between processes"
            kind = name.split()[0]
            # The gradient of a key's bias is 0 but for rounding, so all gradients give the scale.
            scale = gradient if kind == "gradient" else expected.norm()
            distance = (tensors[name] - expected).norm() / scale
            assert distance <= BOUNDS[kind], f"{name}: {distance:.1e}"


def require_close_weights(adapter: Path, other: Path) -> None:
    """Require that two saved adapters agree in float32, whose rounding some steps of AdamW amplify: to 1e-5."""
    (file,) = adapter.glob("*.safetensors")
    found, expected = load_file(file), load_file(other / file.name)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        distance = (tensor - expected[name]).norm() / expected[name].norm()
        assert distance <= 1e-5, f"{adapter.name} {name}: {distance:.1e}"

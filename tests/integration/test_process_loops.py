"""The adapted model in loops on two processes: every way trains alike, and saves the whole adapter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorakit

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

WAYS = ("ddp", "fsdp2", "zero2", "zero3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the adapters that all loops have saved."""
    root = tmp_path_factory.mktemp("loops")
    script = Path(__file__).with_name("process_loops.py")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    done = subprocess.run(
        [sys.executable, str(script), str(root)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return root


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_save_the_adapter_of_one(way: str, folder: Path) -> None:
    """Half of the texts each, and the mean of both losses."""
    if way.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    outcomes = json.loads((folder / "outcomes.json").read_text())[way]
    assert [outcome["status"] for outcome in outcomes] == [0, 0], outcomes
    expected, found = tensors(folder / "alone"), tensors(folder / way)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)
    moved = [name for name, tensor in expected.items() if "lora_B" in name and tensor.any()]
    assert len(moved) == len(expected) // 2
    model = fresh_base()
    lorakit.load(model, folder / way)


def fresh_base() -> Any:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import tiny_base
    finally:
        sys.path.pop(0)
    return tiny_base.load_base(None)[0]


@pytest.mark.parametrize(
    ("name", "launcher", "adapter"),
    [
        ("accelerate_loop", ["accelerate.commands.launch", "--cpu", "--num_processes", "2"], "."),
        ("transformers_trainer", ["torch.distributed.run", "--nproc-per-node", "2"], "adapter"),
    ],
)
def test_the_examples_run_on_two_processes(
    name: str, launcher: list[str], adapter: str, tmp_path: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    script = str(ROOT / "examples" / f"{name}.py")
    done = subprocess.run(
        [sys.executable, "-m", *launcher, script, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = tensors(tmp_path / "out" / adapter)
    assert all(tensor.any() for tensor in found.values())

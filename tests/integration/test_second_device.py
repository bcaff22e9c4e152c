"""Training, serving and merging on a device that refuses tensors of the CPU, as a GPU does, against the CPU.

One process makes the runs (`on_second_device.py`), because PyTorch keeps a device until the end of a process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

SCRIPT = Path(__file__).with_name("on_second_device.py")
NAMES = [
    "train packed",
    "train padded",
    "train with DoRA",
    "train every weight",
    "train a prefix",
    "train bottleneck layers",
    "train an encoder",
    "train an encoder-decoder",
    "resume",
    "serve, continuous",
    "serve, batched",
    "generate",
    "save, load, merge",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this PyTorch has no devices written in Python",
    ),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("device")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "outcomes.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_the_results_are_those_of_the_cpu(name: str, outcomes: dict[str, Any]) -> None:
    """Up to rounding, without dropout: other kernels of lorakit and PyTorch run than on the CPU."""
    expected, found = outcomes[name].values()
    assert not isinstance(expected, str), expected
    assert not isinstance(found, str), found
    if found != expected:  # texts have no rounding
        assert _flat(found) == pytest.approx(_flat(expected), rel=1e-5, abs=1e-5)


def test_a_cpu_tensor_is_refused(outcomes: dict[str, Any]) -> None:
    """Else the other tests could not fail."""
    assert "got a tensor (3,) of the CPU" in outcomes["refusal"]["second:0"]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_step_waits_as_often_with_more_batches(arch: str, outcomes: dict[str, Any]) -> None:
    """It waits for its loss and for the norm of its gradient, and copies to the device the 7 tensors of each batch.

    GPT-2's queries and values are rows of one fused projection, by their indices.
    """
    assert outcomes["step"][arch] == [[2, 7], [2, 7]]


def test_sampling_waits_for_the_device_as_often_with_more_requests(
    outcomes: dict[str, Any],
) -> None:
    few, many = outcomes["waits to sample"].values()
    assert few == many


def _flat(values: Any) -> list[Any]:
    if not isinstance(values, list):
        return [values]
    return [x for value in values for x in _flat(value)]

"""Shared setup of all tests: no network, fixed seeds, and the folder of real data sets."""

from __future__ import annotations

import functools
import gc
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# No network access. huggingface_hub reads this once, so set it before any import of it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)  # rich would take every output for a terminal
# The tensors are tiny: a second thread costs more than it saves, and pytest-xdist already uses all cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).resolve().parent

# Every test can import tiny_models and tiny_tokenizer, independent of the working directory.
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from browser import Browser, open_browser

# The same examples in every run, whatever the speed of the machine, as on a CI server.
settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def deterministic_seeds() -> None:
    """Seed every test, independent of the tests before it."""
    random.seed(0)
    np.random.seed(0)
    # `torch.manual_seed` also seeds devices that are not there, and formats three stack traces for that.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> None:
    """Keep what was imported so far out of every later collection: `train` collects garbage itself."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium, one for all tests; skips the test if it is not installed."""
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real data sets and checkpoints: $LORAKIT_SHARED, else `../shared`."""
    folder = Path(os.environ.get("LORAKIT_SHARED") or TESTS.parents[1] / "shared")
    if not folder.is_dir():
        pytest.skip(f"no real data sets in {folder}; set LORAKIT_SHARED to their folder")
    return folder


class InstantTimer:
    """torch's timer without its repetitions: every statement takes 0.1 ms."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def blocked_autorange(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(median=1e-4)


@pytest.fixture(scope="session")
def measured_once() -> Callable[..., Any]:
    """Return the measurement of a machine, which is made once for each dtype."""
    from lorakit.planning import machine

    return functools.cache(machine.measure)


@pytest.fixture
def instant_products(measured_once: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a plan time neither the machine nor its products; the tests of planning time both."""
    monkeypatch.setattr("torch.utils.benchmark.Timer", InstantTimer)
    monkeypatch.setattr("lorakit.planning.products._time_product", lambda *_: 1e-4)
    monkeypatch.setattr("lorakit.planning.machine.measure", measured_once)

"""What every test shares: no network, fixed seeds, and the folder of real data sets."""

from __future__ import annotations

import gc
import os
import random
import sys
from pathlib import Path

# Set before anything imports huggingface_hub, which reads it once: a test never reaches the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The tensors are tiny: a second thread costs more than it saves, and pytest-xdist already uses all cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

TESTS = Path(__file__).resolve().parent

# `import tiny_models` and `import tiny_tokenizer` work from any test, however pytest was started.
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))


@pytest.fixture(autouse=True)
def deterministic_seeds() -> None:
    """Start every test from the same random state, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets and checkpoints: $LORAKIT_SHARED, else `../shared`."""
    folder = Path(os.environ.get("LORAKIT_SHARED") or TESTS.parents[1] / "shared")
    if not folder.is_dir():
        pytest.skip(f"real data sets are not at {folder}; set LORAKIT_SHARED to their folder")
    return folder


def pytest_collection_finish() -> None:
    """Keep the modules and tests out of every later collection: `train` collects garbage itself."""
    gc.collect()
    gc.freeze()

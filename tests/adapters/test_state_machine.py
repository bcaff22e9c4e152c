"""Sequences of operations on adapters give the outputs and gradients of plain effective weights.

``LORAKIT_MACHINE_SEQUENCES=2000`` runs that many new random sequences, and ``LORAKIT_MACHINE_SEED=7`` repeats such a
run.
"""

from __future__ import annotations

import os
import secrets

import pytest
from adapter_machine import AdapterMachine
from hypothesis import Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

SEQUENCES = int(os.environ.get("LORAKIT_MACHINE_SEQUENCES", "0"))
SEED = int(os.environ.get("LORAKIT_MACHINE_SEED") or secrets.randbelow(2**32))

FIXED = settings(
    max_examples=300,
    stateful_step_count=25,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
)


@pytest.mark.slow
@pytest.mark.timeout(max(300, 2 * SEQUENCES))
def test_sequences_of_operations() -> None:
    if not SEQUENCES:
        run_state_machine_as_test(AdapterMachine, settings=FIXED)
        return
    print(f"LORAKIT_MACHINE_SEED={SEED}")
    run = settings(FIXED, max_examples=SEQUENCES, derandomize=False, database=None)
    run_state_machine_as_test(seed(SEED)(AdapterMachine), settings=run)

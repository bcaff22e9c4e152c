"""Sequences of operations on adapters give the outputs and gradients of plain effective weights.

``LORAKIT_MACHINE_SEQUENCES=2000`` runs that many new random sequences, and ``LORAKIT_MACHINE_SEED=7`` repeats such a
run. The planted faults show what the machine finds.
"""

from __future__ import annotations

import os
import secrets

import pytest
from adapter_machine import AdapterMachine
from hypothesis import Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from planted_faults import FAULTS, Fault

from lorakit import LoRA

SEQUENCES = int(os.environ.get("LORAKIT_MACHINE_SEQUENCES", "0"))
SEED = int(os.environ.get("LORAKIT_MACHINE_SEED") or secrets.randbelow(2**32))

FIXED = settings(
    max_examples=300,
    stateful_step_count=25,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
)
# The sequences depend on the constants in all modules that are loaded. A fault is found by far fewer, as a rule.
UNTIL_FOUND = settings(
    FIXED, max_examples=4000, phases=[Phase.generate], report_multiple_bugs=False
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


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: Fault) -> None:
    with fault(), pytest.raises(AssertionError):  # a fault that crashes raises another error
        run_state_machine_as_test(AdapterMachine, settings=UNTIL_FOUND)


def test_a_blend_is_not_written_into_stacks_that_its_batch_does_not_use() -> None:
    """They were built for one adapter, and have no room for two."""
    machine = AdapterMachine()
    for name, rank in (("a", 1), ("b", 2)):
        machine.attach_adapter(name, LoRA(rank=rank, alpha=1.0, targets=("table", "block.up")))
    machine.enter_spans([(None, 14), ({"a": 1.0, "b": 1.0}, 7)])
    machine.outputs_follow_the_choice()
    machine.enter_spans([("a", 1)])
    machine.outputs_follow_the_choice()
    machine.leave()
    machine.outputs_follow_the_choice()
    machine.leave()
    machine.teardown()

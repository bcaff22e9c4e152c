"""Start lorakit with a deliberate fault, as a proof that the soak test can fail.

python -m benchmarks.faults prefix serve BASE ...    the command after the fault is lorakit's
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from lorakit import cli


def prefix() -> None:
    """Reuse keys and values across adapters: they are then found by the tokens alone."""
    from lorakit.serving import continuous

    assert (
        continuous.salt_of is not None
    )  # fails if the function moves, instead of changing nothing
    continuous.salt_of = lambda lease: ""


def base() -> None:
    """Compute every request by the base, under the receipt of its adapters."""
    from lorakit.serving import continuous

    assert continuous.choice_of is not None
    continuous.choice_of = lambda blend: None


FAULTS: dict[str, Callable[[], None]] = {"prefix": prefix, "base": base}

if __name__ == "__main__":
    _, fault, *arguments = sys.argv
    FAULTS[fault]()
    sys.exit(cli.main(arguments))

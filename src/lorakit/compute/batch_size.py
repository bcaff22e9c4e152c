"""The number of examples to compute at a time, which is halved when they do not fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from lorakit.compute.memory import free_memory
from lorakit.errors import LorakitError, is_out_of_memory, requested_memory

_LOG = logging.getLogger(__name__)

Result = TypeVar("Result")

ADVICE = "Lower data.max_length with data.too_long truncate, or load the base in 4 bits (base.dtype nf4)."


class BatchSize:
    """The number of examples that this process computes at a time.

    Args:
        size: The configured number.
        advice: What to change if a single example does not fit.
        process: The name of this process, if a run has several.
        smaller: How the user sets a smaller size, if it must not be halved. Running out of memory is then an error.
    """

    def __init__(
        self, size: int, *, advice: str = ADVICE, process: str = "", smaller: str = ""
    ) -> None:
        self.configured = size
        self.size = size
        """The configured number, or less since memory ran out."""
        self._advice = advice
        self._smaller = smaller
        self._process = process

    @property
    def in_all(self) -> int:
        """The size that is equal in all processes: the configured one, if each halves its own."""
        return self.size if self._smaller else self.configured

    def fit(self, compute: Callable[[], Result], *, lengths: Sequence[int], during: str) -> Result:
        """Return `compute()`. If it runs out of memory, halve the size, log a warning, and call it again.

        Args:
            compute: Cuts its examples into batches of the present size, and starts from the beginning at each call.
            lengths: The number of tokens in each of its examples.
            during: What is computed, for messages.

        Raises:
            LorakitError: A single example does not fit, or the size must not be halved.
        """
        while True:
            try:
                return compute()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                requested = requested_memory(error)
            free_memory()
            self._halve(lengths, during, requested)

    def _halve(self, lengths: Sequence[int], during: str, requested: str) -> None:
        computed = min(self.size, len(lengths))
        if computed <= 1:
            raise LorakitError(
                f"Out of memory during {during}{requested}, with one example at a time; the longest has "
                f"{max(lengths, default=0):,} tokens. {self._advice}"
            )
        if self._smaller:
            raise LorakitError(
                f"Out of memory during {during}{requested}, with {computed} examples at a time. {self._smaller} "
                f"{self._advice}"
            )
        self.size = computed // 2
        where = f"{self._process} is out of memory" if self._process else "Out of memory"
        _LOG.warning(
            "%s during %s%s. This process now computes %d instead of %d examples at a time. Without dropout, this "
            "changes the result by rounding only.",
            where,
            during,
            requested,
            self.size,
            computed,
        )

"""Whether a Python frame still runs: PyTorch skips `always_call` hooks after a KeyboardInterrupt."""

from __future__ import annotations

import sys
from types import FrameType


def has_ended(frame: FrameType, thread: int) -> bool:
    """Return whether `frame` is no longer on the stack of the thread with this identifier."""
    running = sys._current_frames().get(thread)
    while running is not None and running is not frame:
        running = running.f_back
    return running is None

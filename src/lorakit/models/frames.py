"""Whether a Python frame still runs: PyTorch skips `always_call` hooks after a KeyboardInterrupt."""

from __future__ import annotations

from types import FrameType


def has_ended(frame: FrameType, thread: int) -> bool:
    """Return whether a function's frame has ended."""
    try:
        frame.clear()
    except RuntimeError:  # the frame is executing, in any thread
        return False
    return True

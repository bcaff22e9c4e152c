"""Whether a Python frame still runs: PyTorch skips `always_call` hooks after a KeyboardInterrupt."""

from __future__ import annotations

from types import FrameType


def has_ended(frame: FrameType) -> bool:
    """Return whether a function's frame has ended, by a return or an exception; its local variables are then dropped.

    Not by `sys._current_frames`, which can deadlock if it starts a garbage collection (Python 3.11).
    """
    try:
        frame.clear()
    except RuntimeError:  # the frame is executing, in any thread
        return False
    return True

"""Free the memory of a computation that has failed, so that it can be repeated with less."""

from __future__ import annotations

import gc
import traceback

from lorakit.models.devices import accelerator_module


def free_memory() -> None:
    """Free tensors in reference cycles, and return the cached memory of accelerators.

    Call it outside the `except` block: inside, the error still refers to the failed call's frames, which hold its
    tensors.
    """
    gc.collect()
    if empty_cache := getattr(accelerator_module(), "empty_cache", None):
        empty_cache()


def forget_tensors(error: BaseException) -> None:
    """Clear the frames of an error that is kept: their local variables hold the tensors of the failed call.

    The traceback can still be printed.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__

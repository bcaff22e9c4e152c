"""What the command line does differently in processes that torchrun has started."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path


def is_one_of_several() -> bool:
    """Return whether torchrun has started several processes. Other launchers can set WORLD_SIZE for other purposes."""
    return "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def report_error(message: str) -> None:
    """Write a message where torchrun looks for the cause of a failure, so that its summary ends with it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        # The names of torch.distributed.elastic, which prints the call stack if there is one.
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        record = {"message": {"message": message, "extraInfo": extra}}
        with suppress(OSError):  # the message is also on standard error
            # torchrun reads the file as soon as it exists.
            written = Path(f"{file}.{os.getpid()}")
            written.write_text(json.dumps(record), encoding="utf-8")
            written.replace(file)

"""Let one call of a function fail, to see what state an error or an interrupt leaves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Let the call of this number, from 0, run out of memory."""
    original, calls = getattr(owner, name), itertools.count()

    def failing(*args: Any, **settings: Any) -> Any:
        if next(calls) == call:
            raise torch.OutOfMemoryError
        return original(*args, **settings)

    monkeypatch.setattr(owner, name, failing)

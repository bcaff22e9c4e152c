from __future__ import annotations

import sys
from pathlib import Path

# Every test of this folder can import fakes.
if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

import pytest
from stores import made, root, store

from lorakit.serving.choosing import engine_for
from lorakit.serving.continuous import ContinuousEngine

__all__ = ["made", "root", "store"]


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make engines for tiny models start in a millisecond: filling the default cache of 1 GiB takes half a second."""
    for start in (ContinuousEngine.__init__, engine_for):
        defaults = start.__kwdefaults__
        assert defaults is not None
        monkeypatch.setitem(defaults, "cache_bytes", 2**24)

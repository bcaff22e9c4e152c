from __future__ import annotations

import sys
from pathlib import Path

# Every test of this folder can import fakes.
if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))

from stores import made, root, store

__all__ = ["made", "root", "store"]

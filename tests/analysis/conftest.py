from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
# sample_adapters, at_rest, tiny_runs
for folder in (HERE, HERE.parent / "adapters" / "formats", HERE.parent / "training"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

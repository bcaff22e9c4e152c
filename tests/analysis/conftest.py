from __future__ import annotations

import sys
from pathlib import Path

# at_rest
sys.path.insert(0, str(Path(__file__).parents[1] / "adapters" / "formats"))

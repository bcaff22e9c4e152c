from __future__ import annotations

from served import live, serve

__all__ = ["live", "serve"]

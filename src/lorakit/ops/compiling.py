"""The recompilation limit of torch.compile."""

from __future__ import annotations

import torch

GRAPHS = 32
"""Minimum recompilation limit. Training compiles some functions more often than torch's default of 8 permits."""


def allow_graphs() -> None:
    """Raise torch.compile's recompilation limit to `GRAPHS`. Beyond its limit torch runs a function uncompiled."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)

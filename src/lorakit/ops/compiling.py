"""How many graphs torch.compile may make of one function."""

from __future__ import annotations

import torch

GRAPHS = 32
"""Graphs of one function at least: torch's default, 8, is fewer than training needs of one."""


def allow_graphs() -> None:
    """Let torch.compile make as many graphs of a function as `GRAPHS`; beyond its limit it computes uncompiled."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)

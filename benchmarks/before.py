"""Memory baseline: a process with only torch imported. Import this module first in a measured process."""

from __future__ import annotations

import psutil
import torch

BEFORE = 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss
"""Bytes. 0 on a GPU, where nothing is allocated yet."""

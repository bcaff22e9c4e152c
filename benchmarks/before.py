"""What a process holds with torch imported and nothing else: the first import of one that is measured."""

from __future__ import annotations

import psutil
import torch

BEFORE = 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss
"""Bytes; on a GPU none is allocated yet."""

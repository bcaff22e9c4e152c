"""Synthetic rows, in files like those of the real tasks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = ["river", "pub", "park", "food", "cheap", "plane", "flute", "index", "list"]


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """Return pairs of sentences, with label 1 if they are equal."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        first = " ".join(draw.choice(WORDS) for _ in range(3))
        label = draw.randint(0, 1)
        second = first if label else " ".join(draw.choice(WORDS) for _ in range(3))
        rows.append({"sentence1": first, "sentence2": second, "label": label, "idx": number})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

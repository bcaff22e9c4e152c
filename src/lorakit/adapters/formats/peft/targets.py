"""target_modules: names by which PEFT finds exactly the adapted layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def target_modules(targets: Iterable[str], modules: Sequence[str] | None) -> list[str] | str:
    """The shortest list of path endings that match the targets and nothing else of the model.

    Args:
        targets: Paths of the adapted layers.
        modules: Paths of all modules of the model; None where it is not at hand: then whole paths.

    Returns:
        A list, which every reader of PEFT files understands, or a pattern where no list can tell a
        target from another module (one whose path ends in the target's whole path).
    """
    targets = set(targets)
    others = set(modules or ()) - targets
    taken = {ending for path in others for ending in _endings(path)}
    found: set[str] = set()
    for path in targets:
        endings = _endings(path) if modules is not None else [path]
        ending = next((e for e in endings if e not in taken), None)
        if ending is None:
            return _pattern(targets)
        found.add(ending)
    return sorted(found, key=_natural)


def _endings(path: str) -> list[str]:
    """What PEFT would match the path by: its last part, its last two, and so on."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def _pattern(targets: Iterable[str]) -> str:
    return "|".join(re.escape(path) for path in sorted(targets, key=_natural))


def _natural(path: str) -> list[tuple[int, int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in path.split(".")]

"""Find target_modules with which PEFT selects exactly the adapted layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lorakit.models.layers import natural
from lorakit.models.patterns import endings


def target_modules(targets: Iterable[str], modules: Sequence[str] | None) -> list[str] | str:
    """Return the shortest list of path endings that match the targets and no other module.

    Args:
        targets: Paths of the adapted layers.
        modules: Paths of all modules of the model; None if they are not known: then whole paths are
            returned.

    Returns:
        A list if possible, since every reader of PEFT files supports lists. A pattern of whole paths if
        some other module's path ends in a target's whole path: any list would match that module too.
    """
    targets = set(targets)
    others = set(modules or ()) - targets
    ambiguous = {ending for path in others for ending in endings(path)}
    chosen: set[str] = set()
    for path in targets:
        shortest_first = [*endings(path)][::-1] if modules is not None else [path]
        ending = next((e for e in shortest_first if e not in ambiguous), None)
        if ending is None:
            return "|".join(re.escape(path) for path in sorted(targets, key=natural))
        chosen.add(ending)
    return sorted(chosen, key=natural)

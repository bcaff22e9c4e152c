"""Unknown option names: what to write instead."""

from __future__ import annotations

from collections.abc import Iterable

from lorakit.errors import nearest
from lorakit.other_names import OTHER_NAMES


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the option to write instead of an unknown one, or an empty string."""
    known, name = list(known), name.replace("-", "_")
    if name in known:  # in a YAML file, where dashes do not stand for underscores
        return f" Did you mean '--{name}'?"
    head, _, last = name.rpartition(".")
    if (ours := OTHER_NAMES.get(last)) in known and head in ("", str(ours).rpartition(".")[0]):
        return f" Its name in lorakit is --{ours}."
    if same := [option for option in known if option.rpartition(".")[2] == last]:
        return f" Did you mean '--{same[0]}'?" if len(same) == 1 else _several(same)
    options = [f"--{option}" for option in known]
    return nearest(f"--{name}", options) or nearest(f"--{name.split('.')[0]}", options)


def _several(options: list[str]) -> str:
    names = [f"--{option}" for option in options]
    return f" Did you mean {', '.join(names[:-1])} or {names[-1]}?"

"""Unknown option names: what to write instead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorakit.errors import ConfigurationError, closest
from lorakit.other_names import OTHER_NAMES

if TYPE_CHECKING:
    from lorakit.cli.options import Option

ROWS = {
    **dict.fromkeys(("train", "plan", "data", "init"), "data.train"),
    **dict.fromkeys(("evaluate", "predict"), "data.test"),
    "generate": "file",
}
"""Command: the option that names the file of rows it reads."""

_NAMES_OF_ROWS = ("file", "files", "input", "inputs", "input_file", "data.train", "data.test")


def unknown_options(suggestions: Mapping[str, str], source: str = "") -> ConfigurationError:
    """Return the error about all unknown names, each with its suggestion: those of another library are many."""
    lines = [f"unknown option '{name}'.{text}" for name, text in suggestions.items()]
    first, *more = [*lines[:-1], f"{lines[-1]} --help lists the options."]
    return ConfigurationError(f"{source}{first}", *(f"  {line}" for line in more))


def suggestion(
    name: str, options: Mapping[str, Option], command: str = "", *, dashes: str = "--"
) -> str:
    """Return a sentence with the option to write instead of an unknown one, or an empty string.

    Args:
        name: The unknown name, without leading dashes.
        options: The options of the command, by dotted name.
        command: The command, for the option that names its data.
        dashes: What comes before a name: empty for a key of a YAML file.
    """
    known, name = list(options), name.replace("-", "_")
    switch = re.sub(r"(^|\.)no_", r"\1", name)  # of argparse and typer
    named = [switch] if switch in known else [o for o in known if o.endswith(f".{switch}")]
    if switch != name and len(named) == 1 and bool in options[named[0]].kinds:
        return f" Write {dashes}{named[0]}{'' if dashes else ':'} false to switch it off."
    if name in known:  # in a YAML file, where dashes do not stand for underscores
        return f" Did you mean '{dashes}{name}'?"
    head, _, last = name.rpartition(".")
    if (ours := OTHER_NAMES.get(last)) in known and head in ("", str(ours).rpartition(".")[0]):
        return f" Its name in lorakit is {dashes}{ours}."
    if (command, name) == ("init", "output"):
        return " Did you mean '--file'?"
    if name in _NAMES_OF_ROWS and command in ROWS:
        return f" Did you mean '{dashes}{ROWS[command]}'?"
    if same := [f"{dashes}{option}" for option in known if option.rpartition(".")[2] == last]:
        if len(same) > 1:
            return f" Did you mean {', '.join(same[:-1])} or {same[-1]}?"
        return f" Did you mean '{same[0]}'?"
    found = closest(name, known) or closest(name.split(".")[0], known)
    return "" if found is None else f" Did you mean '{dashes}{found}'?"

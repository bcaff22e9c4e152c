"""The help of a command: the options that matter, or all of them, in groups."""

from __future__ import annotations

import re
import shutil
import textwrap
from dataclasses import MISSING
from typing import Any, Literal, get_args, get_origin

from lorakit.cli.options import Option, missing_options, options_of
from lorakit.configuration import YAML, type_name

WIDTH, COLUMN = 100, 30
"""Width of the longest line, and the column where descriptions start. Terminals narrower than 70 columns indent
descriptions by 6."""

GROUPS = {
    "model": "base adapter adapters allow_other_base alpha tuned",
    "data": "data split tasks text prompt file chat raw system scores limit",
    "method": (
        "method method_settings methods from_adapter lora full bitfit bottleneck prefix_embedding prefix_layer"
    ),
    "training": (
        "epochs max_steps batch_size accumulation packing sampling seed label_smoothing gradient_checkpointing compile "
        "optimizer evaluation checkpoints shard processes_timeout"
    ),
    "generation": "decoding",
    "output": "output resume overwrite loggers json plot report layers figures keep_weights dry_run",
}
"""Headings, and the options and sections under each. Others are the command's own, which come first."""

SHORT = {
    "train": (
        "base.name base.dtype data.train data.validation data.max_length method lora.rank lora.alpha lora.targets "
        "epochs batch_size optimizer.learning_rate output resume overwrite"
    ),
    "plan": (
        "base.name base.dtype data.train data.max_length method lora.rank lora.alpha lora.targets batch_size "
        "optimizer.learning_rate output length json plot report"
    ),
    "evaluate": (
        "base.name adapter data.test data.train data.task data.max_length split scores limit batch_size method "
        "decoding.max_new_tokens decoding.temperature output overwrite"
    ),
    "serve": (
        "base.name base.dtype adapters follow host port keys allow_loading open prompt allow_public adapter_memory "
        "cache_memory max_running max_queue max_tokens max_seconds verify"
    ),
}
"""The options that `--help` shows for commands with many. Other commands show `_MATTERS` of their sections."""

_MATTERS = "base.name base.dtype data.train data.test data.task data.root decoding.max_new_tokens decoding.temperature"


def show_help(
    config_class: type, command: str, text: str, positional: tuple[str, ...], *, every: bool
) -> None:
    """Print the usage, the description and the options of a command: every option, or those that matter."""
    options = options_of(config_class)
    shown = options if every else {n: o for n, o in options.items() if _matters(n, command)}
    hidden = len(options) - len(shown)
    required = missing_options(config_class, {})
    print(_usage(options, command, positional, required))
    print()
    print(textwrap.fill(text, line_width()))
    groups: dict[str, list[Option]] = {heading: [] for heading in ("options", *GROUPS)}
    for name in dict.fromkeys((*positional, *shown)):
        groups["options" if name in positional else _group(name)].append(shown[name])
    for heading, members in groups.items():
        if members:
            print(f"\n{heading}:")
        for option in members:
            text = _description(option, required=option.name in required, brief=hidden > 0)
            print(entry(f"--{option.name}", text))
    print()
    print(entry("--config FILE.yaml", "Read options from a YAML file. Arguments override it."))
    if hidden:
        note = f"Show all options, also the other {hidden}, with their full text."
        print(entry("--help all", note))


def _matters(name: str, command: str) -> bool:
    if command in SHORT:
        return name in SHORT[command].split()
    return "." not in name or name in _MATTERS.split()


def _usage(
    options: dict[str, Option], command: str, positional: tuple[str, ...], required: list[str]
) -> str:
    words = ["usage: lorakit", command]
    for name in positional:
        word = name.rpartition(".")[2].upper() + (" ..." if options[name].takes_list else "")
        words.append(word if name in required else f"[{word}]")
    for name in required:
        if name not in positional:
            words.append(f"--{name} {name.rpartition('.')[2].upper()}")
    words += ["--data.train TRAIN"] if command == "train" else []  # or data.task
    usage = " ".join([*words, "[--option VALUE ...]"])
    return textwrap.fill(usage, line_width(), subsequent_indent="    ", break_on_hyphens=False)


def line_width() -> int:
    """Return the width of the terminal, at most `WIDTH`."""
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)


def entry(flag: str, text: str, column: int = COLUMN) -> str:
    """Return a line of a list, and those below it: the text starts at `column`."""
    column = column if line_width() >= 70 else 6
    lines = textwrap.wrap(text, max(line_width() - column, 20)) or [""]
    if len(flag) > column - 4:
        lines = ["", *lines]
    first, *rest = lines
    return "\n".join([f"  {flag:<{column - 2}}{first}".rstrip(), *(" " * column + r for r in rest)])


def _description(option: Option, *, required: bool, brief: bool) -> str:
    """Return the help text with type and default; `brief` keeps the first sentence of the text."""
    text = re.split(r"(?<=\.) (?=[A-Z])", option.text)[0] if brief else option.text
    facts = [] if _is_plain(option.annotation) else [type_name(option.annotation, YAML)]
    if required:
        facts.append("required")
    elif option.default not in (MISSING, None, "", (), []) and option.default != {}:
        facts.append(f"default: {_shown(option.default)}")
    return text + (f" ({'; '.join(facts)})" if facts else "")


def _is_plain(annotation: Any) -> bool:
    """Whether the type needs no words: a string."""
    return str in (annotation, *get_args(annotation)) and get_origin(annotation) is not Literal


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return ", ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)


def _group(name: str) -> str:
    first = name.split(".")[0]
    return next((heading for heading, names in GROUPS.items() if first in names.split()), "options")

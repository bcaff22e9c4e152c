"""Parse arguments and YAML into one typed configuration, with the same checks for both."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from lorakit import storage
from lorakit.cli.config_files import read_options, shortest_names
from lorakit.cli.option_names import ROWS, suggestion, unknown_options
from lorakit.cli.options import Option, build, missing_options, options_of, sections_of
from lorakit.errors import ConfigurationError
from lorakit.formatting import listed

Config = TypeVar("Config")

_OPTION = re.compile(r"--?[A-Za-z][\w.-]*(=|$)")
_PATTERN_SIGNS = frozenset("()[]{}|")
"""Characters of regular expressions, where a comma may not separate names. A backslash may be in a path."""


def parse(
    config_class: type[Config],
    command: str,
    text: str,
    argv: Sequence[str],
    *positional: str,
    preset: tuple[str, Callable[[str], Mapping[str, Any]]] | None = None,
    unused: Callable[[Mapping[str, Any], Mapping[str, Any]], Iterable[str]] | None = None,
) -> Config:
    """Return a configuration parsed from `argv` and from the YAML files of `--config`.

    Arguments override files, and later files override earlier ones. A mapping replaces another one as a whole, but an
    argument of one entry, such as --lora.rank_pattern.q_proj 2, keeps the file's other entries. Prints the help and
    exits on `--help`.

    Args:
        config_class: Dataclass whose fields are the options; the string under a field is its help.
        command: Name of the command.
        text: Description of the command.
        argv: Arguments after the command's name.
        positional: Fields that arguments without an option name set, in this order. A last field that takes a list
            gets all remaining arguments.
        preset: An option that is no field and that no YAML file can set, and a function from its value to the values
            that it stands for, by dotted name. Files and arguments override them.
        unused: Called with the options in `argv`, and with those of a file or the preset. Returns the options and
            sections that have no effect there. They are skipped and named.

    Raises:
        ConfigurationError: Options are unknown or have an invalid value, and the message names the nearest ones; or an
            option occurs twice in `argv`.
    """
    if "--help" in argv or "-h" in argv:
        from lorakit.cli.help import show_help

        show_help(config_class, command, text, positional, every="all" in argv)
        sys.exit(0)
    preset_name, values_of = preset or (None, dict)
    files, typed, by_entry = _typed(argv, config_class, positional, command, preset_name)
    sources: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = []
    if preset_name in typed:
        chosen = typed.pop(preset_name)
        sources.append((f"{preset_name} {chosen}", values_of(chosen), {}))
    sources += [(file, *read_options(file, config_class, command, preset_name)) for file in files]
    values: dict[str, Any] = {}
    source_of: dict[str, str | None] = {}
    runs: dict[str, Any] = {}  # the run's folder that each file sets
    for source, found, foreign in sources:
        without = unused(typed, found) if unused else ()
        ignored = [n for n in without if any(n in (name, name.split(".")[0]) for name in found)]
        found = {n: v for n, v in found.items() if not {n, n.split(".")[0]} & set(ignored)}
        reasons = {
            "of other commands": shortest_names(foreign, found),
            "without effect beside the arguments": ignored,
        }
        parts = [f"{listed(names, most=10)} ({why})" for why, names in reasons.items() if names]
        if parts:
            print(
                f"note: {source}: lorakit {command} skips {' and '.join(parts)}.", file=sys.stderr
            )
        values.update(found)
        source_of.update(dict.fromkeys(found, source))
        runs.update({source: foreign["output"]} if "output" in foreign else {})
    for name in by_entry:
        if isinstance(values.get(name), dict):
            typed[name] = {**values[name], **typed[name]}
    values.update(typed)
    source_of.update(dict.fromkeys(typed))
    if runs and "output" in missing_options(config_class, values):
        file, run = runs.popitem()
        raise ConfigurationError(
            f"output is not set. The output in {file}, {run}, is the folder of the run, which lorakit {command} does "
            f"not write to. Add --output, for example --output {run}{_ENDINGS.get(command, f'-{command}')}."
        )
    try:
        return build(config_class, values)
    except ConfigurationError as error:
        raise _with_source(error, source_of) from None


def _with_source(
    error: ConfigurationError, source_of: Mapping[str, str | None]
) -> ConfigurationError:
    """Return the error about an option's value with the file or preset that sets it, if one does.

    The message may have the last part of the option's name; it stays as it is if that part has several sources.
    """
    message, *more = error.args
    option = str(message).split(" ")[0]
    whole = [name for name in source_of if name == option]
    named = whole or [name for name in source_of if name.endswith(f".{option}")]
    sources = {source_of[name] for name in named}
    if len(sources) == 1 and (source := sources.pop()) is not None:
        return ConfigurationError(f"{source}: {message}", *more)
    return error


_ENDINGS = {"merge": "-merged", "predict": "-predictions.jsonl"}
"""Endings of a command's output in messages, after the run's folder; else the command's name."""


def _typed(
    argv: Sequence[str],
    config_class: type,
    positional: tuple[str, ...],
    command: str,
    preset: str | None,
) -> tuple[list[str], dict[str, Any], set[str]]:
    """Return the files of `--config`, and the value of every option in `argv` by dotted name, also of the `preset`.

    The third value has the names of the mappings of which `argv` sets single entries.
    """
    added = {} if preset is None else {preset: Option(preset, str, None, "")}
    options = {"config": _CONFIG, **added, **options_of(config_class)}
    values: dict[str, Any] = {}
    by_entry: set[str] = set()
    names: list[str] = []
    files: list[str] = []
    free: list[str] = []
    unknown: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not _OPTION.match(word):
            free.append(word)
            continue
        flag, equals, text = word.partition("=")
        option, key = _option(flag, options, sections_of(config_class), command)
        if option is None:
            unknown[flag] = suggestion(flag.lstrip("-"), options, command)
            while words and not _OPTION.match(words[0]):  # its values
                words.pop(0)
            continue
        given = [text] if equals else _take_values(option, words, bool(positional))
        value = _value(given, option, key)
        if option is _CONFIG:
            files.append(os.path.expanduser(value))
            continue
        names.append(f"{option.name}.{key}" if key else option.name)
        if key:
            by_entry.add(option.name)
            value = {**values.get(option.name, {}), key: value}
        values[option.name] = value
    if unknown:
        raise unknown_options(unknown)
    by_position = _of_positions(free, options, positional, command)
    _require_once([*names, *by_position], options)
    return files, {**by_position, **values}, by_entry


def _require_once(names: Sequence[str], options: Mapping[str, Option]) -> None:
    """Raise a ConfigurationError if an option occurs twice in `names`, or a mapping beside one of its entries."""
    for name in names:
        count = sum(other == name or other.startswith(f"{name}.") for other in names)
        if count > 1:
            takes_list = name in options and options[name].takes_list
            several = f" It takes several values: --{name} A B." if takes_list else ""
            raise ConfigurationError(f"--{name} is given {count} times; give it once.{several}")


_CONFIG = Option("config", str, None, "YAML file with any of these options")


def _option(
    flag: str, options: Mapping[str, Option], sections: Mapping[str, type], command: str
) -> tuple[Option | None, str]:
    """Return the option of an argument, where a dash may stand for an underscore; None for an unknown one.

    The second value is empty, but for --data.columns.prompt the option is data.columns, and the key is prompt.

    Raises:
        ConfigurationError: The option is a section.
    """
    raw = flag.lstrip("-")
    for name in (raw, raw.replace("-", "_")):
        if name in options:
            return options[name], ""
        if name in sections:
            names = [ROWS.get(command, ""), *options]
            first = next(option for option in names if option.startswith(f"{name}."))
            raise ConfigurationError(f"--{name} is a group of options. Write --{first} VALUE.")
    for option in options.values():
        start, key = raw[: len(option.name) + 1], raw[len(option.name) + 1 :]
        if option.takes_mapping and start.replace("-", "_") == f"{option.name}.":
            return option, key  # whose dashes stay
    return None, ""


def _take_values(option: Option, words: list[str], positional: bool) -> list[str]:
    """Remove and return the values of an option at the start of `words`; `positional` words may follow a flag."""
    count = 0
    while count < len(words) and not _OPTION.match(words[count]):
        count += 1
    if bool in option.kinds:
        is_flag = positional and isinstance(_read_text("".join(words[:1])), str)
        count = 0 if is_flag else min(count, 1)
    elif not option.takes_list:
        count = min(count, 1)
    given = words[:count]
    del words[:count]
    return given


def _of_positions(
    words: list[str], options: Mapping[str, Option], positional: tuple[str, ...], command: str
) -> dict[str, Any]:
    """Return the options of the arguments without an option name."""
    values: dict[str, Any] = {}
    for name in positional:
        if not words:
            break
        count = len(words) if options[name].takes_list else 1
        values[name] = words[0] if count == 1 and str in options[name].kinds else words[:count]
        words = words[count:]
    if words:
        raise ConfigurationError(
            f"unexpected argument '{words[0]}'.{_option_of_file(words[0], command)} "
            f"'lorakit {command} --help' shows what to write."
        )
    return values


def _option_of_file(word: str, command: str) -> str:
    """Return a sentence with the option that names this file, or an empty string."""
    from lorakit.data.readers import reader_for

    if word.endswith((".yaml", ".yml")):
        return f" Write --config {word} for a YAML file."
    if command in ROWS and reader_for(Path(word)):
        return f" Write --{ROWS[command]} {word} for a file of data."
    return ""


def _value(words: list[str], option: Option, key: str = "") -> Any:
    """Return the value that the words of an option mean; `build` checks its type."""
    if not words:
        if bool in option.kinds:
            return True
        raise ConfigurationError(f"--{option.name} needs a value.")
    text = words[0]
    if key:
        of_texts = any(get_args(kind)[1:] == (str,) for kind in option.kinds)
        return text if of_texts else _read_text(text)
    if type(None) in option.kinds and text == "null":
        return None
    items = next((get_args(k) for k in option.kinds if get_origin(k) in (list, tuple)), None)
    if items is not None:
        read = _read_text(text) if text.startswith("[") else None
        if isinstance(read, list) and len(words) == 1:
            return read
        is_pattern = not _PATTERN_SIGNS.isdisjoint(text)
        if len(words) == 1 and "," in text and not is_pattern and not os.path.exists(text):
            words = [part.strip() for part in text.split(",") if part.strip()]
        elif len(words) == 1 and str in option.kinds:
            return text
        return [word if _is_text(items[0]) else _read_text(word) for word in words]
    return text if any(map(_is_text, option.kinds)) else _read_text(text)


def _is_text(kind: Any) -> bool:
    return kind is str or get_origin(kind) is Literal


def _read_text(text: str) -> Any:
    """Return the YAML value of a text, or the text itself where it is not YAML."""
    try:
        return storage.parse_yaml(text)
    except yaml.YAMLError:
        return text

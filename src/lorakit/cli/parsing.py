"""Parse arguments and YAML into one typed configuration, with the same checks for both."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import (
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    set_parsing_settings,
)

from lorakit.errors import ConfigurationError, nearest

# The string under a field is its help text.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

Config = TypeVar("Config")


class _Formatter(DefaultHelpFormatter):
    """Help with columns wide enough for nested option names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)

    def add_usage(self, usage, actions, groups, prefix=None) -> None:
        """List only the required options, because a usage line with every option is unreadable."""
        needed = [a for a in actions if a.required]
        super().add_usage(usage, needed, [], prefix)


def parse(
    config_class: type[Config],
    command: str,
    text: str,
    argv: Sequence[str],
    *positional: str,
    defaults: Mapping[str, Any] | None = None,
    typed_only: str | None = None,
) -> Config:
    """Return a configuration parsed from `argv` and from the YAML files of `--config`.

    Args:
        config_class: Dataclass whose fields are the options; the string under a field is its help.
        command: Name of the command.
        text: Description of the command.
        argv: Arguments after the command's name.
        positional: Fields that the first arguments may set without option names, in this order.
        defaults: Values by dotted name that replace the defaults of the class.
        typed_only: An option that the caller already removed from `argv`, so that no YAML file can set it.

    Raises:
        ConfigurationError: An option is unknown or has an invalid value. Names the nearest option.
    """
    parser = ArgumentParser(
        prog=f"lorakit {command}",
        description=text,
        formatter_class=_Formatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_class_arguments(config_class, None)
    if defaults:
        parser.set_defaults(dict(defaults))
    options = [name for action in parser._actions for name in action.option_strings]
    arguments = _named(list(argv), positional)
    _check_files(arguments)
    try:
        parsed = parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        raise ConfigurationError(_explain(str(error), options, typed_only)) from None
    except ValueError as error:  # a setting was rejected inside an optional section
        raise _refusal(error) or ConfigurationError(
            _explain(str(error), options, typed_only)
        ) from None
    except TypeError:  # a list where a section of options belongs
        raise ConfigurationError(
            "A section of options must be a mapping: one 'name: value' per line."
        ) from None
    names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    return config_class(**{name: getattr(parsed, name) for name in names})


def take_option(argv: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """Remove an option that is not a configuration field from `argv`.

    Returns:
        Its value, or None if it is absent, and the other arguments.

    Raises:
        ConfigurationError: It has no value, or occurs twice.
    """
    rest, values = list(argv), []
    for word in argv:
        if word == option or word.startswith(f"{option}="):
            at = rest.index(word)
            _, equals, value = rest.pop(at).partition("=")
            if not equals:
                if at == len(rest) or rest[at].startswith("--"):
                    raise ConfigurationError(f"{option} needs a value.")
                value = rest.pop(at)
            values.append(value)
    if len(values) > 1:
        raise ConfigurationError(f"{option} is given {len(values)} times; give it once.")
    return (values[0] if values else None), rest


def name_list(argv: Sequence[str], option: str) -> list[str]:
    """Pass all arguments before the first option to `option`, as one list."""
    values = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    return [*([option, json.dumps(values)] if values else []), *argv[len(values) :]]


def _named(argv: list[str], positional: tuple[str, ...]) -> list[str]:
    """Insert the option names of `positional` before the leading values."""
    named = []
    for field in positional:
        if not argv or argv[0].startswith("-"):
            break
        named += [f"--{field}", argv.pop(0)]
    return named + argv


def _refusal(error: BaseException | None) -> ConfigurationError | None:
    """Return the ConfigurationError that caused `error`, or None."""
    while error is not None:
        if isinstance(error, ConfigurationError):
            return error
        error = error.__cause__ or error.__context__
    return None


class _StrictLoader(yaml.SafeLoader):
    """Rejects duplicate keys, of which YAML readers silently use the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"'{key.value}' occurs twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _check_files(arguments: list[str]) -> None:
    """Check the YAML files for errors that the parser ignores or does not explain.

    Raises:
        ConfigurationError: A file is missing, is not UTF-8, is not YAML, or has a duplicate key.
    """
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=False):
        name = value if flag == "--config" else flag.removeprefix("--config=")
        if flag != "--config" and name == flag:
            continue
        try:
            yaml.load(Path(name).read_text(encoding="utf-8"), Loader=_StrictLoader)
        except OSError as error:
            raise ConfigurationError(f"--config {name}: {error.strerror or error}.") from None
        except UnicodeDecodeError:
            raise ConfigurationError(f"--config {name} is not UTF-8 text.") from None
        except yaml.YAMLError as error:
            raise ConfigurationError(f"--config {name}: {' '.join(str(error).split())}.") from None


def _explain(message: str, options: list[str], typed_only: str | None) -> str:
    """Return the parser's message, with the nearest option if one is unknown."""
    section = re.search(r'Parser key "([\w.]+)":\s+Unable to load config \'(.*?)\'', message)
    if section:
        first = next((o for o in options if o.startswith(f"--{section[1]}.")), f"--{section[1]}")
        value = section[2].rsplit("/", 1)[-1]
        return f"--{section[1]} is a group of options. Write {first} {value}, or set --{section[1]} to a YAML file."
    missing = re.search(
        r'Parser key "([\w.]+)":.*the following arguments are required: (\w+)', message, re.DOTALL
    )
    if missing:
        name = f"{missing[1]}.{missing[2]}"
        return f"Options of {missing[1]} require {name}. Add --{name}, or remove all --{missing[1]} options."
    found = next((m for pattern in _UNKNOWN if (m := re.search(pattern, message))), None)
    hint = ""
    if found:
        name = ".".join(part for part in found.groups() if part)
        wrong = name if name.startswith("--") else f"--{name}"
        if wrong == typed_only:
            return f"{wrong} works only on the command line; a YAML file cannot set it."
        hint = nearest(wrong.split("=")[0], options) or nearest(wrong.split(".")[0], options)
    return f"{message.strip().rstrip('.')}.{hint} --help lists the options."


_UNKNOWN = (
    r"unrecognized arguments: (\S+)",
    r"Group '([\w.-]+)' does not accept option '([\w.-]+)'",
    r"Option '([\w.-]+)' is not accepted",
    r"Key '([\w.-]+)' is not expected",
    r"does not accept option '([\w.-]+)'",
)
"""Patterns of the parser's messages about an unknown option."""

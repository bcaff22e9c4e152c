"""From arguments and YAML to one typed configuration, with the same strictness for both."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TypeVar

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
    """Help that leaves room for the names of nested options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)

    def add_usage(self, usage, actions, groups, prefix=None) -> None:
        """Name the required options alone: a usage line with every option says nothing."""
        needed = [a for a in actions if a.required]
        super().add_usage(usage, needed, [], prefix)


def parse(
    config_class: type[Config], command: str, text: str, argv: Sequence[str], *positional: str
) -> Config:
    """Fill a configuration dataclass from `argv`, where `--config FILE.yaml` may set any field too.

    Args:
        config_class: Dataclass whose fields are the options; the string under a field is its help.
        command: Name of the command.
        text: What the command does.
        argv: Arguments after the command's name.
        positional: Fields that may be given first and without their names, in this order.

    Raises:
        ConfigurationError: An option is unknown or has a wrong value; names the nearest option.
    """
    parser = ArgumentParser(
        prog=f"lorakit {command}",
        description=text,
        formatter_class=_Formatter,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_class_arguments(config_class, None)
    options = [name for action in parser._actions for name in action.option_strings]
    try:
        parsed = parser.instantiate(parser.parse_args(_named(list(argv), positional)))
    except ArgumentError as error:
        raise ConfigurationError(_explain(str(error), options)) from None
    names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    return config_class(**{name: getattr(parsed, name) for name in names})


def _named(argv: list[str], positional: tuple[str, ...]) -> list[str]:
    """Give leading values without an option's name the names of `positional`."""
    named = []
    for field in positional:
        if not argv or argv[0].startswith("-"):
            break
        named += [f"--{field}", argv.pop(0)]
    return named + argv


def _explain(message: str, options: list[str]) -> str:
    """The parser's message, with the nearest option where one is unknown."""
    flag = re.search(r"unrecognized arguments: (\S+)", message)
    key = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    other = re.search(r"Key '([\w.]+)' is not expected|does not accept option '([\w.]+)'", message)
    wrong = ""
    if flag:
        wrong = flag[1].split("=")[0]
    elif key:
        wrong = f"--{key[1]}.{key[2]}"
    elif other:
        wrong = f"--{other[1] or other[2]}"
    return f"{message.strip().rstrip('.')}.{nearest(wrong, options) if wrong else ''} --help lists the options."

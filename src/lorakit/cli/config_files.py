"""YAML files of options. One file can serve every command: each reads its own options and skips the others'."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from lorakit import storage
from lorakit.cli.option_names import OTHER_NAMES, suggestion, unknown_options
from lorakit.cli.options import options_of, sections_of
from lorakit.errors import ConfigurationError
from lorakit.file_names import CONFIG


def read_options(
    path: str, config_class: type, command: str, typed_only: str | None = None
) -> tuple[dict, dict]:
    """Return the options of a command in a YAML file, and those that only other commands have, by dotted name.

    If a file is that of a training run, its `output`, `method`, `batch_size` and other options outside sections belong
    to that run, and commands other than `lorakit train` and `plan` skip them too.

    Args:
        path: The file.
        config_class: Configuration of the command.
        command: Name of the command.
        typed_only: An option that only the command line can set, such as recipe.

    Raises:
        ConfigurationError: The file cannot be read, sets an option twice, or has keys that no command has; names each
            of them.
    """
    content = _read(path)
    own, sections = options_of(config_class), sections_of(config_class)
    values = _by_name(path, content, sections)
    known = own.keys() | sections.keys()
    of_run = _options_of_the_run(config_class) if _is_of_run(values, command) else set()
    if values.keys() <= known - of_run:
        return values, {}
    every = _options_of(_configurations())
    of_others = {name: kind for c in _configurations() for name, kind in sections_of(c).items()}
    values = _by_name(path, content, {**of_others, **sections})
    if _is_of_run(values, command) or not _options_of_training_only().isdisjoint(values):
        of_run = _options_of_the_run(config_class)
    unknown = {}
    for name in values:
        if name in known or name in of_run:
            continue
        if name == typed_only:
            raise ConfigurationError(
                f"{path}: --{name} works only on the command line; a YAML file cannot set it."
            )
        if name not in every or _means_own(name, own):
            unknown[name] = suggestion(name, own, dashes="")
    if unknown:
        raise unknown_options(unknown, f"{path}: ")
    used = {name: value for name, value in values.items() if name in known - of_run}
    return used, {name: value for name, value in values.items() if name not in used}


def shortest_names(skipped: Iterable[str], values: Mapping[str, Any]) -> list[str]:
    """Replace the options of a section by the section's name, unless the command uses others of the section."""
    used = {name.split(".")[0] for name in values}
    short = [name if name.split(".")[0] in used else name.split(".")[0] for name in skipped]
    return list(dict.fromkeys(short))


def _read(path: str) -> dict[str, Any]:
    file = Path(path, CONFIG)
    if file.is_file():
        raise ConfigurationError(f"--config {path} is a folder. Name its file: --config {file}.")
    content = storage.read_yaml(path, ConfigurationError)
    if content is None:  # an empty file
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"--config {path} is not a mapping of options. Write one 'name: value' per line."
        )
    return content


def _by_name(path: str, content: Mapping[Any, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a file by dotted name; reject one that is set twice."""
    values: dict[str, Any] = {}
    for name, value in _flat(content, sections):
        if name in values:
            raise ConfigurationError(
                f"{path}: {name} occurs twice. A section and a dotted name set the same option; remove one of them."
            )
        values[name] = value
    return values


def _flat(
    content: Mapping[Any, Any], sections: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield every option of a mapping by its dotted name. A base may be its name alone, as in Python."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name in sections and isinstance(value, dict):
            yield from _flat(value, sections, f"{name}.")
        elif isinstance(value, str) and (shorthand := getattr(sections.get(name), "shorthand", "")):
            yield f"{name}.{shorthand}", value
        elif value is None and name in sections:  # a section of which every line is a comment
            continue
        else:
            yield name, value


def _means_own(name: str, own: Mapping[str, Any]) -> bool:
    """Whether an option of another command is probably a mistake for one of this command: `rank` for lora.rank."""
    if "." in name:
        return False
    return OTHER_NAMES.get(name) in own or any(option.endswith(f".{name}") for option in own)


def _configurations(without: Collection[str] = ()) -> list[type]:
    """Return the configurations of all commands `without` these."""
    from lorakit.cli import COMMANDS

    modules = [import_module(f"lorakit.cli.{name}") for name in COMMANDS if name not in without]
    return [config for module in modules for config in module.CONFIGS]


def _options_of(configurations: Iterable[type]) -> set[str]:
    return {name for config in configurations for name in options_of(config)}


def _options_of_the_run(config_class: type) -> set[str]:
    """Return the options outside sections that belong to the training run of a file; none if the command trains."""
    from lorakit.training.config import TrainConfig

    if issubclass(config_class, TrainConfig):
        return set()
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    return names - sections_of(TrainConfig).keys()


def _is_of_run(values: Mapping[str, Any], command: str) -> bool:
    """Whether a file is that of a training run, though `command` may have all of its options."""
    from lorakit.methods.registry import SECTIONS
    from lorakit.tasks import GENERIC

    output, writes_file = values.get("output"), command in ("evaluate", "predict", "generate")
    if writes_file and str(output).endswith(".jsonl"):
        return False
    # A named task brings its training data.
    trains = "data.train" in values or values.get("data.task", "auto") not in ("auto", *GENERIC)
    if trains and (command == "merge" or (writes_file and output is not None)):
        return True
    names_method = not SECTIONS.keys().isdisjoint(str(values.get("method")).split("+"))
    return names_method and command not in ("extract", "compress", "combine")


_WITH_RUNS = ("train", "plan", "demo", "paper")
"""Commands whose options set up training runs."""


def _options_of_training_only() -> set[str]:
    """Return the options of training that only commands with training runs have."""
    from lorakit.training.config import TrainConfig

    return _options_of([TrainConfig]) - _options_of(_configurations(without=_WITH_RUNS))

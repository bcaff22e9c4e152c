"""Read and write YAML: plain values, with the numbers of YAML 1.2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lorakit.errors import LorakitError
from lorakit.storage.paths import reading

_FLOAT = re.compile(
    r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_INTEGER = re.compile(r"[-+]?\d+$|0x[0-9a-fA-F]+$")


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does (5e-4 is a number, 010 is ten, 1:30 and dates are texts); keys occur once."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping; of two equal keys PyYAML would use the last without a word."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"'{key.value}' occurs twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would read as numbers."""


_OF_YAML_1_1 = tuple(f"tag:yaml.org,2002:{name}" for name in ("timestamp", "int", "float"))
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OF_YAML_1_1]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda _, node: int(node.value, 16 if node.value.startswith("0x") else 10),
)


def parse_yaml(text: str, name: str = "the text") -> Any:
    """Return the value of a YAML document; errors call it `name`.

    Raises:
        yaml.YAMLError: The text is not valid YAML.
    """
    loader = _Loader(text)
    loader.name = name
    return loader.get_single_data()


def read_yaml(path: str | Path, error: type[LorakitError], *, secret: bool = False) -> Any:
    """Return the value in a YAML file.

    With `secret`, the error for invalid YAML names only its line: the message of the YAML library quotes the text.

    Raises:
        error: The file cannot be read, or is not valid UTF-8 or YAML.
    """
    with reading(path, error):
        text = Path(path).read_text(encoding="utf-8")
    try:
        return parse_yaml(text, str(path))
    except yaml.YAMLError as wrong:
        mark = getattr(wrong, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "it has a control character"
        reason = where if secret else " ".join(str(wrong).split())
        raise error(
            f"'{path}' is not valid YAML: {reason}. Correct it, or restore the file from a copy."
        ) from None


def dump_yaml(value: Any, **options: Any) -> str:
    """Return a value as YAML that `parse_yaml` reads back; options as for `yaml.dump`."""
    return yaml.dump(value, Dumper=_Dumper, allow_unicode=True, **options)

"""Read and write YAML: plain values, with limits, since a file may come from anyone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lorakit.errors import LorakitError
from lorakit.storage.refusals import reading

MAX_BYTES = 1 << 20
"""Largest YAML file. A configuration has a few kB."""
MAX_NODES = 20_000
"""Most values and keys in a file. An alias counts all values that it repeats."""
MAX_DEPTH = 50
"""Most levels of lists and mappings."""
MAX_DIGITS = 400
"""Longest number, in characters."""

_MERGE = "tag:yaml.org,2002:merge"
_NUMBER = re.compile(
    r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_INTEGER = re.compile(r"[-+]?\d+$|0x[0-9a-fA-F]+$")


class Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does (5e-4 is a number, 010 is ten, 1:30 and dates are texts); rejects duplicate keys.

    Every invalid document raises a yaml.YAMLError, usually with its line.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, and count it with all that it contains or repeats."""
        mark = self.peek_event().start_mark
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _invalid(f"lists and mappings are nested more than {MAX_DEPTH} levels deep", mark)
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if not is_alias:
            self._sizes[node] = 1 + sum(map(self._sizes.__getitem__, _children(node)))
        elif node not in self._sizes:
            raise _invalid("an alias is inside the value that it repeats", mark)
        if self._sizes[node] > MAX_NODES or len(self._sizes) > MAX_NODES:
            raise _invalid(f"with its aliases it has more than {MAX_NODES:,} values", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping whose keys are different texts or numbers."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _invalid("a key is a list or a mapping, expected a name", key.start_mark)
            if key.value in seen:
                raise _invalid(f"'{key.value}' occurs twice", key.start_mark)
            seen.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge the mappings of `<<`; PyYAML 6.0.4 loses what one of them overrides."""
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        own = []
        for key, value in node.value:
            if key.tag != _MERGE:
                own.append((key, value))
                continue
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    raise _invalid("<< needs a mapping or a list of mappings", source.start_mark)
                self.flatten_mapping(source)
                for pair in source.value:
                    merged.setdefault(pair[0].value, pair)
        node.value = list((merged | {pair[0].value: pair for pair in own}).values())

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct a value; what its tag cannot be made of is a YAMLError too."""
        tag = str(node.tag).removeprefix("tag:yaml.org,2002:")
        if tag in ("int", "float") and len(node.value) > MAX_DIGITS:
            raise _invalid(f"a number has more than {MAX_DIGITS} characters", node.start_mark)
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # !!int x, !!bool 5, !!timestamp x: each raises another type
            raise _invalid(
                f"{str(node.value)[:40]!r} is not of type {tag}", node.start_mark
            ) from error


def _construct_integer(_: Loader, node: yaml.ScalarNode) -> int:
    return int(node.value, 16 if node.value[:2] == "0x" else 10)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `Loader` would read as numbers."""


_OF_YAML_1_1 = tuple(f"tag:yaml.org,2002:{name}" for name in ("timestamp", "int", "float"))
for _class in (Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OF_YAML_1_1]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
Loader.add_constructor("tag:yaml.org,2002:int", _construct_integer)


def parse_yaml(text: str, name: str = "the text") -> Any:
    """Return the value of a YAML document; errors call it `name`.

    Raises:
        yaml.YAMLError: The text is not valid YAML, or exceeds a limit.
    """
    loader = Loader(text)
    loader.name = name
    return loader.get_single_data()


def read_yaml(path: str | Path, error: type[LorakitError], *, secret: bool = False) -> Any:
    """Return the value in a YAML file.

    With `secret`, the error for invalid YAML names only its line: the message of the YAML library quotes the text.

    Raises:
        error: The file cannot be read, is not valid UTF-8 or YAML, or exceeds a limit.
    """
    with reading(path, error):
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise error(
                f"'{path}' is larger than {MAX_BYTES >> 20} MiB, the limit for a YAML file. Check the path."
            )
        text = data.decode("utf-8")
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


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _invalid(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)

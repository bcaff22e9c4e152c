"""The adaptable layers of a model, as a table to print and a list of roles to choose from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lorakit.models.heads import is_adaptable
from lorakit.models.layers import RowSlice, weight_shape
from lorakit.models.places import ROLES, Place, all_places
from lorakit.models.tree import unwrapped, walk


@dataclass(frozen=True, slots=True)
class TargetRow:
    """Layers with the same role, name and shape, in all blocks.

    Attributes:
        role: their role; "" if they can be selected only by name.
        modules: their paths, with differing numbers written as ``{0..11}``.
        count: number of layers.
        shape: weight shape of one layer, output rows first.
        slice: the output rows with this role; None for all.
    """

    role: str
    modules: str
    count: int
    shape: tuple[int, ...]
    slice: RowSlice | None


@dataclass(frozen=True, slots=True)
class TargetList:
    """The targets of a model: iterates over its roles, prints as a table."""

    rows: tuple[TargetRow, ...]

    def __iter__(self) -> Iterator[str]:
        present = {row.role for row in self.rows}
        return iter([role for role in ROLES if role in present])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __bool__(self) -> bool:
        return bool(self.rows)  # also where no row has a role

    def __str__(self) -> str:
        cells: list[tuple[str, str, str, str]] = [("role", "modules", "layers", "weight (out, in)")]
        for row in self.rows:
            rows = f"  {row.slice}" if row.slice else ""
            cells.append((row.role or "-", row.modules, str(row.count), f"{row.shape}{rows}"))
        widths = [max(len(line[column]) for line in cells) for column in range(3)]
        lines = [
            f"{role:<{widths[0]}}  {modules:<{widths[1]}}  {count:>{widths[2]}}  {shape}"
            for role, modules, count, shape in cells
        ]
        return "\n".join(lines)

    __repr__ = __str__


def targets(model: nn.Module) -> TargetList:
    """List the adaptable layers of ``model``: every role with its modules, then layers by name."""
    model = unwrapped(model)
    modules = list(walk(model))
    shapes = {at.path: weight_shape(at.module) for at in modules if is_adaptable(at)}
    places = [place for place in all_places(model, modules) if place.path in shapes]
    with_role = {place.path for place in places}
    places += [Place(path, "") for path in shapes if path not in with_role]

    alike: dict[tuple[str, str, tuple[int, ...], RowSlice | None], list[str]] = {}
    for place in places:
        key = (place.role, _skeleton(place.path), shapes[place.path], place.slice)
        alike.setdefault(key, []).append(place.path)
    order = {role: position for position, role in enumerate((*ROLES, ""))}
    rows = [
        TargetRow(role, _pattern(paths), len(paths), shape, rows)
        for (role, _, shape, rows), paths in alike.items()
    ]
    return TargetList(tuple(sorted(rows, key=lambda row: order[row.role])))


def _skeleton(path: str) -> str:
    return ".".join("#" if part.isdecimal() else part for part in path.split("."))


def _pattern(paths: list[str]) -> str:
    """Return one pattern for paths that differ only in their numbers."""
    columns = zip(*(path.split(".") for path in paths), strict=True)
    return ".".join(_numbers(set(column)) for column in columns)


def _numbers(parts: set[str]) -> str:
    if len(parts) == 1:
        return next(iter(parts))
    numbers = sorted(map(int, parts))
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{{{','.join(map(str, numbers))}}}"

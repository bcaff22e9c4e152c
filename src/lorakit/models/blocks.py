"""The blocks of a model: the repeated layers that its hidden states pass one after the other."""

from __future__ import annotations

from torch import nn

from lorakit.models.layers import LocatedModule, is_inside, walk
from lorakit.models.places import ATTENTION_ROLES, all_places


def stacks(model: nn.Module) -> dict[str, list[str]]:
    """Return the paths of the model's blocks, in order, by the path of the list that they stand in.

    An encoder or a decoder has one stack, an encoder-decoder two. On an architecture whose attention
    is not known, the longest list of modules is taken for the stack. Empty for a model without one.
    """
    modules = list(walk(model))
    attention = [p.path for p in all_places(model, modules) if p.role in ATTENTION_ROLES]
    found = {
        at.path: [f"{at.path}.{name}" for name, _ in at.module.named_children()]
        for at in _outermost(modules, nn.ModuleList)
    }
    known = {path: blocks for path, blocks in found.items() if _any_inside(attention, path)}
    if known or not found:
        return known
    longest = max(found, key=lambda path: len(found[path]))
    return {longest: found[longest]}


def _outermost(modules: list[LocatedModule], kind: type[nn.Module]) -> list[LocatedModule]:
    """The modules of a kind that lie in no other of that kind: a block may hold lists of its own."""
    found: list[LocatedModule] = []
    for at in modules:  # parents come before their children
        if isinstance(at.module, kind) and not _any_inside([at.path], *(o.path for o in found)):
            found.append(at)
    return found


def _any_inside(paths: list[str], *roots: str) -> bool:
    return any(is_inside(path, root) for path in paths for root in roots)

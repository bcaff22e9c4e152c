"""The blocks of a model: the repeated layers that process its hidden states in sequence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lorakit.errors import TargetError
from lorakit.models.architectures import DOWN, GATE, UP, K, O, Q, V, architecture_of
from lorakit.models.layers import weight_shape
from lorakit.models.places import ATTENTION_ROLES, Place, all_places, name_in_block
from lorakit.models.tree import LocatedModule, is_inside, submodule, walk


@dataclass(frozen=True, slots=True)
class Site:
    """A module of a block whose output an adapter can change; `width` is its number of features."""

    path: str
    block: str
    width: int


def stacks(model: nn.Module) -> dict[str, list[str]]:
    """Return the block paths of each stack in order, keyed by the path of its `nn.ModuleList`.

    Lists of modules inside a block are not stacks. An encoder or a decoder has one stack, an
    encoder-decoder two. If the attention of the architecture is not known, the longest list of
    modules counts as the stack. A model without lists of modules has no stack.
    """
    return _structure(model)[2]


def _structure(
    model: nn.Module,
) -> tuple[list[LocatedModule], list[Place], dict[str, list[str]]]:
    """Return the modules of a model, its places with a role, and its `stacks`."""
    modules = list(walk(model))
    places = list(all_places(model, modules))
    attention = [place.path for place in places if place.role in ATTENTION_ROLES]
    lists: dict[str, list[str]] = {}
    for path, module, *_ in modules:  # parents come before their children
        if isinstance(module, nn.ModuleList) and not _any_inside([path], *lists):
            lists[path] = [f"{path}.{name}" for name, _ in module.named_children()]
    found = {path: blocks for path, blocks in lists.items() if _any_inside(attention, path)}
    if lists and not found:
        longest = max(lists, key=lambda path: len(lists[path]))
        found = {longest: lists[longest]}
    return modules, places, found


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of all stacks, each once."""
    paths = [path for stack in stacks(model).values() for path in stack]
    return list(dict.fromkeys(submodule(model, path) for path in paths))


def residual_branches(model: nn.Module) -> list[Site]:
    """Return the sites where an adapter can change the output of an attention or MLP before the residual sum.

    The site is the dropout before the sum if the block has one as a module, else the output
    projection.

    Raises:
        TargetError: The architecture's blocks are not known, or one has no such site.
    """
    modules = {at.path: at for at in walk(model)}
    sites = []
    for block, projections in _projections_by_block(model).items():
        for role, sublayer in ((O, "attention"), (DOWN, "MLP")):
            outputs = [path for path, role_here in projections.items() if role_here == role]
            if not outputs or _is_read_directly(modules, outputs[0]):
                raise TargetError(
                    f"'{block}' ({type(modules[block].module).__name__}) has no {sublayer} output projection "
                    "whose output an adapter can change. Choose a kind that acts on the block's output: lin or "
                    "pfeiffer."
                )
            sites += [
                Site(_after_dropout(modules, path), block, weight_shape(modules[path].module)[0])
                for path in outputs
            ]
    return sites


def block_outputs(model: nn.Module) -> list[Site]:
    """Return the module that outputs each block's hidden states: the block, or the LayerNorm at its end.

    Raises:
        TargetError: The architecture's blocks are not known.
    """
    modules = {at.path: at for at in walk(model)}
    sites = []
    for block, projections in _projections_by_block(model).items():
        at = modules[next(path for path, role in projections.items() if role == O)]
        architecture = architecture_of(at.config)
        assert architecture is not None  # _projections_by_block rejects unknown ones
        norm = architecture.output_norm_of(at.config)
        width = weight_shape(at.module)[0]
        sites.append(Site(f"{block}.{norm}" if norm else block, block, width))
    return sites


def parts_by_token(model: nn.Module) -> tuple[list[str], list[str]] | None:
    """Return the blocks, and the largest modules of the last one that process each token independently.

    They contain its output projection and its MLP, but no query, key or value projection. None if the
    architecture's blocks are not known, or if another stack consumes this output.
    """
    _, places, by_list = _structure(model)
    (blocks,) = by_list.values() if len(by_list) == 1 else ([],)
    if not blocks:
        return None
    places = [place for place in places if is_inside(place.path, blocks[-1])]
    qkv = [place.path for place in places if place.role in (Q, K, V)]
    parts: dict[str, None] = {}
    for place in places:
        if place.role in (O, GATE, UP, DOWN):
            part = place.path
            while (parent := part.rpartition(".")[0]) != blocks[-1] and not _any_inside(
                qkv, parent
            ):
                part = parent
            parts[part] = None
    roles = {place.role for place in places}
    by_token = qkv and {O, DOWN} <= roles and not _any_inside(qkv, *parts)
    return (blocks, list(parts)) if by_token else None


def _projections_by_block(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return path -> role of the output projections of each block, in model order."""
    modules, places, by_list = _structure(model)
    roles = {place.path: place.role for place in places if place.role in (O, DOWN)}
    known = {at.path for at in modules if architecture_of(at.config) is not None}
    blocks = [block for stack in by_list.values() for block in stack]
    by_block = {
        block: {path: role for path, role in roles.items() if is_inside(path, block)}
        for block in blocks
    }
    if not blocks or not all(block in known and O in by_block[block].values() for block in blocks):
        kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
        raise TargetError(
            f"The blocks of the architecture {kind} are not known, so no module can be inserted into them. Use LoRA "
            "or BitFit, which select modules and parameters by name."
        )
    return by_block


def _after_dropout(modules: dict[str, LocatedModule], path: str) -> str:
    architecture, name = architecture_of(modules[path].config), name_in_block(path)
    assert architecture is not None
    assert name is not None
    dropout = path.removesuffix(name) + architecture.dropouts.get(name, "")
    return dropout if dropout in modules else path


def _is_read_directly(modules: dict[str, LocatedModule], path: str) -> bool:
    """Whether an `nn.MultiheadAttention` reads the layer's weight without calling it."""
    parent = path.rpartition(".")[0]
    return parent in modules and isinstance(modules[parent].module, nn.MultiheadAttention)


def _any_inside(paths: list[str], *roots: str) -> bool:
    return any(is_inside(path, *roots) for path in paths)

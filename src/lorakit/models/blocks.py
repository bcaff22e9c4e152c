"""The blocks of a model: the repeated layers that its hidden states pass one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lorakit.errors import TargetError
from lorakit.models.architectures import DOWN, GATE, UP, K, O, Q, V, architecture_of
from lorakit.models.layers import LocatedModule, is_inside, walk, weight_shape
from lorakit.models.places import ATTENTION_ROLES, all_places, name_in_block


@dataclass(frozen=True, slots=True)
class Site:
    """A module of a block whose output can be changed, and how wide that is."""

    path: str
    block: str
    width: int


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


def residual_branches(model: nn.Module) -> list[Site]:
    """Return where the output of each attention and each MLP can be changed before its residual sum.

    That is after the dropout in between, where the block has one as a module, else after the
    projection itself.

    Raises:
        TargetError: The architecture's blocks are not known, or one has no such place.
    """
    modules = {at.path: at for at in walk(model)}
    sites = []
    for block, projections in _projections_by_block(model).items():
        for role, what in ((O, "attention"), (DOWN, "MLP")):
            here = [path for path, found in projections.items() if found == role]
            if not here or _is_read_directly(modules, here[0]):
                raise TargetError(
                    f"'{block}' ({type(modules[block].module).__name__}) has no output projection of its {what} "
                    "whose result an adapter could change. Choose a kind that acts on a block's output: lin or "
                    "pfeiffer."
                )
            sites += [
                Site(_after_dropout(modules, path), block, weight_shape(modules[path].module)[0])
                for path in here
            ]
    return sites


def block_outputs(model: nn.Module) -> list[Site]:
    """Return where each block gives out its hidden states: the block itself, or the LayerNorm it ends with.

    Raises:
        TargetError: The architecture's blocks are not known.
    """
    modules = {at.path: at for at in walk(model)}
    sites = []
    for block, projections in _projections_by_block(model).items():
        any_of_attention = next(path for path, role in projections.items() if role == O)
        at = modules[any_of_attention]
        architecture = architecture_of(at.config)
        assert architecture is not None  # _projections_by_block refused the others
        norm = architecture.output_norm_of(at.config)
        width = weight_shape(at.module)[0]
        sites.append(Site(f"{block}.{norm}" if norm else block, block, width))
    return sites


def parts_by_token(model: nn.Module) -> tuple[str, list[str]] | None:
    """Return the last block, and the largest modules of it that treat every token by itself.

    They hold its output projection and its MLP, and no projection of what tokens see of each other. None where the
    blocks of the architecture are not known, or where another stack reads what this one gives out.
    """
    modules = list(walk(model))
    (blocks,) = found.values() if len(found := stacks(model)) == 1 else ([],)
    if not blocks:
        return None
    here = [p for p in all_places(model, modules) if is_inside(p.path, blocks[-1])]
    seen = [place.path for place in here if place.role in (Q, K, V)]
    parts: dict[str, None] = {}
    for place in here:
        if place.role in (O, GATE, UP, DOWN):
            part = place.path
            while (parent := part.rpartition(".")[0]) != blocks[-1] and not _any_inside(
                seen, parent
            ):
                part = parent
            parts[part] = None
    roles = {place.role for place in here}
    by_token = seen and {O, DOWN} <= roles and not _any_inside(seen, *parts)
    return (blocks[-1], list(parts)) if by_token else None


def _projections_by_block(model: nn.Module) -> dict[str, dict[str, str]]:
    """Role by path of the projections in each block, in the model's order."""
    modules = list(walk(model))
    roles = {p.path: p.role for p in all_places(model, modules) if p.role in (O, DOWN)}
    known = {at.path for at in modules if architecture_of(at.config) is not None}
    blocks = [block for stack in stacks(model).values() for block in stack]
    found = {
        block: {path: role for path, role in roles.items() if is_inside(path, block)}
        for block in blocks
    }
    if not found or not all(block in known and O in found[block].values() for block in blocks):
        kind = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
        raise TargetError(
            f"The blocks of the architecture {kind} are not known, so that nothing can be put between them. LoRA "
            "and BitFit work by the names of modules and parameters."
        )
    return found


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


def _outermost(modules: list[LocatedModule], kind: type[nn.Module]) -> list[LocatedModule]:
    """The modules of a kind that lie in no other of that kind: a block may hold lists of its own."""
    found: list[LocatedModule] = []
    for at in modules:  # parents come before their children
        if isinstance(at.module, kind) and not _any_inside([at.path], *(o.path for o in found)):
            found.append(at)
    return found


def _any_inside(paths: list[str], *roots: str) -> bool:
    return any(is_inside(path, root) for path in paths for root in roots)

"""Find the layers of a model that have a role.

A role names the same layer on every architecture: ``attention.q``, ``.k``, ``.v``, ``.o``,
``mlp.gate``, ``.up``, ``.down``, ``experts``, ``embedding``, ``head``. ``attention.qv`` and the like combine
several roles, ``attention`` and ``mlp`` all of their roles, and ``all-linear`` every linear layer of
the blocks and the stacked weights of experts. The table of :mod:`lorakit.models.architectures` maps layers to roles.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from torch import nn

from lorakit.errors import TargetError, nearest
from lorakit.models.architectures import (
    DOWN,
    GATE,
    UP,
    Architecture,
    Fused,
    K,
    O,
    Q,
    V,
    architecture_of,
)
from lorakit.models.heads import (
    classification_head,
    embedding_paths,
    head_paths,
    is_adaptable,
    output_embeddings,
)
from lorakit.models.layers import (
    RowSlice,
    StackedWeight,
    is_linear,
    is_stacked_experts,
    stacked_weights,
    weight_shape,
    why_not_adaptable,
)
from lorakit.models.tree import LocatedModule, is_inside, walk

ATTENTION_ROLES = (Q, K, V, O)
MLP_ROLES = (GATE, UP, DOWN)
EXPERTS, EMBEDDING, HEAD, ALL_LINEAR = "experts", "embedding", "head", "all-linear"
ROLES = (*ATTENTION_ROLES, *MLP_ROLES, EXPERTS, EMBEDDING, HEAD)
"""The single roles: each names one kind of layer."""

_COMBINED = {
    "attention": ATTENTION_ROLES,
    "mlp": MLP_ROLES,
    ALL_LINEAR: (*ATTENTION_ROLES, *MLP_ROLES, EXPERTS),
}


_USUAL = ("attention.qv", "attention.qkv", *_COMBINED)
"""The combinations of roles that messages name."""


@dataclass(frozen=True, slots=True)
class Place:
    """A layer, or a slice of its output rows, that can have an adapter.

    Attributes:
        path: the layer's module path in the model. For the fused input projection of an
            ``nn.MultiheadAttention``, it is the path of that module.
        role: one of :data:`ROLES`, or "" for a layer with no role or several.
        slice: the adapted output rows of the layer; None for all of them.
    """

    path: str
    role: str
    slice: RowSlice | None = None


def is_role(entry: str) -> bool:
    """Whether ``entry`` is a role or a combination of roles."""
    return bool(_expand(entry))


def role_names(present: Collection[str]) -> list[str]:
    """Return the roles in ``present``, and the usual combinations of them."""
    combined = [
        entry
        for entry in _USUAL
        # all-linear, attention and mlp skip the roles that a model lacks.
        if (any if entry in _COMBINED else all)(role in present for role in _expand(entry))
    ]
    return [*(role for role in ROLES if role in present), *combined]


def find_places(model: nn.Module, entry: str) -> list[Place]:
    """Return the places of a role, in model order. The model may be on the meta device.

    ``all-linear`` is all of ``attention``, ``mlp`` and ``experts``, and any other linear layer in a block, such
    as DeBERTa's position projections. If the roles of the architecture are not known, it is every
    linear layer outside the output head and the classification head. Layers that the model never calls
    are left out, and further layers with one output or input, which no rank above 1 fits.

    Raises:
        TargetError: ``entry`` is not a role, the model has no layer with it, or a layer with it
            cannot be adapted.
    """
    roles = _expand(entry)
    if not roles:
        raise TargetError(f"'{entry}' is not a role.{nearest(entry, role_names(ROLES))}")
    modules = list(walk(model))
    _check_adaptable(model, modules, entry, set(roles))
    places = [place for place in all_places(model, modules) if place.role in roles]
    if entry == ALL_LINEAR:
        places += _further_linear_places(model, modules, {place.path for place in places})
    missing = set(roles) - {place.role for place in places}
    if not places or (missing and entry not in _COMBINED):
        _no_such_role(model, modules, entry)
    return in_model_order(places, modules)


def all_places(model: nn.Module, modules: list[LocatedModule]) -> Iterator[Place]:
    """Yield every place of the model that has a role.

    A model with stacked experts has no roles of the MLP, not even in its blocks without experts: `mlp` would leave out
    the experts, and where shared experts are is not known. `find_places` refuses them.
    """
    has_experts = any(is_stacked_experts(at.path, at.module) for at in modules)
    places = _in_blocks(modules)
    yield from (p for p in places if not (has_experts and p.role in MLP_ROLES))
    yield from (Place(at.path, EXPERTS) for at in modules if isinstance(at.module, StackedWeight))
    yield from (Place(path, EMBEDDING) for path in embedding_paths(model, modules))
    yield from (Place(path, HEAD) for path in head_paths(model, modules))


def _in_blocks(modules: list[LocatedModule]) -> Iterator[Place]:
    for at in modules:
        path, module, config, _ = at
        architecture, name = architecture_of(config), name_in_block(path)
        if isinstance(module, nn.MultiheadAttention):
            yield from _multihead_projections(path, module)
        elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            yield Place(f"{path}.linear1", UP)
            yield Place(f"{path}.linear2", DOWN)
        elif architecture and name and why_not_adaptable(module) is None:
            yield from _projections(at, architecture, name)


def _expand(entry: str) -> tuple[str, ...]:
    """Return the single roles that ``entry`` combines; empty if it is not a role."""
    if entry in ROLES:
        return (entry,)
    if entry in _COMBINED:
        return _COMBINED[entry]
    letters = re.fullmatch(r"attention\.([qkvo]+)", entry)
    roles = tuple(f"attention.{letter}" for letter in letters[1]) if letters else ()
    return roles if len(set(roles)) == len(roles) else ()


def name_in_block(path: str) -> str | None:
    """Return the part of ``path`` after its last number, or None if it is in no block."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else None


def _projections(at: LocatedModule, architecture: Architecture, name: str) -> Iterator[Place]:
    content = architecture.layers.get(name)
    if isinstance(content, str):
        yield Place(at.path, content)
    elif isinstance(content, Fused):
        # A layer of unexpected width has no role; find_places raises an error that gives the reason.
        with suppress(ValueError):
            slices = content.slices(weight_shape(at.module)[0], at.config)
            yield from (Place(at.path, role, rows) for role, rows in slices.items())


def _multihead_projections(path: str, module: nn.MultiheadAttention) -> Iterator[Place]:
    if why_not_adaptable(module) is None:
        embed = module.embed_dim
        for position, role in enumerate((Q, K, V)):
            rows = RowSlice(groups=1, stride=3 * embed, offset=position * embed, width=embed)
            yield Place(path, role, rows)
    yield Place(f"{path}.out_proj", O)


def _further_linear_places(
    model: nn.Module, modules: list[LocatedModule], taken: set[str]
) -> list[Place]:
    heads = classification_head(model)
    output = output_embeddings(model)
    return [
        Place(at.path, "")
        for at in modules
        if is_linear(at.module)
        and at.path not in taken
        and at.module is not output
        and not is_inside(at.path, *heads)
        and (architecture_of(at.config) is None or name_in_block(at.path) is not None)
        and min(weight_shape(at.module)) > 1
        and is_adaptable(at)
    ]


def _check_adaptable(
    model: nn.Module, modules: list[LocatedModule], entry: str, roles: set[str]
) -> None:
    """Reject an entry that includes a layer without an adapter: a part would be skipped silently."""
    for at in modules:
        path, module, config, _ = at
        architecture, name = architecture_of(config), name_in_block(path)
        if isinstance(module, nn.MultiheadAttention) and roles & {Q, K, V}:
            reason = why_not_adaptable(module)
            if reason is not None:
                raise TargetError(
                    f"'{entry}' includes '{path}', an nn.MultiheadAttention that cannot be "
                    f"adapted: {reason}. To adapt only its output projection, write 'attention.o'."
                )
        if roles & {*MLP_ROLES, EXPERTS} and is_stacked_experts(path, module):
            _check_experts(model, at, entry, roles)
        if architecture is None or name is None:
            continue
        if not roles & set(architecture.roles_of(name)):
            continue
        reason = why_not_adaptable(module)
        if reason is not None:
            raise TargetError(
                f"'{entry}' includes '{path}' ({type(module).__name__}), which cannot be adapted: "
                f"{reason}."
            )
        content = architecture.layers[name]
        if isinstance(content, Fused):
            try:
                content.slices(weight_shape(module)[0], config)
            except ValueError as error:
                raise TargetError(
                    f"'{path}' is not laid out as in other {config.model_type} models: {error}. "
                    f"Name modules instead of roles; '{name}' adapts the whole layer."
                ) from None


def _check_experts(model: nn.Module, at: LocatedModule, entry: str, roles: set[str]) -> None:
    """Reject an entry that includes stacked experts if it leaves them out or they cannot be adapted."""
    of = f"'{entry}' includes the experts of {_kind(model)}, and '{at.path}' ({type(at.module).__name__})"
    if not stacked_weights(at.path, at.module):
        raise TargetError(
            f"{of} stores them in a form that cannot be adapted: quantised, or not as one matrix for each expert. "
            "Write 'attention', or name modules."
        )
    if EXPERTS not in roles:
        raise TargetError(
            f"{of} stores them as stacked weights, not as layers with this role. Write 'experts' for them alone, "
            "'all-linear' for all linear layers and the experts, or name modules."
        )


def names_of_adaptable(modules: Iterable[LocatedModule]) -> list[str]:
    """Return the last part, and the last two, of every adaptable layer's path."""
    names: dict[str, None] = {}
    for at in modules:
        if is_adaptable(at):
            parts = at.path.split(".")
            names |= {".".join(parts[-1:]): None, ".".join(parts[-2:]): None}
    return list(names)


def _no_such_role(model: nn.Module, modules: list[LocatedModule], entry: str) -> NoReturn:
    present = {place.role for place in all_places(model, modules)}
    kind = _kind(model)
    if present & {*ATTENTION_ROLES, *MLP_ROLES}:
        raise TargetError(
            f"{kind} has no layer for '{entry}'. It has: "
            f"{', '.join(role for role in ROLES if role in present)}."
        )
    names = [name for name in names_of_adaptable(modules) if "." not in name]
    has = f"it has: {', '.join(names) or 'no layer that can be adapted'}."
    if entry == ALL_LINEAR:
        raise TargetError(
            f"{kind} has no linear layer outside its heads. Write module names; {has}"
        )
    raise TargetError(
        f"Roles such as '{entry}' are not known for the architecture {kind}. Write 'all-linear' or module names "
        f"instead; {has}"
    )


def _kind(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__


def in_model_order(places: Iterable[Place], modules: Iterable[LocatedModule]) -> list[Place]:
    """Drop duplicates, and slices of layers that are also adapted in full; sort by path, then rows."""
    unique: dict[tuple[str, RowSlice | None], Place] = {}
    for place in places:
        known = unique.get((place.path, place.slice))
        if known is None or not known.role:
            unique[place.path, place.slice] = place
    order = {m.path: position for position, m in enumerate(modules)}
    unique_places = [
        place
        for place in unique.values()
        if place.slice is None or (place.path, None) not in unique
    ]
    return sorted(unique_places, key=lambda p: (order[p.path], p.slice.offset if p.slice else 0))

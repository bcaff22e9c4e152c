"""Resolve targets (roles, module-name suffixes, regular expressions) to layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import regex
from torch import nn

from lorakit.errors import TargetError, nearest
from lorakit.models.architectures import O
from lorakit.models.heads import is_never_called
from lorakit.models.layers import StackedWeight, why_not_adaptable
from lorakit.models.patterns import Matcher
from lorakit.models.places import (
    Place,
    all_places,
    find_places,
    in_model_order,
    is_role,
    names_of_adaptable,
    role_names,
)
from lorakit.models.tree import LocatedModule, is_inside, walk


def resolve_targets(model: nn.Module, targets: str | Sequence[str]) -> list[Place]:
    """Return the places that ``targets`` match, in model order, each once.

    Every entry is a role, else the end of a module path (``q_proj``, ``self_attn.q_proj``), else a
    regular expression that must match the whole path. A layer that one entry matches in part and
    another in full is adapted in full. An ``nn.MultiheadAttention`` means its fused input
    projection and its ``out_proj``, the experts of a mixture their stacked weights.

    Raises:
        TargetError: an entry matches nothing, or matches a layer that cannot be adapted.
    """
    entries = [targets] if isinstance(targets, str) else list(targets)
    if not entries:
        raise TargetError("No targets given. Write at least one, such as 'attention.qv'.")
    modules = list(walk(model))
    # Once for all entries: a list of paths can have hundreds.
    roles = functools.cache(lambda: _roles_by_path(model, modules))
    places: list[Place] = []
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise TargetError(f"A target is {entry!r}; a non-empty string was expected.")
        places += (
            find_places(model, entry) if is_role(entry) else _named(model, modules, roles, entry)
        )
    return in_model_order(places, modules)


def _named(
    model: nn.Module,
    modules: list[LocatedModule],
    roles: Callable[[], dict[str, set[str]]],
    entry: str,
) -> list[Place]:
    """Return the places of a module-name suffix or regular expression; `roles` are those of each path."""
    hits = [m for m in modules if m.path == entry or m.path.endswith(f".{entry}")]
    if not hits:
        hits = _matching(model, modules, entry)
    hits = _with_stacked_weights(modules, hits)
    _check_adaptable(modules, hits, entry)
    _check_called(hits, entry)
    places = []
    for path, module, *_ in hits:
        layer_roles = roles().get(path, set())
        places.append(Place(path, next(iter(layer_roles)) if len(layer_roles) == 1 else ""))
        if isinstance(module, nn.MultiheadAttention):
            places.append(Place(f"{path}.out_proj", O))
    return places


def _with_stacked_weights(
    modules: list[LocatedModule], hits: list[LocatedModule]
) -> list[LocatedModule]:
    """Return the hits with the stacked weights of experts in place of the experts."""
    experts = {id(at.parent) for at in modules if isinstance(at.module, StackedWeight)}
    found = {id(hit.module) for hit in hits} & experts
    inside = [m for m in modules if isinstance(m.module, StackedWeight) and id(m.parent) in found]
    return [*(hit for hit in hits if id(hit.module) not in experts), *inside]


def _roles_by_path(model: nn.Module, modules: list[LocatedModule]) -> dict[str, set[str]]:
    roles: dict[str, set[str]] = {}
    for place in all_places(model, modules):
        roles.setdefault(place.path, set()).add(place.role)
    return roles


def _matching(model: nn.Module, modules: list[LocatedModule], entry: str) -> list[LocatedModule]:
    """Return the layers whose whole path matches a regular expression, at least one."""
    matcher, syntax_error = Matcher(), ""
    try:
        matching = [m for m in modules if matcher.fullmatch(entry, m.path)]
    except regex.error as error:
        matching, syntax_error = [], f" (it is not a valid regular expression: {error})"
    except TimeoutError:
        raise TargetError(
            f"Target {entry!r:.60} is a regular expression that takes too long to match. Write a simpler one, or the "
            "names of the layers."
        ) from None
    # A pattern such as ".*attn.*" also matches containers and dropouts. Skip them, since they have
    # no weight of their own.
    hits = [
        m
        for m in matching
        if why_not_adaptable(m.module) is None
        or any(True for _ in m.module.parameters(recurse=False))
    ]
    if not hits:
        names = names_of_adaptable(modules)
        roles = role_names({place.role for place in all_places(model, modules)})
        raise TargetError(
            f"Target '{entry}' matches no layer of {type(model).__name__}{syntax_error}."
            f"{nearest(entry, [*roles, *names])} Roles of this model: {', '.join(roles) or 'none'}; "
            f"module names: {', '.join(n for n in names if '.' not in n)}."
        )
    return hits


def _check_adaptable(modules: list[LocatedModule], hits: list[LocatedModule], entry: str) -> None:
    bad = [hit for hit in hits if why_not_adaptable(hit.module) is not None]
    if not bad:
        return
    path, module, *_ = bad[0]
    inside = names_of_adaptable(m for m in modules if is_inside(m.path, path))
    names = [name for name in inside if "." not in name]
    raise TargetError(
        f"Target '{entry}' matches '{path}' ({type(module).__name__})"
        f"{f' and {len(bad) - 1} more' if bad[1:] else ''}, which cannot be adapted: "
        f"{why_not_adaptable(module)}. "
        + (f"Name the layers inside: {', '.join(names)}." if names else "Leave it out.")
    )


def _check_called(hits: list[LocatedModule], entry: str) -> None:
    for at in hits:
        if is_never_called(at):
            fix = "Leave it out."
            if isinstance(at.module, nn.Embedding):
                fix = "Write 'embedding' for the embeddings that it calls."
            raise TargetError(
                f"Target '{entry}' matches '{at.path}', which {type(at.parent).__name__} never calls, or not "
                f"in training: then it uses only the weight, and an adapter would have no effect. {fix}"
            )

"""`lorakit inspect`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.adapters.stored import StoredAdapter


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """What `lorakit inspect` shows."""

    adapter: str
    """Adapter folder (lorakit's or PEFT's), or a loralib file."""
    alpha: float | None = None
    """The constant of a loralib file, which does not record it; by default the scaling is shown for 1."""
    layers: bool = False
    """One line for each layer instead of one for each kind of layer."""
    json: bool = False
    """Print JSON for programs."""


def run(argv: Sequence[str]) -> None:
    """Read the adapter's files alone and print what they hold."""
    from rich.console import Console

    from lorakit.adapters import formats
    from lorakit.cli.parsing import parse

    config = parse(
        InspectConfig,
        "inspect",
        "Show what an adapter holds, without loading its base: method, layers, ranks, norms, base, "
        "provenance. Usage: lorakit inspect ADAPTER.",
        argv,
        "adapter",
    )
    stored = formats.read(config.adapter, alpha=1.0 if config.alpha is None else config.alpha)
    facts = describe(stored)
    if config.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _print(Console(), facts, config.layers)


def describe(stored: StoredAdapter) -> dict[str, Any]:
    """The adapter's facts as JSON-able values; norms are Frobenius norms of ``scaling * B A``."""
    from lorakit.adapters.measures import delta_norm

    return {
        "method": repr(stored.method),
        "parameters": stored.parameter_count,
        "bytes": stored.byte_count,
        "layers": {
            path: {
                "kind": layer.kind,
                "rank": layer.rank,
                "alpha": layer.alpha,
                "scaling": layer.scaling,
                "shape": [list(layer.A.shape), list(layer.B.shape)],
                "norm": delta_norm(layer),
                "dora": layer.magnitude is not None,
                "slices": [str(s) for s in layer.slices],
            }
            for path, layer in stored.layers.items()
        },
        "trained": {name: list(tensor.shape) for name, tensor in stored.trained.items()},
        "base": None if stored.base is None else stored.base.to_dict(),
        "provenance": stored.provenance,
        "notices": stored.notices,
    }


def _print(console: Any, facts: dict[str, Any], each_layer: bool) -> None:
    from rich.table import Table

    console.print(f"[bold]{facts['method']}[/bold]", highlight=False)
    console.print(f"{facts['parameters']:,} parameters, {facts['bytes'] / 2**20:.2f} MiB")
    groups: dict[str, list[dict[str, Any]]] = {}
    for path, layer in facts["layers"].items():
        key = path if each_layer else re.sub(r"\.\d+(?=\.|$)", ".*", path)
        groups.setdefault(key, []).append(layer)
    if groups:
        table = Table(box=None, pad_edge=False)
        for heading in ("layer", "count", "kind", "rank", "scaling", "norm of the change"):
            table.add_column(heading, justify="left" if heading in ("layer", "kind") else "right")
        for key, layers in groups.items():
            norms = [layer["norm"] for layer in layers]
            spread = f"{min(norms):.3g}" + (f" to {max(norms):.3g}" if len(norms) > 1 else "")
            table.add_row(
                key,
                str(len(layers)),
                _one(layer["kind"] + (" (DoRA)" if layer["dora"] else "") for layer in layers),
                _one(layer["rank"] for layer in layers),
                _one(f"{layer['scaling']:g}" for layer in layers),
                spread,
            )
        console.print(table)
    for name, shape in facts["trained"].items():
        console.print(f"trained in full: {name} {tuple(shape)}")
    if facts["base"]:
        source = facts["base"].get("source", {})
        console.print(f"base: {source.get('name') or 'unnamed'} ({facts['base'].get('class', '')})")
    for key, value in facts["provenance"].items():
        text = json.dumps(value, ensure_ascii=False)
        console.print(f"{key}: {text if len(text) < 200 else text[:197] + '...'}", highlight=False)
    for notice in facts["notices"]:
        console.print(f"note: {notice}", highlight=False)


def _one(values: Any) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))

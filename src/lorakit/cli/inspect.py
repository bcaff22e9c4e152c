"""`lorakit inspect`."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.parsing import parse
from lorakit.compute.adapted_config import AdapterFileConfig
from lorakit.configuration import LocalPath

if TYPE_CHECKING:
    from lorakit.adapters.formats.stored import StoredAdapter


@dataclass(frozen=True, kw_only=True)
class InspectConfig(AdapterFileConfig):
    """Options of `lorakit inspect`."""

    adapter: LocalPath
    """Adapter folder (lorakit or PEFT), or a loralib file."""
    alpha: float | None = None
    """alpha of a loralib file, which does not store it. Default: 1."""
    layers: bool = False
    """Print one line per layer instead of one per kind of layer."""
    json: bool = False
    """Print JSON."""


CONFIGS = (InspectConfig,)

OF_A_RUN = ("max_steps", "epochs", "batch_size", "accumulation", "optimizer.learning_rate")
"""Settings of the run that are printed; `--json` has all."""


def run(argv: Sequence[str]) -> None:
    """Read the adapter's files and print their contents, without the base."""
    config = parse(
        InspectConfig,
        "inspect",
        "Show the contents of an adapter without loading its base: method, layers, ranks, norms, base, "
        "provenance.",
        argv,
        "adapter",
    )
    from lorakit.adapters import formats
    from lorakit.cli.console import console, print_json
    from lorakit.methods.method import describe as described_method

    assumes_alpha = config.alpha is None and Path(config.adapter).is_file()
    stored = formats.read(config.adapter, alpha=1.0 if assumes_alpha else config.alpha)
    if assumes_alpha:
        stored.notices.append(
            "The file does not record alpha; 1 is assumed here. Set the lora_alpha it was trained with: --alpha 16."
        )
    file = formats.tensor_file(config.adapter)
    facts = {**describe(stored), "bytes": file.stat().st_size if file else 0}
    if config.json:
        print_json(facts)
    else:
        _print(console(), described_method(stored.method), facts, config.layers)


def describe(stored: StoredAdapter) -> dict[str, Any]:
    """Return the adapter's contents as JSON values; `norm` is the Frobenius norm of ``scaling * B A``."""
    from lorakit.analysis.spectrum import layer_norm

    return {
        "method": repr(stored.method),
        "parameters": stored.num_parameters,
        "layers": {
            path: {
                "kind": layer.kind,
                "rank": layer.rank,
                "alpha": layer.alpha,
                "scaling": layer.scaling,
                "A": list(layer.A.shape),
                "B": list(layer.B.shape),
                "norm": layer_norm(layer),
                "dora": layer.magnitude is not None,
                "lora_bias": layer.B_bias is not None,
                "slices": [str(s) for s in layer.slices],
            }
            for path, layer in stored.layers.items()
        },
        "modules": {name: list(tensor.shape) for name, tensor in stored.module_tensors.items()},
        "trained": {name: list(tensor.shape) for name, tensor in stored.trained.items()},
        "base": None if stored.base is None else dataclasses.asdict(stored.base),
        "provenance": stored.provenance,
        "notices": stored.notices,
    }


def _print(console: Any, method: str, facts: dict[str, Any], each_layer: bool) -> None:
    from lorakit.analysis.deltas import family
    from lorakit.cli.layer_table import layer_table
    from lorakit.formatting import size, visible

    # Print names and texts of a downloaded file literally, never as rich markup.
    console.print(method, style="bold", markup=False)
    console.print(f"{facts['parameters']:,} parameters, {size(facts['bytes'])}")
    if facts["layers"]:
        rows = {
            path: {
                "kind": layer["kind"] + (" (DoRA)" if layer["dora"] else ""),
                "rank": str(layer["rank"]),
                "scaling": f"{layer['scaling']:g}",
                "norm": layer["norm"],
            }
            for path, layer in facts["layers"].items()
        }
        console.print(layer_table(rows, each=each_layer, what="layer"))
    counts = Counter(
        f"{name if each_layer else family(name)} {tuple(shape)}"
        for name, shape in facts["modules"].items()
    )
    for key, count in counts.items():
        console.print(visible(f"{count} x {key}"), markup=False)
    for name, shape in facts["trained"].items():
        console.print(visible(f"trained in full: {name} {tuple(shape)}"), markup=False)
    if facts["base"]:
        name, class_name = facts["base"]["name"], facts["base"]["class_name"]
        console.print(visible(f"base: {name or 'unnamed'} ({class_name})"), markup=False)
    for key, value in facts["provenance"].items():
        if text := _recorded(key, value):
            shown = text if len(text) < 200 else text[:197] + "..."
            console.print(visible(f"{key}: {shown}"), markup=False)
    for notice in facts["notices"]:
        console.print(visible(f"note: {notice}"), markup=False)


def _recorded(key: str, value: Any) -> str:
    """Return a record of the provenance on one line; "" if it is empty."""
    from lorakit.formatting import number
    from lorakit.reporting.run_settings import chosen_settings

    if value in (None, [], {}):
        return ""
    if key == "config" and isinstance(value, dict):
        settings = [f"{name} {text}" for name, text in chosen_settings(value, OF_A_RUN)]
        return f"{', '.join(settings)} (all settings: --json)" if settings else ""
    if isinstance(value, dict) and all(isinstance(one, float) for one in value.values()):
        return ", ".join(f"{name} {number(one)}" for name, one in value.items())
    return number(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)

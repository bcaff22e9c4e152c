"""Time to attach, save and load an adapter: lorakit and PEFT.

Every process attaches one adapter to a fresh model, saves it, and loads it onto another fresh model. The times
include one-off work of a first call, as users see it, but not imports.

python -m benchmarks.adapter lorakit --result FILE    one process
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from rich.table import Table
from torch import nn

import lorakit
from benchmarks import report
from benchmarks.runs import process_parser, runs_of, write_result
from lorakit.models.dtype_choice import compute_dtype
from lorakit.models.dtypes import dtype_name
from lorakit.models.loading import load_base

BASE_MODEL = "smollm2-135m"
RANK, ALPHA = 8, 16
ROUNDS, QUICK_ROUNDS = 5, 1
STEPS = ("attach", "save", "load")


# --- one process -------------------------------------------------------------------------------------


def of_lorakit(model: nn.Module, fresh: nn.Module, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return the three steps with lorakit, in order."""
    attach, load = lorakit.attach, lorakit.load  # import outside the timed steps
    method = lorakit.LoRA(rank=RANK, alpha=ALPHA, targets="all-linear")
    handles: list[lorakit.Adapters] = []
    return {
        "attach": lambda: handles.append(attach(model, method)),
        "save": lambda: handles[0].save(folder),
        "load": lambda: load(fresh, folder),
    }


def of_peft(model: Any, fresh: Any, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return the three steps with PEFT, in order."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear"
    )
    models: list[Any] = []
    return {
        "attach": lambda: models.append(get_peft_model(model, config)),
        "save": lambda: models[0].save_pretrained(folder),
        "load": lambda: PeftModel.from_pretrained(fresh, folder),
    }


LIBRARIES = {"lorakit": of_lorakit, "PEFT": of_peft}


def run() -> None:
    """Measure in this process."""
    parser = process_parser(__doc__)
    parser.add_argument("library", choices=LIBRARIES)
    args = parser.parse_args()
    model = load_base(BASE_MODEL).model
    figures = {}
    with TemporaryDirectory() as scratch:
        steps = LIBRARIES[args.library](model, copy.deepcopy(model), Path(scratch) / "adapter")
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            figures[name] = time.perf_counter() - began
    write_result(args, figures)


# --- the part ----------------------------------------------------------------------------------------


def main(*, quick: bool) -> None:
    """Measure both libraries alternately, and write their table."""
    report.say("\nadapter: attach, save and load")
    runs = runs_of("adapter", "all-linear", quick)
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in LIBRARIES}
    for number in range(QUICK_ROUNDS if quick else ROUNDS):
        for name in LIBRARIES:
            seconds = runs.run(f"{number} {name}", "benchmarks.adapter", name)
            figures[name].append(seconds)
            times = ", ".join(f"{step} {1000 * seconds[step]:.0f} ms" for step in STEPS)
            report.say(f"  {number + 1}  {name:<8} {times}")
    section = report.Section(
        f"An adapter on all linear layers of {BASE_MODEL}, {dtype_name(compute_dtype())}, rank {RANK}",
        durations(figures),
        f"Milliseconds of the first call in a process: median (range) of {len(figures['lorakit'])} processes per "
        "library, in alternating order.",
    )
    report.publish("adapter", {"machine": report.machine(), "runs": figures}, [section], quick)


def durations(figures: dict[str, list[dict[str, float]]]) -> Table:
    """Return a table of medians and ranges."""
    table = report.table("library", *STEPS)
    for name, processes in figures.items():
        cells = []
        for step in STEPS:
            times = [1000 * seconds[step] for seconds in processes]
            cells.append(f"{median(times):,.0f} ({min(times):,.0f} to {max(times):,.0f})")
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    run()

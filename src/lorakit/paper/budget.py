"""Convert a time for the whole grid to a number of steps per data set, with a short timing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorakit import storage
from lorakit.compute.base import open_base
from lorakit.configuration import nested
from lorakit.data import DataTask, RowReader, load_examples
from lorakit.errors import ConfigurationError
from lorakit.evaluation.evaluate import evaluate
from lorakit.file_names import LORAKIT_JSON
from lorakit.paper.runs import EVALUATIONS, Runner, Say, TableRun
from lorakit.paper.study import StudyData, Variant
from lorakit.tasks.registry import task_type
from lorakit.training.config import TrainConfig
from lorakit.training.loop import train

STEPS = 6
"""Steps of a timed run."""
FEW, MORE = 8, 40
"""Examples in two timed evaluations; their difference in time gives the time per example."""
FEWEST = 10
"""Fewest steps of a useful run."""
RESERVE = 0.9
"""Share of the budget to use."""


def divide(
    seconds: float, runner: Runner, cells: Sequence[tuple[StudyData, Variant]], say: Say
) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the steps per run by data set, and the measurements.

    Data sets share the time equally. All methods on a data set take the same number of steps.

    Raises:
        ConfigurationError: The budget is too small for `FEWEST` steps per run.
    """
    start, config = time.monotonic(), runner.config
    sets = {data_set.key: data_set for data_set, _ in cells}
    timing: dict[str, Any] = {}
    for key, data_set in sets.items():
        variants = [variant for other, variant in cells if other.key == key]
        # All methods are timed on the first data set only. Later sets time one method and scale the others.
        reference = next(iter(timing.values()), {}).get("methods", {})
        timed = [v for v in variants if v.key in reference][:1] or variants
        say(f"timing {', '.join(variant.label for variant in timed)} on {key}")
        timing[key] = _time(runner, data_set, timed)
        methods = timing[key]["methods"]
        first = timed[0].key
        for variant in variants:
            cost = reference.get(variant.key, reference.get(first))
            if variant.key not in methods and cost is not None:
                methods[variant.key] = {
                    name: methods[first][name] * cost[name] / max(reference[first][name], 1e-9)
                    for name in ("step", "overhead")
                }
    remaining = seconds * RESERVE - (time.monotonic() - start)
    runs = config.trials + config.seeds - 1
    steps: dict[str, int] = {}
    needed = 0.0
    for key, measured in timing.items():
        fixed, per_step = 0.0, 0.0
        for cost in measured["methods"].values():
            # A held-out evaluation is a forward pass: per example, about a third of a step's time.
            held_out = EVALUATIONS * measured["held_out"] * cost["step"] / config.batch_size / 3
            fixed += runs * (cost["overhead"] + held_out) + config.seeds * measured["scoring"]
            per_step += runs * cost["step"]
        steps[key] = int((remaining / len(sets) - fixed) / per_step)
        needed += fixed + FEWEST * per_step
    if min(steps.values()) < FEWEST:
        raise ConfigurationError(
            f"A budget of {config.budget} is too small for {len(cells) * runs} runs: {FEWEST} steps of each would take "
            f"about {(needed + seconds - remaining) / 60:.0f}m. Increase --budget, or reduce --tasks, --methods, "
            "--seeds or --trials."
        )
    for key, measured in timing.items():
        if (most := measured["most_steps"]) is not None:
            steps[key] = min(steps[key], most)
    for key, count in steps.items():
        say(f"{key}: every run takes {count} steps of {config.batch_size} examples")
    return steps, timing


def _time(runner: Runner, data_set: StudyData, variants: Sequence[Variant]) -> dict[str, Any]:
    """Time a few steps of each variant on a data set, and an evaluation of the first."""
    config = runner.config
    folder = config.folder / "timing"
    methods: dict[str, dict[str, float]] = {}
    scoring: list[float] = []
    examples: dict[str, int] = {}
    most_held_out = 0
    try:
        for variant in variants:
            run = TableRun(data_set=data_set, variant=variant, rate=variant.rates(1)[0], seed=0)
            settings = {
                **runner.settings(run),
                "output": str(folder / data_set.key / variant.key),
                "max_steps": STEPS,
                "evaluation.every": STEPS,
                "evaluation.limit": 16,
                "resume": False,
                "overwrite": True,
            }
            start = time.monotonic()
            result = train(TrainConfig(**nested(settings)))
            overhead = time.monotonic() - start - result.seconds
            methods[variant.key] = {"step": result.seconds / STEPS, "overhead": max(overhead, 0.0)}
            adapter = result.best or result.adapter
            if not scoring:
                # A row of WebNLG or DART is several examples, which the run has counted.
                data = storage.read_json(adapter / LORAKIT_JSON)["provenance"]["data"]
                examples = {split: part["examples"] for split, part in data.items()}
                most_held_out = runner.settings(run)["evaluation.limit"]
                for limit in (FEW, MORE):
                    start = time.monotonic()
                    evaluate(replace(runner.evaluate_config(data_set, adapter), limit=limit))
                    scoring.append(time.monotonic() - start)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    scored = _count_scored(runner, data_set)
    per_example = max(scoring[1] - scoring[0], 0.0) / (MORE - FEW)
    return {
        "methods": methods,
        "scoring": scoring[0] + per_example * max(scored - FEW, 0),
        "scored": scored,
        "held_out": min(examples.get("validation", 0), most_held_out),
        "most_steps": config.epochs
        and max(1, int(config.epochs * examples["train"] / config.batch_size)),
    }


def _count_scored(runner: Runner, data_set: StudyData) -> int:
    """Return the number of examples or prompts that the table scores."""
    config = runner.config
    data = runner.evaluate_config(data_set, config.folder).data
    if task_type(data_set.task).kind != "text":
        count = len(RowReader().read(data, data_set.split).rows)
    else:
        base = open_base(config.base, DataTask(name=data_set.task))
        count = len({e.prompt for e in load_examples(data, data_set.split, base.text_tokenizer)})
    return min(count, config.eval_limit or count)

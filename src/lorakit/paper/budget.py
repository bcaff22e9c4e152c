"""From a time for the whole grid to a number of steps for each data set, by a short timing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lorakit.data import DataConfig, DataTask, load_examples
from lorakit.data.config import Split
from lorakit.data.sources import read_source
from lorakit.errors import ConfigurationError
from lorakit.evaluation.base import open_base
from lorakit.evaluation.evaluate import evaluate
from lorakit.paper.paper_config import PaperConfig
from lorakit.paper.runs import EVALUATIONS, Runner, TableRun
from lorakit.paper.settings import train_config
from lorakit.paper.study import StudyData, Variant
from lorakit.tasks.registry import task_type
from lorakit.training.loop import train

STEPS = 6
"""Steps of a run that is timed."""
FEW, MORE = 8, 40
"""Examples scored twice over, whose difference in time is that of the rest."""
FEWEST = 10
"""Steps below which a run shows nothing."""
RESERVE = 0.9
"""Share of the budget that is planned for."""

Say = Callable[[str], None]


def divide(
    seconds: float,
    runner: Runner,
    cells: Sequence[tuple[StudyData, Variant]],
    config: PaperConfig,
    say: Say,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the steps of a run by data set, and what was measured.

    Each data set has an equal part of the time, and within it every method the same number of steps.

    Raises:
        ConfigurationError: The budget is too small for runs that show anything.
    """
    began = time.monotonic()
    sets = {data_set.key: data_set for data_set, _ in cells}
    timing: dict[str, Any] = {}
    for key, data_set in sets.items():
        variants = [variant for other, variant in cells if other.key == key]
        # How methods compare is measured once; on the other data sets one of them stands for all.
        known = next(iter(timing.values()), {}).get("methods", {})
        timed = variants if not known else [v for v in variants if v.key in known][:1] or variants
        say(f"timing {', '.join(variant.label for variant in timed)} on {key}")
        timing[key] = _time(runner, data_set, timed, config)
        methods = timing[key]["methods"]
        first = timed[0].key
        for variant in variants:
            like = known.get(variant.key, known.get(first))
            if variant.key not in methods and like is not None:
                methods[variant.key] = {
                    name: methods[first][name] * like[name] / max(known[first][name], 1e-9)
                    for name in ("step", "overhead")
                }
    left = seconds * RESERVE - (time.monotonic() - began)
    steps: dict[str, int] = {}
    needed = 0.0
    for key, measured in timing.items():
        fixed, per_step, runs = 0.0, 0.0, config.trials + config.seeds - 1
        for cost in measured["methods"].values():
            # Held-out evaluations take a pass forward, about a third of a step's time for each example.
            held_out = EVALUATIONS * measured["held_out"] * cost["step"] / config.batch_size / 3
            fixed += runs * (cost["overhead"] + held_out) + config.seeds * measured["scoring"]
            per_step += runs * cost["step"]
        steps[key] = int((left / len(sets) - fixed) / per_step)
        needed += fixed + FEWEST * per_step
        most = measured["most_steps"]
        if most is not None:
            steps[key] = min(steps[key], most)
    if min(steps.values()) < FEWEST:
        raise ConfigurationError(
            f"A budget of {config.budget} is too small for {len(cells) * (config.trials + config.seeds - 1)} runs: "
            f"{FEWEST} steps of each would take about {(needed + seconds - left) / 60:.0f}m. Give more time, or fewer "
            "tasks, methods, seeds or trials."
        )
    for key, count in steps.items():
        say(f"{key}: {count} steps of {config.batch_size} examples for every run")
    return steps, timing


def _time(
    runner: Runner, data_set: StudyData, variants: Sequence[Variant], config: PaperConfig
) -> dict[str, Any]:
    """Measure a few steps of every method on a data set, and scoring with one of them."""
    folder = config.folder / "timing"
    methods: dict[str, dict[str, float]] = {}
    scoring: list[float] = []
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
            began = time.monotonic()
            result = train(train_config(settings))
            overhead = time.monotonic() - began - result.seconds
            methods[variant.key] = {"step": result.seconds / STEPS, "overhead": max(overhead, 0.0)}
            adapter = result.best or result.adapter
            if not scoring:
                for limit in (FEW, MORE):
                    began = time.monotonic()
                    evaluate(replace(runner.evaluate_config(data_set, adapter), limit=limit))
                    scoring.append(time.monotonic() - began)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    training, held_out = _training_sizes(runner, data_set, variants[0])
    scored = _scored(runner, data_set, config)
    each = max(scoring[1] - scoring[0], 0.0) / (MORE - FEW)
    return {
        "methods": methods,
        "scoring": scoring[0] + each * max(scored - FEW, 0),
        "scored": scored,
        "held_out": held_out,
        "most_steps": config.epochs and max(1, int(config.epochs * training / config.batch_size)),
    }


def _training_sizes(runner: Runner, data_set: StudyData, variant: Variant) -> tuple[int, int]:
    """Return about how many examples a run trains on, and how many held-out ones it scores."""
    config = runner.train_config(TableRun(data_set=data_set, variant=variant, rate=1e-3, seed=0))
    rows = _rows(config.data, "train")
    held_out = round(rows * config.data.validation_fraction)
    scored = held_out if data_set.holds_out else _rows(config.data, "validation")
    return rows - held_out, min(scored, config.evaluation.limit or scored)


def _rows(data: DataConfig, split: Split) -> int:
    where = data.source(split)
    return 0 if where is None else len(read_source(where, data.hub_split(split)).rows)


def _scored(runner: Runner, data_set: StudyData, config: PaperConfig) -> int:
    """Return how many examples or prompts are scored in the end."""
    data = runner.evaluate_config(data_set, config.folder).data
    if task_type(data_set.task).kind != "text":
        count = _rows(data, data_set.split)
    else:
        base = open_base(config.base, DataTask(name=data_set.task))
        assert base.tokenizer is not None  # open_base refuses a base without
        count = len({e.prompt for e in load_examples(data, data_set.split, base.tokenizer)})
    return min(count, config.eval_limit or count)

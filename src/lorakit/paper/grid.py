"""The grid of a table: methods x data sets x seeds, every run made once, whenever it is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorakit import storage
from lorakit.adapters.summary import count_parameters
from lorakit.data import DataConfig, DataTask
from lorakit.errors import ConfigurationError, RunFolderError, TargetError
from lorakit.evaluation.base import open_base
from lorakit.evaluation.score import is_better
from lorakit.models.heads import classification_head
from lorakit.models.layers import is_inside
from lorakit.paper.budget import divide
from lorakit.paper.paper_config import PaperConfig
from lorakit.paper.runs import HELD_OUT_SHARE, Measure, Record, Runner, TableRun
from lorakit.paper.study import Study, StudyData, Variant
from lorakit.paper.subset import write_subset
from lorakit.tasks.registry import task_type

GRID = "grid.json"
MOST_HELD_OUT, LEAST_HELD_OUT = 1_000, 200
"""Held-out examples beside a drawn part of the training data: as many as it has, within these."""

_SHARED = ("table", "trials", "epochs", "limit", "eval_limit", "beams", "batch_size", "budget")
"""What all runs in a folder have in common."""
_DIVIDED = ("tasks", "methods", "seeds")
"""What the share of each run in a budget depends on."""

Say = Callable[[str], None]


@dataclass(kw_only=True, slots=True)
class Count:
    """Parameters that a variant trains on the base of a data set."""

    trained: int | None = None
    """Without a new task head, as the paper counts; None where the method does not fit the base."""
    head: int = 0
    """Those of the head, trained beside it."""
    left_out: str = ""
    """Why the method does not fit."""


@dataclass(kw_only=True)
class GridSetup:
    """What is settled before the first run, and kept in grid.json."""

    counts: dict[str, dict[str, Count]] = field(default_factory=dict)
    """By data set and variant."""
    steps: dict[str, int] = field(default_factory=dict)
    """Steps of a run by data set, where there is a budget."""
    timing: dict[str, Any] = field(default_factory=dict)
    """What was measured to divide the budget."""
    training: dict[str, str] = field(default_factory=dict)
    """Drawn training data, by data set."""
    held_out: dict[str, float] = field(default_factory=dict)
    """Share of the training data held out, by data set."""


class Grid:
    """An opened grid; see :func:`open_grid`."""

    def __init__(
        self, config: PaperConfig, plan: GridSetup, say: Say, amplification: Measure | None = None
    ) -> None:
        self.config, self.setup, self.say = config, plan, say
        self.study: Study = config.study
        self.runner = Runner(
            config,
            steps=plan.steps,
            training=plan.training,
            held_out=plan.held_out,
            amplification=amplification,
        )

    def cells(self) -> Iterator[tuple[StudyData, Variant]]:
        """Yield each data set with each variant that fits the base."""
        for data_set in self.study.data_sets:
            for variant in self.study.variants:
                if not self.setup.counts[data_set.key][variant.key].left_out:
                    yield data_set, variant

    def trials(self, data_set: StudyData, variant: Variant) -> list[TableRun]:
        """Return the runs with the first seed, one for each learning rate."""
        return [
            TableRun(data_set=data_set, variant=variant, rate=rate, seed=0)
            for rate in variant.rates(self.config.trials)
        ]

    def chosen_rate(self, data_set: StudyData, variant: Variant) -> float | None:
        """Return the rate with the best held-out score; None while a trial is missing, or where all diverged.

        Held-out data is part of the training data, or a validation set beside a test set: the data that the
        table's scores are taken on has no say.
        """
        best: tuple[float, float] | None = None
        for run in self.trials(data_set, variant):
            record = self.runner.record(run)
            if record is None:
                return None
            score = record.held_out.get(data_set.metric)
            if score is not None and is_better(data_set.metric, score, best and best[0]):
                best = score, run.rate
        return best and best[1]

    def outermost_rates(self, variant: Variant) -> set[float]:
        """Return the smallest and the largest rate tried; none where no choice was made between them."""
        rates = variant.rates(self.config.trials)
        return {rates[0], rates[-1]} if len(rates) > 1 else set()

    def scored_runs(self, data_set: StudyData, variant: Variant) -> list[TableRun]:
        """Return the runs behind a number, one for each seed; none before the rate is chosen."""
        rate = self.chosen_rate(data_set, variant)
        if rate is None:
            return []
        return [
            TableRun(data_set=data_set, variant=variant, rate=rate, seed=seed)
            for seed in range(self.config.seeds)
        ]

    def records(self, data_set: StudyData, variant: Variant) -> list[Record]:
        """Return what is known of the runs behind a number so far."""
        found = (self.runner.record(run) for run in self.scored_runs(data_set, variant))
        return [record for record in found if record is not None and record.scores]

    def diverged_seeds(self, data_set: StudyData, variant: Variant) -> list[int]:
        """Return the seeds whose training diverged at the chosen rate: a number is without them."""
        runs = self.scored_runs(data_set, variant)
        found = ((run.seed, self.runner.record(run)) for run in runs)
        return [seed for seed, record in found if record is not None and record.failure]

    @property
    def total(self) -> int:
        """Training runs in all."""
        return len(list(self.cells())) * (self.config.trials + self.config.seeds - 1)

    @property
    def finished(self) -> int:
        """Training runs that have ended."""
        runs = {
            run.name: run
            for cell in self.cells()
            for run in (*self.trials(*cell), *self.scored_runs(*cell))
        }
        return sum(self.runner.record(run) is not None for run in runs.values())

    def run(self, after_each: Callable[[], object] = lambda: None) -> None:
        """Make every run that has not been made: all with the first seed, then the other seeds.

        Args:
            after_each: Called whenever there is something new to show.
        """
        for cell in self.cells():
            for run in self.trials(*cell):
                self._finish(run, scored=False)
            self._finish_seed(cell, 0)
            after_each()
        for seed in range(1, self.config.seeds):
            for cell in self.cells():
                self._finish_seed(cell, seed)
                after_each()

    def _finish_seed(self, cell: tuple[StudyData, Variant], seed: int) -> None:
        runs = self.scored_runs(*cell)
        if not runs:
            self.say(f"{cell[0].key}/{cell[1].key}: training diverged at every learning rate")
            return
        self._finish(runs[seed], scored=True)
        if not self.config.keep_weights:
            for run in (runs[seed], *(self.trials(*cell) if seed == 0 else ())):
                self.runner.drop_weights(run)

    def _finish(self, run: TableRun, *, scored: bool) -> None:
        record = self.runner.record(run)
        if record is None:
            self.say(f"[{self.finished + 1}/{self.total}] {run.name}")
        record = self.runner.finish(run, scored=scored)
        if record.failure:
            self.say(f"{run.name}: {record.failure}")


@contextmanager
def open_grid(
    config: PaperConfig, say: Say, amplification: Measure | None = None
) -> Iterator[Grid]:
    """Open the folder of a grid for this process alone, and settle what has to be before the first run.

    Args:
        config: What was asked for.
        say: Told what is going on, a line at a time.
        amplification: Measures an adapter, for the table of amplification.

    Raises:
        RunFolderError: Another process holds the folder, or it holds something else.
        ConfigurationError: The folder's grid was started with other settings.
        LorakitError: The base or the data cannot be read; the budget is too small.
    """
    folder = config.folder
    storage.require_free_folder(folder, overwrite=True)
    path = folder / GRID
    if folder.exists() and not path.exists():
        others = sorted(entry.name for entry in folder.iterdir() if entry.name[0] != ".")
        if set(others) - {"data", "runs", "timing"}:
            raise RunFolderError(
                f"'{folder}' is no folder of a table: it has no {GRID}, but {', '.join(others[:3])}. Choose a new or "
                "empty one as output."
            )
    with storage.lock_folder(folder):
        settings, plan = _read(path, config) if path.exists() else (_settings(config), GridSetup())
        _count(config, plan)
        for data_set in config.study.data_sets:
            _hold_out(config, data_set, plan)
        grid = Grid(config, plan, say, amplification)
        if not list(grid.cells()):
            reasons = {v: c.left_out for own in plan.counts.values() for v, c in own.items()}
            raise ConfigurationError(
                f"No method that was asked for fits {config.base.name}: "
                f"{'; '.join(f'{name}: {why}' for name, why in reasons.items())}. Name others (--methods)."
            )
        if config.seconds is not None and not plan.steps:
            plan.steps, plan.timing = divide(
                config.seconds, grid.runner, list(grid.cells()), config, say
            )
            grid = Grid(config, plan, say, amplification)
        _write(path, settings, plan)
        yield grid


def preview(config: PaperConfig, say: Say) -> Grid:
    """Return the grid as it would be, without writing anything.

    Raises:
        LorakitError: As for `open_grid`.
    """
    path = config.folder / GRID
    _, plan = _read(path, config) if path.exists() else ({}, GridSetup())
    _count(config, plan)
    for data_set in config.study.data_sets:
        _share_held_out(config, data_set, plan)
    return Grid(config, plan, say)


def _settings(config: PaperConfig) -> dict[str, Any]:
    names = (*_SHARED, *(_DIVIDED if config.budget else ()))
    settings = {name: getattr(config, name) for name in names}
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    return {"model": config.base.name, "dtype": config.dtype, "data": config.data, **settings}


def _read(path: Path, config: PaperConfig) -> tuple[dict[str, Any], GridSetup]:
    found = storage.read_record(path, RunFolderError)
    then, now = found["settings"], _settings(config)
    differences = [
        f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if differences:
        raise ConfigurationError(
            f"The runs in {path.parent} were made with other settings: {'; '.join(differences)}. Repeat the command "
            "as it was, or choose another output."
        )
    counts = {
        data_set: {variant: Count(**count) for variant, count in own.items()}
        for data_set, own in found["plan"].pop("counts").items()
    }
    return then, GridSetup(counts=counts, **found["plan"])


def _write(path: Path, settings: dict[str, Any], plan: GridSetup) -> None:
    with storage.atomic_file(path) as temporary:
        storage.write_record(temporary, {"settings": settings, "plan": asdict(plan)})


def _count(config: PaperConfig, plan: GridSetup) -> None:
    """Count the parameters of every variant that has not been counted, which shows whether it fits the base."""
    runner = Runner(config, steps={}, training={}, held_out={})
    bases: dict[tuple[str, int], Any] = {}
    for data_set in config.study.data_sets:
        counts = plan.counts.setdefault(data_set.key, {})
        missing = [v for v in config.study.variants if v.key not in counts]
        if not missing:
            continue
        task = task_type(data_set.task)
        kind = (task.kind, len(task.classes))
        if kind not in bases:
            bases[kind] = open_base(config.base, DataTask(name=task.name, labels=task.classes))
        model = bases[kind].model
        heads = classification_head(model)
        size = sum(
            p.numel() for n, p in model.named_parameters() if any(is_inside(n, h) for h in heads)
        )
        for variant in missing:
            run = TableRun(data_set=data_set, variant=variant, rate=1e-3, seed=0)
            try:
                method = runner.train_config(run).chosen_method
                found = count_parameters(model, method).by_layer
            except (TargetError, ConfigurationError) as error:
                counts[variant.key] = Count(left_out=str(error))
                continue
            own = sum(n for path, n in found.items() if not any(is_inside(path, h) for h in heads))
            counts[variant.key] = Count(trained=own, head=size)


def _share_held_out(config: PaperConfig, data_set: StudyData, plan: GridSetup) -> int | None:
    """Settle the share of training data that is held out; return the rows to draw, None for all."""
    limit = _limit(config, data_set)
    if not data_set.holds_out:
        return limit
    if limit is None:
        plan.held_out.setdefault(data_set.key, HELD_OUT_SHARE)
        return None
    held_out = min(max(limit, LEAST_HELD_OUT), MOST_HELD_OUT)
    plan.held_out.setdefault(data_set.key, round(held_out / (limit + held_out), 6))
    return limit + held_out


def _hold_out(config: PaperConfig, data_set: StudyData, plan: GridSetup) -> None:
    drawn = _share_held_out(config, data_set, plan)
    if drawn is None or data_set.key in plan.training:
        return
    path = config.folder / "data" / f"{data_set.task}-{drawn}.jsonl"
    data = DataConfig(task=data_set.task, root=config.data)
    if write_subset(data, drawn, path) < drawn and data_set.holds_out:
        plan.held_out[data_set.key] = HELD_OUT_SHARE  # there are no more: the usual share of all
    plan.training[data_set.key] = str(path)


def _limit(config: PaperConfig, data_set: StudyData) -> int | None:
    limits = [limit for limit in (config.limit, data_set.limit) if limit is not None]
    return min(limits, default=None)

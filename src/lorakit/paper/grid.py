"""The grid of a table: methods x data sets x seeds. An interrupted grid resumes and repeats no finished run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lorakit import storage
from lorakit.adapters.summary import count_parameters
from lorakit.compute.base import open_base
from lorakit.configuration import as_dict, differences, flat_settings
from lorakit.data import DataTask
from lorakit.errors import ConfigurationError, RunFolderError, TargetError
from lorakit.evaluation.score import is_better
from lorakit.models.dtype_choice import resolve_dtype
from lorakit.models.heads import classification_head
from lorakit.models.tree import is_inside
from lorakit.paper.budget import divide
from lorakit.paper.comparable import require_comparable
from lorakit.paper.log import GRID, GridSetup, ParameterCount, read_log
from lorakit.paper.paper_config import CHANGE_NO_NUMBER, PaperConfig
from lorakit.paper.record import Record
from lorakit.paper.runs import Measure, Runner, Say, TableRun, require_measure
from lorakit.paper.study import MAX_TRIALS, Study, StudyData, Variant
from lorakit.paper.subset import draw_training_data
from lorakit.tasks.registry import task_type

SUFFIXES = ("md", "json", "png", "html")
"""Of the files of a table in the output folder."""

_DIVIDED = ("tasks", "methods", "seeds")
"""Options that determine each run's share of a budget; without one, a folder may have runs of several."""


class Grid:
    """An opened grid; see :func:`open_grid`."""

    def __init__(
        self, config: PaperConfig, setup: GridSetup, amplification: Measure | None = None
    ) -> None:
        self.config, self.setup = config, setup
        self.study: Study = config.study
        self.runner = Runner(config, setup, amplification)

    def cells(self) -> Iterator[tuple[StudyData, Variant]]:
        """Yield each data set with each variant that the setup has and that fits the base."""
        for data_set in self.study.data_sets:
            counts = self.setup.counts.get(data_set.key, {})
            for variant in self.study.variants:
                if variant.key in counts and not counts[variant.key].left_out:
                    yield data_set, variant

    def trials(self, data_set: StudyData, variant: Variant) -> list[TableRun]:
        """Return the runs that try a learning rate first, one per rate, in ascending order."""
        rates = variant.rates(self.config.trials)
        if self.config.widen:
            # A rate stays tried when another seed makes one inside the best.
            rates = [
                rate
                for rate in variant.rates(MAX_TRIALS)
                if rate in rates or self.runner.record(self._trial(data_set, variant, rate))
            ]
            while (wider := variant.wider(rates, self._best(data_set, variant, rates))) != rates:
                rates = wider
        return [self._trial(data_set, variant, rate) for rate in rates]

    def _trial(self, data_set: StudyData, variant: Variant, rate: float) -> TableRun:
        epochs = self.config.trial_epochs
        return TableRun(data_set=data_set, variant=variant, rate=rate, seed=0, trial_epochs=epochs)

    def _seeds(self, data_set: StudyData, variant: Variant, rate: float) -> list[TableRun]:
        """Return the runs with a rate that can be scored, one per seed."""
        return [
            TableRun(data_set=data_set, variant=variant, rate=rate, seed=seed)
            for seed in range(self.config.seeds)
        ]

    def judged(self, trial: TableRun) -> list[Record]:
        """Return the records that judge the rate of a trial; none if the trial is missing."""
        runs = [trial]
        if self.seeds_choose:
            runs = self._seeds(trial.data_set, trial.variant, trial.rate)
        return self._records(runs) if self.runner.record(trial) else []

    @property
    def seeds_choose(self) -> bool:
        """Whether all seeds so far judge a rate, or the trial alone.

        Shorter trials cannot be averaged with the scored runs. A budget fixes the number of runs.
        """
        config = self.config
        is_fixed = config.trial_epochs is not None or config.budget is not None
        return config.trials > 1 and config.seeds > 1 and not is_fixed

    def chosen_rate(self, data_set: StudyData, variant: Variant) -> float | None:
        """Return the rate with the fewest diverged seeds, among these the one with the best mean held-out score.

        Return None if a trial is missing or all diverged.

        One seed is too little to choose a rate: the next seed of the best rate can make another one the best, which
        then gets its own seeds. The choice is final when the best rate has all of them.

        Held-out data is part of the training data, or a validation set if the table scores a test set. The data that
        the table scores never affects the choice.
        """
        rates = [run.rate for run in self.trials(data_set, variant)]
        return self._best(data_set, variant, rates)

    def _best(self, data_set: StudyData, variant: Variant, rates: list[float]) -> float | None:
        """Return the best of these rates; None if a trial is missing or all diverged."""
        best: tuple[int, float, float] | None = None
        for rate in rates:
            records = self.judged(self._trial(data_set, variant, rate))
            if not records:
                return None
            scores = held_out_scores(records, data_set)
            if not scores:
                continue
            diverged, mean = len(records) - len(scores), statistics.fmean(scores)
            if (
                best is None
                or diverged < best[0]
                or (diverged == best[0] and is_better(mean, best[1], data_set.direction))
            ):
                best = diverged, mean, rate
        return best and best[2]

    def scored_runs(self, data_set: StudyData, variant: Variant) -> list[TableRun]:
        """Return the runs of a cell, one per seed; empty until the rate is chosen."""
        rate = self.chosen_rate(data_set, variant)
        return [] if rate is None else self._seeds(data_set, variant, rate)

    def records(self, data_set: StudyData, variant: Variant) -> list[Record]:
        """Return the records of a cell that have scores."""
        return [r for r in self._records(self.scored_runs(data_set, variant)) if r.scores]

    def diverged_seeds(self, data_set: StudyData, variant: Variant) -> list[int]:
        """Return the seeds whose training diverged at the chosen rate. The cell's number excludes them."""
        return [r.seed for r in self._records(self.scored_runs(data_set, variant)) if r.failure]

    def all_records(self) -> list[Record]:
        """Return the records of all finished runs, each once."""
        return [record for _, record in self._finished_runs()]

    def _finished_runs(self) -> list[tuple[TableRun, Record]]:
        """Return all finished runs with their records, each once."""
        runs = (run for cell in self.cells() for run in self._runs(*cell))
        return [(run, record) for run in runs if (record := self.runner.record(run)) is not None]

    def _runs(self, data_set: StudyData, variant: Variant) -> Collection[TableRun]:
        """Return all runs of a cell that are known so far, each once."""
        trials, scored = self.trials(data_set, variant), self.scored_runs(data_set, variant)
        others = (run for trial in trials for run in self._seeds(data_set, variant, trial.rate))
        tried = (run for run in others if self.runner.record(run) is not None)
        return {run.name: run for run in (*trials, *tried, *scored)}.values()

    def _records(self, runs: Iterable[TableRun]) -> list[Record]:
        return [record for run in runs if (record := self.runner.record(run)) is not None]

    @property
    def total(self) -> int:
        """Number of training runs, as far as it is known."""
        return sum(self.number_of_runs(*cell) for cell in self.cells())

    def number_of_runs(self, data_set: StudyData, variant: Variant) -> int:
        """Return the number of training runs of a cell, as far as it is known: a seed can make others necessary."""
        shared = 1 if self.config.trial_epochs is None else 0
        fewest = len(self.trials(data_set, variant)) + self.config.seeds - shared
        return max(fewest, len(self._runs(data_set, variant)))

    @property
    def finished(self) -> int:
        """Number of finished training runs."""
        return len(self.all_records())

    def run(self, after_each: Callable[[], object], say: Say = print) -> None:
        """Execute every unfinished run: the trials and the first seed, then the other seeds.

        Calls `after_each` whenever a cell has a new record.

        Raises:
            LorakitError: A run cannot be trained or scored. What can be checked is checked before the first run.
        """
        last = self.config.seeds - 1
        unfinished = [cell[0] for cell in self.cells() if self._next_run(cell, last) is not None]
        finished = self._finished_runs()
        for key, data_set in {data_set.key: data_set for data_set in unfinished}.items():
            self.runner.check_scoring(data_set)
            recorded = [(run, record) for run, record in finished if record.data_set == key]
            require_comparable(self.runner, data_set, recorded)
        for seed in range(self.config.seeds):
            for cell in self.cells():
                self._finish_seed(cell, seed, say)
                after_each()

    def _finish_seed(self, cell: tuple[StudyData, Variant], seed: int, say: Say) -> None:
        """Train and score a cell's seeds up to this one. Each new score can change the choice of the rate."""
        while (run := self._next_run(cell, seed)) is not None:
            is_trained = self.runner.record(run) is not None
            if not is_trained:
                say(f"[{self.finished + 1}/{self.total}] {run.name}")
            # Train all first: only the runs of the chosen rate are scored.
            record = self.runner.finish(run, scored=is_trained)
            if record.failure:
                say(f"{run.name}: {record.failure}")
        runs = self.scored_runs(*cell)
        if not runs:
            say(f"{cell[0].key}/{cell[1].key}: training diverged at every learning rate")
        elif not self.config.keep_weights:
            # Another seed can make another rate the best, so until the last one, unscored runs keep their weights.
            is_last = seed == self.config.seeds - 1
            for run in self._runs(*cell) if is_last else runs[: seed + 1]:
                self.runner.delete_weights(run)

    def _next_run(self, cell: tuple[StudyData, Variant], seed: int) -> TableRun | None:
        """Return a run to train, else one to score, among the trials and the seeds up to `seed`; else None."""
        trials, runs = self.trials(*cell), self.scored_runs(*cell)[: seed + 1]
        for run in (*trials, *runs):
            if self.runner.record(run) is None:
                return run
        for run in runs:
            if (record := self.runner.record(run)) and record.lacks_scores:
                return run
        return None


def held_out_scores(records: Sequence[Record], data_set: StudyData) -> list[float]:
    """Return the held-out scores of the runs that did not diverge."""
    scores = [None if r.failure else r.held_out.get(data_set.metric) for r in records]
    return [score for score in scores if score is not None]


@contextmanager
def open_grid(
    config: PaperConfig, say: Say, amplification: Measure | None = None
) -> Iterator[Grid]:
    """Lock the folder of a grid for this process, and fix its setup: parameter counts, training data and steps.

    Raises:
        RunFolderError: Another process holds the folder, or it contains other files.
        ConfigurationError: The grid in the folder was started with different settings, no method fits the base, or
            amplification is missing.
        LorakitError: The base or the data cannot be read, or the budget is too small.
    """
    require_measure(config, amplification)
    folder = config.folder
    storage.require_free_folder(folder, overwrite=True)
    _require_grid_or_empty(folder, config, "output")
    _require_grid_or_empty(config.log_folder, config, "log")
    path = config.log_folder / GRID
    with ExitStack() as locks:
        # Both names can be of one folder, which cannot be locked twice.
        for locked in dict.fromkeys(p.resolve() for p in (folder, config.log_folder)):
            locks.enter_context(storage.lock_folder(locked))
        setup = _read_setup(config)
        for data_set in config.study.data_sets:
            draw_training_data(config, data_set, setup)
        _count_parameters(config, setup)
        if not setup.dtype:
            base, reason = resolve_dtype(config.base, batch_size=config.batch_size)
            setup.dtype = base.dtype
            if reason:
                say(f"{base.dtype}: {reason}")
        grid = Grid(_with_dtype(config, setup), setup, amplification)
        cells = list(grid.cells())
        if not cells:
            reasons = {v: c.left_out for by in setup.counts.values() for v, c in by.items()}
            raise ConfigurationError(
                f"No method of the table fits {config.base.name}: "
                f"{'; '.join(f'{name}: {why}' for name, why in reasons.items())}. Choose others with --methods."
            )
        if config.seconds is not None and not setup.steps:
            setup.steps, setup.timing = divide(config.seconds, grid.runner, cells, say)
        with storage.atomic_file(path) as temporary:
            record = {"settings": _settings(config), "plan": asdict(setup)}
            storage.write_record(temporary, record)
        yield grid


def _require_grid_or_empty(folder: Path, config: PaperConfig, option: str) -> None:
    """Reject a folder with other files: a typing error must not add to them."""
    if not folder.exists() or (folder / GRID).exists():
        return
    expected = {"data", "runs", "timing", *(f"{config.table}.{s}" for s in SUFFIXES)}
    others = storage.visible_names(folder)
    if set(others) - expected:
        raise RunFolderError(
            f"'{folder}' is not the folder of a table: it has no {GRID}, but {', '.join(others[:3])}. Choose a new "
            f"or empty folder with --{option}."
        )


def recorded_grid(config: PaperConfig) -> Grid:
    """Return the grid of a log with the values that it fixed, also for a part of its data sets and methods.

    Raises:
        LorakitError: As for `read_log`.
    """
    _, setup = read_log(config.log_folder)
    return Grid(_with_dtype(config, setup), setup)


def _with_dtype(config: PaperConfig, setup: GridSetup) -> PaperConfig:
    """Return the configuration with the dtype that the grid has fixed."""
    return replace(config, base=replace(config.base, dtype=setup.dtype))  # type: ignore[arg-type]


def preview(config: PaperConfig) -> Grid:
    """Return the grid that `open_grid` would open, without writing a file.

    Raises:
        LorakitError: As for `open_grid`.
    """
    setup = _read_setup(config)
    for data_set in config.study.data_sets:
        draw_training_data(config, data_set, setup, write=False)
    _count_parameters(config, setup)
    return Grid(_with_dtype(config, setup) if setup.dtype else config, setup)


def _settings(config: PaperConfig) -> dict[str, Any]:
    """Return the settings that all runs of a folder share, by dotted name."""
    skipped = (*CHANGE_NO_NUMBER, *(() if config.budget else _DIVIDED))
    settings = flat_settings(as_dict(config))
    return {name: value for name, value in settings.items() if name not in skipped}


def _read_setup(config: PaperConfig) -> GridSetup:
    """Return the setup in the folder's grid.json; an empty one if the folder has none."""
    log = config.log_folder
    if not (log / GRID).exists():
        return GridSetup()
    settings, setup = read_log(log)
    # A log of an earlier version lacks the settings that came later: they had their defaults.
    then = _settings(PaperConfig(table=config.table)) | settings
    changed = [
        f"{name} was {a!r} and is {b!r}" for name, a, b in differences(then, _settings(config))
    ]
    if changed:
        raise ConfigurationError(
            f"The runs in '{log}' have other settings: {'; '.join(changed)}. Repeat the command with the "
            "old settings, or choose another output folder with --output."
        )
    return setup


def _count_parameters(config: PaperConfig, setup: GridSetup) -> None:
    """Count the parameters of every new variant, and record why a variant does not fit the base."""
    runner = Runner(config, setup)
    bases: dict[tuple[str, int], Any] = {}
    for data_set in config.study.data_sets:
        counts = setup.counts.setdefault(data_set.key, {})
        missing = [v for v in config.study.variants if v.key not in counts]
        if not missing:
            continue
        task = task_type(data_set.task)
        head_type = (task.kind, len(task.classes))
        if head_type not in bases:
            bases[head_type] = open_base(config.base, DataTask(name=task.name, labels=task.classes))
        model = bases[head_type].model
        heads = classification_head(model)
        head_size = sum(p.numel() for n, p in model.named_parameters() if is_inside(n, *heads))
        for variant in missing:
            run = TableRun(data_set=data_set, variant=variant, rate=1e-3, seed=0)
            method = runner.train_config(run).chosen_method
            try:
                by_layer = count_parameters(model, method).by_layer
            except (TargetError, ConfigurationError) as error:
                counts[variant.key] = ParameterCount(left_out=str(error))
                continue
            trained = sum(n for path, n in by_layer.items() if not is_inside(path, *heads))
            counts[variant.key] = ParameterCount(trained=trained, head=head_size)

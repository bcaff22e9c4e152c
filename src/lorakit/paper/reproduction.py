"""Repeat runs of a log, and compare their scores with the recorded ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lorakit import storage
from lorakit.errors import ConfigurationError
from lorakit.metrics import WITHOUT_JAVA
from lorakit.paper.comparable import digests_of, other_settings
from lorakit.paper.grid import recorded_grid
from lorakit.paper.log import GRID, recorded_config
from lorakit.paper.paper_config import PaperConfig
from lorakit.paper.record import Record, column_of
from lorakit.paper.runs import Measure, Runner, Say, TableRun, require_measure
from lorakit.paper.subset import draw_training_data

Verdict = Literal["equal", "within the spread", "outside the spread", "differs"]

ROUNDING = 1e-6
"""Largest difference of equal scores, relative to the score: the order of sums in a scorer may vary."""

_UNKNOWN = "not recorded"


@dataclass(frozen=True, kw_only=True, slots=True)
class RepeatedScore:
    """A score of a repeated run beside the recorded one."""

    run: str
    score: str
    recorded: float
    repeated: float
    spread: float | None
    """Bound that two runs with different seeds exceed in 5 of 100 cases; None with one recorded seed."""

    @property
    def verdict(self) -> Verdict:
        """How the repeated score compares with the recorded one."""
        difference = abs(self.repeated - self.recorded)
        if difference <= ROUNDING * max(abs(self.recorded), ROUNDING):
            return "equal"
        if math.isnan(difference):
            return "outside the spread"
        if self.spread is None:
            return "differs"
        return "within the spread" if difference <= self.spread else "outside the spread"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reproduction:
    """The scores of repeated runs, and whether they must be equal to the recorded ones."""

    scores: tuple[RepeatedScore, ...]
    differences: tuple[str, ...]
    """What differs between the recorded and the repeated runs, such as the processor. Without any, all scores must
    be equal."""

    @property
    def holds(self) -> bool:
        """Whether no score contradicts the log: all are equal, or within the spread where something differs."""
        allowed = ("equal", "within the spread", "differs") if self.differences else ("equal",)
        return all(score.verdict in allowed for score in self.scores)


def reproduce(
    config: PaperConfig, say: Say, *, amplification: Measure | None = None
) -> Reproduction:
    """Train and score the runs of a row of a log again, with the recorded settings, in the output folder.

    Raises:
        ConfigurationError: There is no log, or it has no such row. The output folder holds a repetition of the run
            that was made under other conditions than the present ones.
        LorakitError: As for `lorakit.paper.run_table.run_table`.
    """
    require_measure(config, amplification)
    recorded = recorded_grid(_recorded(config))
    cells = list(recorded.cells())  # one, or none
    records = {record.seed: record for cell in cells for record in recorded.records(*cell)}
    _, _, seed = _row(config)
    wanted = list(records) if seed is None else [seed]
    if not records or not records.keys() >= set(wanted):
        raise ConfigurationError(
            f"The log '{config.log}' has no scored run {config.reproduce}. Its rows and their seeds: "
            f"{'; '.join(_scored_rows(config)) or 'none'}."
        )
    ((data_set, variant),) = cells
    own = replace(recorded.config, log=None)
    scores: list[RepeatedScore] = []
    differences: dict[str, None] = {}
    with storage.lock_folder(own.folder):
        draw_training_data(own, data_set, recorded.setup)
        runner = Runner(own, recorded.setup, amplification)
        runner.check_scoring(data_set)
        for run in recorded.scored_runs(data_set, variant):
            if run.seed in wanted:
                say(run.name)
                _require_made_here(runner, run)
                repeated = runner.finish(run, scored=True)
                record = records[run.seed]
                settings = other_settings(record.settings, runner.train_config(run))
                differences |= dict.fromkeys(_differences(record, repeated, settings))
                scores += _compared(run, record, repeated, records.values())
    return Reproduction(scores=tuple(scores), differences=tuple(differences))


def _recorded(config: PaperConfig) -> PaperConfig:
    """Return the configuration of the log, narrowed to the row to repeat, with this call's folders and device."""
    if config.log is None:
        raise ConfigurationError(
            f"reproduce needs the log of a table: a folder with {GRID}. Name it with --log."
        )
    recorded = recorded_config(config.log_folder)
    if recorded.table != config.table:
        raise ConfigurationError(
            f"The log '{config.log}' is of {recorded.table}, not of {config.table}. Name its table."
        )
    task, method, _ = _row(config)
    row = replace(
        recorded,
        # The log must not decide that code of a model repository runs here.
        base=replace(
            recorded.base,
            device=config.base.device,
            trust_remote_code=config.base.trust_remote_code,
        ),
        data=config.data,
        output=config.output or f"{recorded.folder}-reproduced",
        tasks=(task,),
        methods=(method,),
    )
    if (row.folder / GRID).exists():
        raise ConfigurationError(
            f"'{row.folder}' is the folder of a table, whose runs would not be repeated. Choose another one with "
            "--output."
        )
    return row


def _scored_rows(config: PaperConfig) -> Iterator[str]:
    """Yield each row of the log that has scored runs, with their seeds."""
    grid = recorded_grid(recorded_config(config.log_folder))
    for data_set, variant in grid.cells():
        if records := grid.records(data_set, variant):
            yield f"{data_set.key}/{variant.key} {', '.join(str(r.seed) for r in records)}"


def _require_made_here(runner: Runner, run: TableRun) -> None:
    """Reject a finished repetition that was made with other software, data or hardware: it says nothing about these."""
    held = runner.record(run)
    if held is None:
        return
    config = runner.train_config(run)
    inputs = digests_of(config)  # first: opening the base can lower the number of threads
    now = replace(held, inputs=inputs, **runner.conditions())
    if changed := list(_differences(held, now, other_settings(held.settings, config))):
        raise ConfigurationError(
            f"'{runner.config.folder}' holds a repetition of {run.name} that was made under other conditions: "
            f"{'; '.join(changed)}. Choose another folder with --output."
        )


def _row(config: PaperConfig) -> tuple[str, str, int | None]:
    """Return the data set, the method and the seed of the row to repeat; None for all seeds."""
    task, method, *seed = (config.reproduce or "").split("/")
    return task, method, int(seed[0]) if seed else None


def _differences(
    record: Record, repeated: Record, settings: Iterable[tuple[str, Any, Any]]
) -> Iterator[str]:
    """Yield what differs between two runs other than their scores; `settings` are the settings that do."""
    for name, then, now in (
        ("processor", record.processor, repeated.processor),
        ("device", record.device, repeated.device),
        ("source files of lorakit", record.source[:12], repeated.source[:12]),
    ):
        if then != now or not then:
            yield f"{name}: {then or _UNKNOWN}, here {now or _UNKNOWN}"
    # With several numbers of threads, a repeated run can change from one to the other at another step.
    if record.threads != repeated.threads or len(record.threads) != 1:
        then, now = (", ".join(map(str, r.threads)) or _UNKNOWN for r in (record, repeated))
        yield f"threads: {then}, here {now}"
    for name in ("torch", "transformers", "lorakit"):
        if (then := record.versions.get(name)) != (now := repeated.versions.get(name)):
            yield f"{name}: {then}, here {now}"
    if java := _needing_java(record, repeated):
        words = ["not used", "used"]
        if any(WITHOUT_JAVA in name for name in repeated.scores):
            words.reverse()
        yield f"Java: {words[0]}, here {words[1]}; not compared: {', '.join(sorted(java))}"
    for name, then, now in settings:
        yield f"{name}: {then}, here {now}"
    for name, digest in record.inputs.items():
        if repeated.inputs.get(name) != digest:
            yield f"{name}: other content than recorded"
    if record.scored and record.scored != repeated.scored:
        yield "scored data: other content than recorded"


def _needing_java(record: Record, repeated: Record) -> set[str]:
    """Return the scores that one of two runs computed with Java and the other without, by the name of the column."""
    without = [
        {column_of(name) for name in r.scores if WITHOUT_JAVA in name} for r in (record, repeated)
    ]
    return without[0] ^ without[1]


def _compared(
    run: TableRun, record: Record, repeated: Record, every: Iterable[Record]
) -> Iterator[RepeatedScore]:
    """Yield the scores of a run, recorded and repeated, without those that only one of them computed with Java."""
    every = list(every)
    java = _needing_java(record, repeated)
    for name, value in record.scores.items():
        column = column_of(name)
        if column in java:
            continue
        score = repeated.score(column)
        values = [r.scores[name] for r in every if name in r.scores]
        yield RepeatedScore(
            run=run.name,
            score=name,
            recorded=value,
            repeated=math.nan if score is None else score,
            spread=spread_of(values),
        )


def spread_of(values: Sequence[float]) -> float | None:
    """Return the bound of `RepeatedScore.spread` for the recorded scores of all seeds.

    The difference of two runs has sqrt(2) times the standard deviation of one. With few seeds this deviation is
    uncertain, and Student's t widens the bound accordingly.
    """
    if len(values) < 2:
        return None
    from scipy.stats import t

    quantile = float(t.ppf(0.975, len(values) - 1))
    return quantile * math.sqrt(2) * statistics.stdev(values)

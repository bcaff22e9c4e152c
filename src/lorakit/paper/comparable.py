"""Check that the runs of a grid differ in nothing but their seed, learning rate and method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorakit.configuration import as_dict, differences, flat_settings
from lorakit.errors import ConfigurationError
from lorakit.paper.record import Record, changed_settings
from lorakit.paper.runs import Runner, TableRun
from lorakit.paper.study import StudyData
from lorakit.tasks.registry import task_type
from lorakit.training.config import TrainConfig
from lorakit.training.opening import NOT_COMPARED, ROUNDING
from lorakit.training.setup import prepare

_MAY_DIFFER = {*NOT_COMPARED} - {*ROUNDING}
"""Settings that may differ between the runs of a grid: not one that a resumed run may change although it rounds."""


def require_comparable(
    runner: Runner, data_set: StudyData, recorded: Sequence[tuple[TableRun, Record]]
) -> None:
    """Reject settings, data or a base that differ from those of the recorded runs on a data set.

    Raises:
        ConfigurationError: They differ: one table must not mix the new run with the recorded ones.
    """
    # A diverged run has no inputs.
    known = [(run, record) for run, record in recorded if record.inputs]
    if not known:
        return
    here = _machine_of(replace(known[0][1], **runner.conditions()))
    known.sort(key=lambda pair: _machine_of(pair[1]) != here)
    inputs = digests_of(runner.train_config(known[0][0]))
    has_head = task_type(data_set.task).kind != "text"
    for run, record in known:
        digests = dict(record.inputs)
        # Compare the base once. Its digest contains a new head, which differs by seed, and between processors.
        if run is not known[0][0] or (has_head and _machine_of(record) != here):
            digests.pop("base model", None)
        changed = [
            f"{name} was {then!r} and is {now!r}"
            for name, then, now in other_settings(record.settings, runner.train_config(run))
            if not {name, name.split(".")[0]}.intersection(_MAY_DIFFER)
        ]
        changed += [
            f"{name} has other content"
            for name, digest in digests.items()
            if digest != inputs.get(name)
        ]
        if changed:
            raise ConfigurationError(
                f"The recorded run {run.name} is not comparable with a new one: {'; '.join(changed)}. Use the data "
                "(--data.root), the base (--base.name) and the version of lorakit of the recorded runs, or choose "
                "another folder with --output and --log."
            )


def digests_of(config: TrainConfig) -> dict[str, str]:
    """Return the digests of the data and the base that a run would train on now, by name."""
    return {name: source["sha256"] for name, source in prepare(config).inputs.items()}


def _machine_of(record: Record) -> tuple[str, str, str | None]:
    """Return the processor, the device and the torch with which a run was trained."""
    return record.processor, record.device, record.versions.get("torch")


def other_settings(recorded: Mapping[str, Any], config: TrainConfig) -> list[tuple[str, Any, Any]]:
    """Return name, recorded value and present value of each setting that differs; None stands for a default."""
    # A setting that has become the default, with the same value, is equal.
    present = {
        name: value for name, value in flat_settings(as_dict(config)).items() if name in recorded
    }
    return differences(recorded, {**changed_settings(config), **present})

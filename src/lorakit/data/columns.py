"""From the columns of the data to the fields that a task reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lorakit.data.data_config import FIELDS, DataConfig
from lorakit.data.templates import Template
from lorakit.errors import DataError, nearest
from lorakit.tasks import GENERIC, Task, task_type


class ColumnMap:
    """Applies `columns`, `prompt_template` and `completion_template` to rows.

    Raises:
        DataError: the configuration names a column that the data does not have.
    """

    def __init__(self, config: DataConfig, columns: Sequence[str], where: str) -> None:
        self.where = where
        self.columns = list(columns)
        self.renamed = config.columns
        for ours, theirs in self.renamed.items():
            if theirs not in self.columns:
                raise DataError(
                    f"{where} has no column {theirs!r}, which columns maps {ours!r} to; its columns are "
                    f"{', '.join(self.columns)}." + nearest(theirs, self.columns)
                )
        texts = {"prompt": config.prompt_template, "completion": config.completion_template}
        self.templates = {
            field: Template(text, name=f"{field}_template")
            for field, text in texts.items()
            if text is not None
        }
        task = config.task_type
        derived = () if task is None else task.derived
        for template in self.templates.values():
            template.check([*self.columns, *self.renamed, *derived], where)
        present = {*self.columns, *self.renamed, *self.templates}
        names = FIELDS
        if task is not None and task not in GENERIC.values():  # it may read all that there is
            names = (*self.renamed, *self.columns)
        self.fields = [name for name in dict.fromkeys(names) if name in present]
        """The fields that these rows can have."""

    def column_of(self, field: str) -> str:
        """Return what the data calls a field."""
        return self.renamed.get(field, field)

    def apply(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of one row, templates filled in; a field that the row lacks is left out.

        Raises:
            BadRow: a template cannot be filled in.
        """
        found = self._named(values)
        return {**found, **self._filled(lambda field: values.get(self.column_of(field)))}

    def examples(self, values: Mapping[str, Any], task: Task) -> Iterator[dict[str, Any]]:
        """Yield the fields of each example that one row holds for `task`, templates filled in.

        Raises:
            BadRow: the row lacks what the task reads, or a template cannot be filled in.
        """
        for fields in task.rows(self._named(values)):
            raw = {**values, **fields}
            filled = self._filled(lambda field, raw=raw: raw.get(self.column_of(field)))
            yield {**fields, **filled}

    def _named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        found = {field: values.get(self.column_of(field)) for field in self.fields}
        return {field: value for field, value in found.items() if value is not None}

    def _filled(self, value_of: Callable[[str], Any]) -> dict[str, Any]:
        return {field: template.render(value_of) for field, template in self.templates.items()}

    def task(self, name: str, rows: Sequence[Mapping[str, Any]]) -> type[Task]:
        """Return the task called `name`; for "auto", the one that can read these fields.

        Raises:
            DataError: none, or more than one, can.
        """
        if name == "auto" and self.templates:
            name = "completion"
        candidates = [task_type(name)] if name != "auto" else list(GENERIC.values())
        if name == "auto":
            fitting = [task for task in candidates if task.reads(self.fields, rows)]
            if len(fitting) == 1:
                return fitting[0]
            if fitting:
                raise DataError(
                    f"{self.where}: its columns ({', '.join(self.columns)}) fit several tasks; "
                    f"set task to one of {', '.join(task.name for task in fitting)}"
                )
        elif any(set(layout) <= set(self.fields) for layout in candidates[0].layouts):
            return candidates[0]
        expected = "".join(
            f"\n  {task.name + ':':<16}" + " | ".join(" + ".join(layout) for layout in task.layouts)
            for task in candidates
        )
        of_task = "any task" if name == "auto" else f"task {name}"
        advice = (
            "for example {prompt: question, completion: answer}, or make prompt and completion "
        )
        advice += "with prompt_template and completion_template"
        if candidates[0] not in GENERIC.values():
            advice = f"for example {{{candidates[0].layouts[0][0]}: {self.columns[0]}}}"
        raise DataError(
            f"{self.where}: its columns are {', '.join(self.columns)}; expected those of {of_task}:{expected}\n"
            f"Give yours these names with `columns`, {advice}"
        )

"""Map the columns of the data to the fields of a task."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lorakit.data.data_config import FIELDS, OPTIONAL_FIELDS, DataConfig
from lorakit.data.templates import Template
from lorakit.errors import DataError, nearest
from lorakit.formatting import listed
from lorakit.tasks import (
    GENERIC,
    BadRow,
    Chat,
    Completion,
    Labelled,
    NamedText,
    Task,
    conversion,
    task_type,
)
from lorakit.tasks.classification import PAIR


class ColumnMap:
    """Mapping from rows to fields by `columns`, `prompt_template` and `completion_template`.

    Raises:
        DataError: The configuration names a column that the data does not have.
    """

    def __init__(self, config: DataConfig, columns: Sequence[str], source_name: str) -> None:
        self.source_name = source_name
        self.columns = list(columns)
        self.renamed = dict(config.columns)
        if "messages" not in (*self.columns, *self.renamed) and "conversations" in self.columns:
            self.renamed["messages"] = "conversations"  # the name in ShareGPT's files
        for name, column in self.renamed.items():
            if column not in self.columns:
                self._check_separator()
                raise DataError(
                    f"{source_name} has no column {column!r}, which data.columns maps to {name!r}. Its columns are "
                    f"{listed(self.columns)}." + nearest(column, self.columns)
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
            template.check([*self.columns, *self.renamed, *derived], source_name)
        unnamed = [name for name in self.columns if name not in self.renamed.values()]
        self.present = {*unnamed, *self.renamed, *self.templates}
        """Fields and columns by which "auto" chooses the task; a column that has become a field counts as that."""
        self.chosen = {*config.columns, *self.templates}
        """Fields that the configuration names."""
        self.present -= conversion.lone_columns(self.present) - self.chosen
        # Of a text and a pair of texts, a task reads those that `columns` names.
        named, pair = set(config.columns), set(PAIR)
        other = {"text"} if named & pair else set()
        if "text" in named or not pair <= self.present:
            other = pair
        self.fields = [
            name for name in FIELDS if name in self.present and name not in other - named
        ]
        """Fields that the rows can have."""
        if task is not None and task not in GENERIC.values():  # a named task may read any column
            self.fields = list(dict.fromkeys((*self.renamed, *self.columns)))
        self._read_by = {generic: self.fields_of(generic) for generic in GENERIC.values()}

    def column_of(self, field: str) -> str:
        """Return the column that holds a field."""
        return self.renamed.get(field, field)

    def apply(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of one row with rendered templates, to infer the task and its labels.

        Missing fields are omitted. `examples` prepares a row for encoding.

        Raises:
            BadRow: A template cannot be rendered.
        """
        return {**self._rename(values), **self._render(values)}

    def examples(self, values: Mapping[str, Any], task: Task) -> Iterator[dict[str, Any]]:
        """Yield the fields of each example of `task` in one row, with rendered templates.

        Raises:
            BadRow: The row lacks a field of the task, or a template cannot be rendered.
        """
        # A task converts no other fields to those that a template renders.
        to_render = dict.fromkeys(self.templates, "")
        own = self._rename(values)
        if (read := self._read_by.get(type(task))) is not None:
            own = {name: own.get(name) for name in read}
        for fields in task.rows({**to_render, **own}):
            texts = self._render({**values, **fields})
            if isinstance(task, NamedText) and "prompt" in texts and "completion" not in texts:
                texts["completion"] = task.after(texts["prompt"], fields["completion"])
            yield {**fields, **texts}

    def _rename(self, values: Mapping[str, Any]) -> dict[str, Any]:
        fields = {field: values.get(self.column_of(field)) for field in self.fields}
        return {field: value for field, value in fields.items() if value is not None}

    def _render(self, values: Mapping[str, Any]) -> dict[str, str]:
        return {
            field: template.render(lambda name: values[self.column_of(name)])
            for field, template in self.templates.items()
        }

    def task(self, name: str, rows: Iterable[Mapping[str, Any]]) -> type[Task]:
        """Return the task called `name`; for "auto", the generic task whose columns these are.

        Raises:
            DataError: The columns fit no task, or several; or the labels fit several.
        """
        if name == "auto" and self.templates:
            name = "completion"
        if name == "auto":
            candidates, rows = list(GENERIC.values()), list(rows)
            try:
                fitting = [task for task in candidates if task.reads(self.present, rows)]
            except BadRow as error:
                column = self.column_of("label")
                raise DataError(f"{self.source_name}: '{column}' {error.what}.") from None
            if len(fitting) == 1:
                self._check_one_input(fitting[0])
                return fitting[0]
            if fitting:
                raise DataError(
                    f"{self.source_name}: its columns ({listed(self.columns)}) fit several tasks; "
                    f"set data.task to one of {', '.join(task.name for task in fitting)}"
                )
        else:
            candidates = [task_type(name)]
            if any(set(layout) <= set(self.fields) for layout in candidates[0].layouts):
                self._check_one_input(candidates[0])
                return candidates[0]
        raise self._misfit(name, candidates)

    def unread(self, task: type[Task]) -> list[str]:
        """Return the columns that no field of a generic task and no template reads. Named tasks may read any."""
        if task not in GENERIC.values():
            return []
        fields = {name for template in self.templates.values() for name in template.fields}
        fields |= self.fields_of(task) - self.templates.keys()
        read = set(map(self.column_of, fields))
        return [column for column in self.columns if column not in read]

    def fields_of(self, task: type[Task]) -> set[str]:
        """Return the fields that `task` reads. Of several layouts in the data it reads one, the same in all rows.

        That is the one of which the configuration names most fields, or else the first.
        """
        layouts = [own for own in task.layouts if set(own) <= set(self.fields)]
        if task not in GENERIC.values() or not layouts:  # rows to predict need no target
            return set(self.fields)
        layout = max(layouts, key=lambda own: len(self.chosen.intersection(own)))
        fields = set(layout)
        if task is Completion:
            fields.update(self.chosen.intersection(conversion.PROMPT_COMPLETION))
        if task is Chat:
            fields.update(("system", "tools"))
        if layout == conversion.ALPACA:
            fields.update(OPTIONAL_FIELDS)
        return fields.intersection(self.fields)

    def has_inputs(self, task: type[Labelled]) -> bool:
        """Return whether the rows have the texts of `task`."""
        return any(set(layout) <= set(self.fields) for layout in _inputs(task))

    def check_inputs(self, task: type[Labelled]) -> None:
        """Check that rows without labels have the texts of `task`.

        Raises:
            DataError: A column is missing.
        """
        if not self.has_inputs(task):
            self._check_separator()
            texts = _inputs(task)
            expected = " or ".join(dict.fromkeys(" and ".join(layout) for layout in texts))
            raise DataError(
                f"{self.source_name}: its columns are {listed(self.columns)}; task {task.name} predicts from "
                f"{expected}. {self._renaming(self._nearest((task, layout) for layout in texts))}"
            )
        self._check_one_input(task)

    def _check_one_input(self, task: type[Task]) -> None:
        """Reject a text beside a pair of texts, since a task reads one of them."""
        is_generic = task in GENERIC.values() and issubclass(task, Labelled)
        if is_generic and {"text", *PAIR} <= set(self.fields):
            raise DataError(
                f"{self.source_name} has a text and the pair sentence1 and sentence2, and task {task.name} reads one "
                f"of them. Name it: --data.columns.text {self.column_of('text')}, or --data.columns.sentence1 "
                f"{self.column_of('sentence1')} --data.columns.sentence2 {self.column_of('sentence2')}."
            )

    def _check_separator(self) -> None:
        """Reject a CSV file whose only column is a line of names: its fields are separated by another character."""
        if len(self.columns) != 1 or not re.search(r"\.[ct]sv(\.gz)?$", self.source_name):
            return
        found = next((sign for sign in ";\t,|" if sign in self.columns[0]), None)
        if found is not None:
            raise DataError(
                f"{self.source_name}: its only column is {self.columns[0]!r:.200}. The fields seem to be separated by "
                f"{found!r}, but lorakit splits .csv files at commas and .tsv files at tabs. Save it with commas as "
                ".csv, or with tabs as .tsv."
            )

    def _nearest(
        self, layouts: Iterable[tuple[type[Task], Sequence[str]]]
    ) -> dict[type[Task], list[str]]:
        """Return the missing fields of the layouts with the most fields in the data, at most one layout of each task.

        Layouts with more fields than the data has columns are left out.
        """
        options: dict[int, dict[type[Task], list[str]]] = {}
        for task, layout in layouts:
            missing = [name for name in layout if name not in self.fields]
            if len(layout) <= len(self.present):
                options.setdefault(len(layout) - len(missing), {}).setdefault(task, missing)
        return options[max(options)] if options else {}

    def _renaming(self, missing: Mapping[type[Task], Sequence[str]]) -> str:
        """Return the sentence that says how to name the columns of the missing fields of each task."""
        if not missing:
            return "The rows have too few columns."
        flags = {
            task.name: " ".join(f"--data.columns.{name} COLUMN" for name in names)
            for task, names in missing.items()
        }
        if len(flags) > 1:
            choices = [f"for {task} with {names}" for task, names in flags.items()]
            return f"Name their columns, {'; '.join(choices)}."
        (names,) = missing.values()
        mapping = ", ".join(f"{name}: COLUMN" for name in names)
        return f"Name their columns with {' '.join(flags.values())}, in YAML with data.columns: {{{mapping}}}."

    def _misfit(self, name: str, candidates: Sequence[type[Task]]) -> DataError:
        """Return the error that the columns fit none of the candidates."""
        self._check_separator()
        expected = [
            f"  {task.name + ':':<16}"
            + " | ".join(" + ".join(layout) for layout in task.layouts)
            + task.condition
            for task in candidates
        ]
        task_name = "any task" if name == "auto" else f"task {name}"
        return DataError(
            f"{self.source_name}: its columns are {listed(self.columns)}; expected those of {task_name}:",
            *expected,
            self._advice(name, candidates),
        )

    def _advice(self, name: str, candidates: Sequence[type[Task]]) -> str:
        """Return which task to set or which columns to name for rows that fit none of the candidates."""
        other = next((task.name for task in GENERIC.values() if task.reads(self.present, [])), None)
        if other is not None and candidates[0] in GENERIC.values():
            return f"They fit task {other}: set data.task (--data.task {other}), or use data of task {name}."
        columns = [""] * len(self.present)
        missing = self._nearest(
            (task, layout)
            for task in candidates
            for layout in task.layouts
            # "auto" must choose the task by its fields and the columns that remain.
            if name != "auto" or task.reads({*layout, *columns[len(layout) :]}, [])
        )
        advice = self._renaming(missing)
        if Completion in (missing or candidates):
            advice += " Or build prompt and completion with data.prompt_template and data.completion_template."
        return advice


def _inputs(task: type[Labelled]) -> list[tuple[str, ...]]:
    """Return the layouts of a task without its targets."""
    return [tuple(name for name in layout if name not in task.targets) for layout in task.layouts]

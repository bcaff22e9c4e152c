"""`lorakit init`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorakit import storage
from lorakit.cli.next_commands import commands_for
from lorakit.cli.parsing import parse
from lorakit.configuration import LocalPath, changed
from lorakit.data.columns import ColumnMap
from lorakit.data.data_config import DataConfig
from lorakit.data.examples import DataTask, RowReader, task_of
from lorakit.errors import ConfigurationError, DataError
from lorakit.file_names import ADAPTER
from lorakit.formatting import shell_command, visible
from lorakit.models.base_config import BaseConfig
from lorakit.tasks import Completion, generic_task

USUAL_COLUMNS = {
    "prompt": ("instruction", "question", "query", "input", "source", "context", "user"),
    "completion": ("response", "answer", "output", "target", "summary", "reply", "assistant"),
    "text": ("sentence", "review", "content", "comment", "tweet", "message", "title"),
    "label": ("labels", "class", "category", "sentiment", "intent", "topic"),
    "score": ("rating", "similarity", "stars"),
    "sentence1": ("premise", "question1", "text1"),
    "sentence2": ("hypothesis", "question2", "text2"),
}
"""Columns that often hold a field, for data without columns of the field's name."""

LAYOUTS = (
    ("messages",),
    ("prompt", "completion"),
    ("sentence1", "sentence2", "label"),
    ("sentence1", "sentence2", "score"),
    ("text", "label"),
    ("text", "score"),
)
"""Fields of the generic tasks, in the order in which they are tried."""


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Options of `lorakit init`."""

    data: DataConfig = field(default_factory=lambda: DataConfig(too_long="truncate"))
    """The training data, whose columns determine the task."""
    file: LocalPath = "run.yaml"
    """The file to write."""
    base: BaseConfig | None = None
    """The base model. Default: smollm2-135m for text, minilm-l6 for labels and scores."""
    overwrite: bool = False
    """Replace an existing file."""

    def __post_init__(self) -> None:
        if not self.data.has("train"):
            raise ConfigurationError("data.train is not set. Name your data: lorakit init DATA.")


CONFIGS = (InitConfig,)


def run(argv: Sequence[str]) -> None:
    """Write the file and print the commands that read it."""
    config = parse(
        InitConfig,
        "init",
        "Write a YAML file for your data that every command reads: base, data, output and the main settings, each with "
        "a comment. The columns of the data determine the task: chat messages, prompts with completions, or texts with "
        "labels or scores.",
        argv,
        "data.train",
    )
    storage.require_free_file(config.file, overwrite=config.overwrite, option="--file")
    rows = RowReader().read(config.data, "train")
    data, task = _task(config.data, rows.columns, rows.name)
    unread = ColumnMap(data, rows.columns, rows.name).unread(task.type)
    facts = f"{len(rows.rows):,} rows, columns {', '.join(rows.columns)}"
    text = _file(data, task, config, facts, unread)
    with storage.atomic_file(config.file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"Settings for {visible(rows.name)} (task {task.name}) in {visible(config.file)}.")
    if unread:
        print(visible(f"Columns that no field reads: {', '.join(unread)}."))
    print("Edit the file, then:")
    for command in _commands(config, task):
        print(f"  {visible(command)}")


def _task(data: DataConfig, columns: list[str], name: str) -> tuple[DataConfig, DataTask]:
    """Return the task of the data, with a mapping of columns if those of the data have other names than its fields."""
    try:
        return data, task_of(data)
    except DataError:
        if data.columns or data.task != "auto":  # the user's choice
            raise
    for layout in LAYOUTS:
        found = {field: column for field in layout if (column := _column(field, columns))}
        if len(found) == len(layout):
            renamed = replace(data, columns=found)
            return renamed, task_of(renamed)
    raise DataError(
        f"{name} has the columns {', '.join(columns)}, which name no prompts, messages or labels. Say which columns to "
        "read, for example --data.columns.prompt COLUMN --data.columns.completion COLUMN."
    )


def _column(field: str, columns: list[str]) -> str | None:
    """Return the column of a field: of the same name, or a usual one."""
    names = (field, *USUAL_COLUMNS.get(field, ()))
    return next((c for name in names for c in columns if c.lower() == name), None)


def _commands(config: InitConfig, task: DataTask) -> list[str]:
    file = shell_command(["--config", config.file])
    first = [f"lorakit {command} {file}" for command in ("data", "plan", "train", "evaluate")]
    return first + commands_for(generic_task(task.type).name, file, _output(config.data))


def _output(data: DataConfig) -> str:
    """Return the run's folder, which has the name of the training data."""
    train = data.source("train")
    first = train if isinstance(train, str) else (train or ["run"])[0]
    name = re.sub(r"[*?\[\]]", "", Path(first).name.split(".")[0])  # a glob
    # Of owner/name:config; Windows allows no colon in a name.
    name = name.replace(":", "-").strip("-_")
    return f"out/{name or 'run'}"


def _file(
    data: DataConfig, task: DataTask, config: InitConfig, facts: str, unread: Sequence[str]
) -> str:
    """Return the text of the file; `facts` describes the data, and no field reads the columns `unread`.

    Comments have names of files, columns and labels, whose line breaks must not start a line of settings.
    """
    train, output = data.source("train"), _output(data)
    base = {"name": "smollm2-135m" if task.generates else "minilm-l6"}
    base |= {} if config.base is None else changed(config.base)
    held_out = {} if data.has("validation") else {"validation_fraction": 0.1}
    settings: dict[str, object] = {"train": train, "task": task.name, **held_out}
    settings |= {"max_length": data.max_length, **changed(data)}
    notes = [f"labels: {', '.join(task.labels)}"] if task.labels else []
    if unread:
        notes.append(f"columns that no field reads: {', '.join(unread)}")
        if issubclass(task.type, Completion):
            notes.append(
                "a prompt of several columns: prompt_template: '{column}\\n{other_column}'"
            )
    comments = "".join(f"  # {visible(note)}\n" for note in notes)
    commands = "\n".join(f"#   {visible(command)}" for command in _commands(config, task))
    return f"""# {task.name}: {visible(facts)}
{commands}
# Every command reads this file and skips the settings of the others.
# 'lorakit train --help all' describes every setting.

base:  # name: a hub id, a local folder, a .gguf file or a short name
{_lines(base)}
  # dtype: bfloat16  # auto, float32, bfloat16, nf4 or int8

data:  # validation_fraction holds out part of the training data; or set validation to a file
{_lines(settings)}
{comments}  # test: test.jsonl  # for lorakit evaluate

output: {_yaml(output)}  # the run's folder; a second run needs another name, --overwrite or --resume
adapter: {_yaml(f"{output}/{ADAPTER}")}  # read by generate, evaluate and merge

method: lora
lora:
  rank: 8
  alpha: 16  # the update is scaled by alpha / rank
  # The quality of full fine-tuning needs all-linear. attention.qv, the default as in the paper, is smaller.
  targets: [all-linear]  # or attention.qv, mlp, names of modules
  # dropout: 0.05

epochs: 3
batch_size: 16  # examples per step
# accumulation: 2  # batches per step, where memory is short
optimizer:
  learning_rate: 5e-4
  # schedule: cosine
# evaluation:
#   patience: 3  # stop after 3 evaluations without a better one
"""


def _lines(settings: Mapping[str, object]) -> str:
    return "\n".join(f"  {name}: {_yaml(value)}" for name, value in settings.items())


def _yaml(value: object) -> str:
    """Return a value as YAML on one line."""
    text = storage.dump_yaml(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")

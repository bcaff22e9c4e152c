"""Tasks from a file and from an installed package."""

from __future__ import annotations

import errno
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from tiny_tokenizer import tiny_encoder_tokenizer

from lorakit.data import DataConfig, DataTask, load_examples, task_of
from lorakit.errors import ConfigurationError
from lorakit.tasks import TASKS, Classification, NamedText, generic_task, registry, task_type

FILE = '''
from lorakit.tasks import Classification, DataSet

class Weather(Classification):
    """Whether a text reports rain."""

    name = "weather"
    texts = ("said",)
    layouts = (("said", "label"),)
    classes = ("dry", "wet")
    data_set = DataSet(folder="weather")

class Nameless(Classification):
    pass

class Taken(Classification):
    name = "mrpc"

class Half(Weather.__mro__[2].__mro__[1]):
    name = "half"

number = 3
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_tasks.py"
    path.write_text(FILE)
    return path


def test_a_class_in_a_file_is_a_task(file: Path, tmp_path: Path) -> None:
    (tmp_path / "weather").mkdir()
    (tmp_path / "weather" / "train.csv").write_text("said,label\nrain,wet\nsun,0\n")
    config = DataConfig(task=f"{file}:Weather", root=str(tmp_path))
    assert task_of(config) == DataTask(name=f"{file}:Weather", labels=("dry", "wet"))
    assert task_of(config).kind == "classification"
    loaded = load_examples(config, "train", tiny_encoder_tokenizer())
    assert [(e.prompt, e.label) for e in loaded] == [("rain", 1), ("sun", 0)]
    assert generic_task(task_type(config.task)) is Classification


def test_a_file_is_run_once_until_it_changes(file: Path) -> None:
    first = task_type(f"{file}:Weather")
    assert task_type(f"{file}:Weather") is first
    file.write_text(FILE.replace('"wet"', '"damp"'))
    assert task_type(f"{file}:Weather").classes == ("dry", "damp")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "{file}:Wether",
            "which has no 'Wether'. Write .*:Class. Its classes: Weather, Nameless, .*Did",
        ),
        ("{file}", "but no class in it. Write .*my_tasks.py:Class. Its classes: Weather"),
        ("{file}:number", "which is 3; it must be a class that inherits from a task"),
        ("{file}:DataSet", "it must be a class that inherits from a task"),
        ("{file}:Nameless", "set a unique one"),
        ("{file}:Taken", "the name 'mrpc' of a task of lorakit; set a unique one"),
        ("{file}:Half", "lacks encode, score; implement it, or inherit from Completion"),
        ("gone.py:Task", "names the file 'gone.py', which does not exist"),
        ("weather", "The task is 'weather'; it must be auto, one of .*samsum, or a class in a"),
    ],
)
def test_what_is_no_task(name: str, message: str, file: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"(?s){message}"):
        DataConfig(task=name.format(file=file), train="t.jsonl")


def test_a_file_that_cannot_be_run_is_named(file: Path) -> None:
    file.write_text("import nothing_of_the_kind")
    with pytest.raises(
        ConfigurationError, match=r"my_tasks\.py' cannot be imported \(ModuleNotFoundError"
    ):
        task_type(f"{file}:Weather")


def test_a_file_that_ends_the_process_is_named(file: Path) -> None:
    """Such as a script that calls its own main function."""
    file.write_text("import sys; sys.exit(0)")
    with pytest.raises(
        ConfigurationError, match=r"my_tasks\.py' cannot be imported \(SystemExit: 0"
    ):
        task_type(f"{file}:Weather")


def test_a_file_that_cannot_be_read_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(
        ConfigurationError, match=r"my_tasks\.py' cannot be read: Permission denied"
    ):
        task_type(f"{file}:Weather")


def test_a_task_of_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {
        "bikes": EntryPoint("bikes", "tiny_package:Bikes", registry.ENTRY_POINTS),
        "broken": EntryPoint("broken", "nothing_of_the_kind:Task", registry.ENTRY_POINTS),
    }

    class Bikes(Classification):
        name = "bikes"

    monkeypatch.setattr(registry, "installed", lambda group: points)
    real = registry.load_installed
    monkeypatch.setattr(
        registry,
        "load_installed",
        lambda point, what: Bikes if point is points["bikes"] else real(point, what),
    )
    assert task_type("bikes") is Bikes
    with pytest.raises(
        ConfigurationError, match=re.escape("task 'broken' is nothing_of_the_kind:")
    ):
        task_type("broken")
    with pytest.raises(
        ConfigurationError, match=r"samsum, bikes, broken, or.*Did you mean 'bikes'"
    ):
        task_type("bike")


def test_every_task_declares_what_it_is() -> None:
    for name, task in TASKS.items():
        assert task.name == name
        assert not task.__abstractmethods__
        assert set(task.quick_scores) or task.kind == "text"
        assert task.metric in (task.scores or ("loss",))
        assert task.__doc__
        if issubclass(task, NamedText):
            assert "{context}" in task.template

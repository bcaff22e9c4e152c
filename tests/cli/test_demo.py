"""`lorakit demo` fits its size to the machine, and prints the text of other people's functions literally."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_runs

from lorakit import storage
from lorakit.cli import demo, main
from lorakit.cli.console import console
from lorakit.cli.demo import (
    EXAMPLE,
    SIZES,
    DemoConfig,
    Size,
    _next_commands,
    _print_examples,
    _require_demo_folder,
    _serving,
    _size,
    size_for,
)
from lorakit.cli.parsing import parse
from lorakit.data import DataConfig
from lorakit.errors import ConfigurationError, RunFolderError
from lorakit.evaluation.evaluate import Evaluation
from lorakit.models.base_config import BaseConfig
from lorakit.serving.serve_config import ServeConfig


def test_texts_of_examples_are_no_markup(capsys) -> None:
    record = {"prompt": "def f(x: list[int] = [/a]):", "output": "[bold]", "references": ["[/b]"]}
    found = Evaluation(outputs=[record])
    _print_examples(console(), found, found)
    shown = capsys.readouterr().out
    assert "def f(x: list[int] = [/a]):" in shown
    assert "[bold]" in shown
    assert "[/b]" in shown


def test_the_demo_takes_two_to_four_minutes() -> None:
    """The range is narrower, because the estimate has an error."""
    for per_step in (0.25 * 1.1**i for i in range(32)):
        assert 145 <= size_for(per_step).seconds(per_step) <= 200


def test_the_size_depends_on_the_speed() -> None:
    assert size_for(1.2).max_steps == 90
    assert size_for(1e-3) == SIZES[-1]
    assert size_for(100) == SIZES[0]
    chosen = [size_for(0.1 * 1.1**i) for i in range(60)]
    assert set(chosen) == set(SIZES)
    assert [SIZES.index(size) for size in chosen] == sorted(map(SIZES.index, chosen), reverse=True)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the measurement: each pops the last of these seconds per step."""
    seconds: list[float] = []
    monkeypatch.setattr("lorakit.data.load_examples", lambda *_: None)
    monkeypatch.setattr("lorakit.training.probe.seconds_per_step", lambda *_: seconds.pop())
    return seconds


def size_of(config: DemoConfig) -> Size:
    class NoBase:
        text_tokenizer = None

    data = DataConfig(train="docstrings", validation="docstrings")
    return _size(console(), config, data, NoBase())  # type: ignore[arg-type]


def test_the_demo_says_what_it_measured_and_chose(measured: list[float], capsys) -> None:
    measured.append(1.2)
    assert size_of(DemoConfig()) == size_for(1.2)
    assert capsys.readouterr().out == (
        "A training step takes 1.2 s on this machine, so the demo trains 90 steps and scores 144 examples and 36 "
        "texts. It takes about 2m 58s.\n"
    )


def test_options_override_the_choice(measured: list[float], capsys) -> None:
    measured.append(1.2)
    assert size_of(DemoConfig(max_steps=7)) == Size(7, 144, 36)
    measured.append(1.2)
    assert size_of(DemoConfig(test_loss=8, test_texts=3)) == Size(90, 8, 3)
    assert "scores 8 examples and 3 texts" in capsys.readouterr().out


def test_with_all_options_nothing_is_measured(measured: list[float], capsys) -> None:
    assert size_of(DemoConfig(max_steps=4, test_loss=16, test_texts=4)) == Size(4, 16, 4)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("option", ["max_steps", "test_loss", "test_texts"])
def test_an_option_below_its_minimum_is_refused(option: str) -> None:
    with pytest.raises(ConfigurationError, match=option):
        DemoConfig(**{option: 0})


# --- serving at the end -----------------------------------------------------------------------------------


def test_the_server_gets_the_base_and_the_run_of_the_demo() -> None:
    arguments = _serving(
        DemoConfig(base=BaseConfig(name="b c", dtype="bfloat16"), output="out/x=y")
    )
    config = parse(ServeConfig, "serve", "", arguments)
    assert (config.base, config.open, config.port) == (
        BaseConfig(name="b c", dtype="bfloat16"), True, 0,
    )  # fmt: skip
    assert config.followed == {"demo": "out/x=y"}


def test_a_missing_package_is_found_before_the_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(demo, "_demonstrate", lambda config: pytest.fail("it has trained"))
    assert main(["demo", "--open"]) == 1
    assert 'pip install "lorakit[serve]"' in capsys.readouterr().err


@pytest.mark.parametrize("system", ["linux", "win32"])
@pytest.mark.parametrize("opens", [False, True])
def test_only_a_demo_that_opens_the_page_serves(
    monkeypatch: pytest.MonkeyPatch, opens: bool, system: str
) -> None:
    called: list[str] = []
    monkeypatch.setattr(demo, "_demonstrate", lambda config: called.append("demo"))

    def call(words: list[str]) -> SimpleNamespace:
        called.extend(words[1:5])
        return SimpleNamespace(returncode=7)

    def refuse(*_: object) -> None:
        pytest.fail("Windows' exec does not quote arguments")

    on_windows = system == "win32"
    monkeypatch.setattr("os.execv", refuse if on_windows else lambda path, words: call(words))
    monkeypatch.setattr("subprocess.run", call)
    monkeypatch.setattr("sys.platform", system)
    status = main(["demo", "--open", str(opens).lower()])
    assert status == (7 if opens and on_windows else 0)
    assert called == ["demo", *(["-m", "lorakit", "serve", "--base.name"] if opens else [])]


@pytest.mark.parametrize("system", ["linux", "win32"])
def test_the_next_commands_are_quoted_for_the_shell(
    monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    monkeypatch.setattr("sys.platform", system)
    commands = [line for line, _ in _next_commands(DemoConfig(output="my out"), Path("my out/a"))]
    quote = '"' if system == "win32" else "'"
    assert f"lorakit inspect {quote}my out/a{quote}" in commands
    assert f"lorakit merge {quote}my out/a{quote} {quote}my out/merged{quote}" in commands
    prompt = EXAMPLE.splitlines()[-1] if system == "win32" else EXAMPLE.replace("\n", r"\n")
    start = '"' if system == "win32" else "$'"
    assert commands[0].endswith(f" --prompt {start}{prompt}{quote}")


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    _require_demo_folder(tmp_path)
    settings = tiny_runs.config(tmp_path, "base").as_dict()
    (tmp_path / "config.yaml").write_text(storage.dump_yaml(settings))
    with pytest.raises(RunFolderError, match="a run that is not a demo"):
        _require_demo_folder(tmp_path)

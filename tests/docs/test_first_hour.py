"""The first hour with lorakit: the commands and Python blocks of the pages run as written and print what they show."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import made
import pages
import presumed
import pytest
import yaml
from outputs import difference
from walk import Presumed, run, walk

from lorakit.cli.data import DataCommandConfig
from lorakit.cli.parsing import parse

Reader = Callable[[str], Path]


def steps_of(page: str, kinds: tuple[str, ...]) -> list[pages.Step]:
    return [
        step
        for step in pages.steps(page, pages.read(page))
        if step.kind in kinds and not step.text.startswith(tuple(presumed.NOT_RUN))
    ]


COMMANDS, PYTHON = ("command", "file"), ("python",)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in pages.PAGES if steps_of(page, ("command",))])
def test_commands(page: str, reader: Reader) -> None:
    reader(page)
    failures = walk(
        steps_of(page, COMMANDS), presumed.COMMANDS.get(page, Presumed()), vars(made).copy()
    )
    assert not failures, "\n".join(["", *failures])


@pytest.mark.slow
# PEFT and TRL use a name that transformers deprecates.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # PEFT, offline
@pytest.mark.parametrize("page", [page for page in pages.PAGES if steps_of(page, PYTHON)])
def test_python(page: str, reader: Reader) -> None:
    reader(page)
    failures = walk(
        steps_of(page, PYTHON), presumed.PYTHON.get(page, Presumed()), vars(made).copy()
    )
    assert not failures, "\n".join(["", *failures])


def text_blocks() -> list[pages.Block]:
    return [
        block
        for page in pages.PAGES
        for block in pages.blocks(page, pages.read(page))
        if block.language == "text" and not block.text.startswith(presumed.NO_OUTPUT)
    ]


def test_every_text_block_is_an_output_of_a_command() -> None:
    starts = [(page, start) for (page, _), of_page in presumed.SHOWN.items() for start in of_page]
    for block in text_blocks():
        starts.remove(
            next(
                (page, start)
                for page, start in starts
                if page == block.page and block.text.strip().startswith(start)
            )
        )
    assert starts == []


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), presumed.SHOWN)
def test_text_blocks(page: str, command: str, reader: Reader) -> None:
    reader(page)
    turns = [{"from": "human", "value": "Which pub?"}, {"from": "gpt", "value": "The river pub."}]
    made.write_rows("chat.jsonl", [{"conversations": turns}] * 4)
    status, out, err = run(command)
    assert status == 0, err
    excerpts = [
        line for block in text_blocks() if block.page == page for line in (*block.lines, "...")
    ]
    assert difference(["...", *excerpts], out.splitlines()) == ""


@pytest.mark.slow
def test_the_run_folder_has_the_files_of_the_page(reader: Reader) -> None:
    page = "docs/guides/training.md"
    (tree,) = (b for b in pages.blocks(page, pages.read(page)) if b.text.startswith("out/e2e/\n"))
    folder = reader(page)
    made.run("out/e2e", "--evaluation.samples 1")
    named = [line.split()[0] for line in tree.lines[1:] if "missing if" not in line]
    assert [name for name in named if not (folder / "out/e2e" / name).exists()] == []


def test_the_readme_names_the_versions_that_pip_requires() -> None:
    needed = dict(re.findall(r'"?([\w-]+)(?: = ")?>=([\d.]+)"', pages.read("pyproject.toml")))
    sentence = (
        f"lorakit needs Python {needed['requires-python']}, PyTorch {needed['torch']} and transformers "
        f"{needed['transformers']}, or newer"
    )
    assert sentence in pages.read("README.md")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_torch_comes_from_its_index_after_an_interrupted_installation(
    tmp_path: Path, target: str
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/pip").touch()

    def make(*options: str) -> subprocess.CompletedProcess[str]:
        command = ["make", target, f"VENV={tmp_path}", *options]
        return subprocess.run(command, cwd=pages.ROOT, capture_output=True, text=True)

    assert make("PIP=false").returncode
    lines = make("TORCH_INDEX=https://index/cpu", "--dry-run").stdout.splitlines()
    first = next(line for line in lines if " install " in line and not line.startswith("echo"))
    assert first.endswith("--index-url https://index/cpu torch")


def test_settings_of_the_pages_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "fragment.yaml"
    for page in pages.PAGES:
        for block in pages.blocks(page, pages.read(page)):
            if block.language == "yaml" and block.lines[0] == "data:":
                file.write_text(block.text, encoding="utf-8")
                options = ["--config", str(file), "--base.name", "smollm2-135m"]
                data = parse(DataCommandConfig, "data", "", options).data
                assert vars(data).items() >= yaml.safe_load(block.text)["data"].items()

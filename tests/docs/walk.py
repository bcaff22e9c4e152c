"""Do what a page tells the reader to do, in the current folder, and note where it fails."""

from __future__ import annotations

import io
import linecache
import subprocess
import traceback
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from outputs import difference
from pages import Step

from lorakit.cli import main


@dataclass(frozen=True)
class Presumed:
    """What the reader of a page has, and what the page leaves open.

    Attributes:
        setup: Code that runs before the page, in the namespace of its Python blocks.
        before: Code that runs before a step whose text starts with the key.
        more: Options by a start of a command: those that a trailing `...` stands for, or that make the command short,
            also in place of the same option with another value.
        typed: Lines that the reader types into a command that reads them, by a start of the command.
    """

    setup: str = ""
    before: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, str] = field(default_factory=dict)
    typed: Mapping[str, str] = field(default_factory=dict)


def walk(steps: Sequence[Step], presumed: Presumed, names: dict[str, Any]) -> list[str]:
    """Do the steps in order and return a message for each that fails, with page and line."""
    failures = []
    _execute(presumed.setup, "the setup", names)
    for step in steps:
        _execute(_of(presumed.before, step), f"before {step.page}:{step.line}", names)
        try:
            failure = _do(step, presumed, names)
        except Exception as error:  # a page can fail in any way
            failure = f"{type(error).__name__}: {error}"
            step = _at(error, step)
        if failure:
            failures.append(f"{step.page}:{step.line}: {step.text.splitlines()[0]}\n  {failure}")
    return failures


def words(command: str) -> list[str]:
    """Split a command as bash does: quotes, comments, continued lines."""
    if not command:
        return []
    script = f"set -f; words=({command}\n); printf '%s\\0' \"${{words[@]}}\""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def run(command: str, typed: str = "", more: Sequence[str] = ()) -> tuple[int, str, str]:
    """Run a `lorakit` command in this process; return its status, its output and its messages."""
    program, *arguments = words(command)
    assert program == "lorakit", (
        f"{program} is not lorakit: list it with the reason why it is not run"
    )
    if arguments[-1] == "..." and more:
        arguments.pop()
    for option in {word for word in more if word.startswith("--")}.intersection(arguments):
        at = arguments.index(option)
        del arguments[at : at + 2]
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), mock.patch("sys.stdin", io.StringIO(typed)):
        status = main([*arguments, *more])
    return status, out.getvalue(), err.getvalue()


def _do(step: Step, presumed: Presumed, names: dict[str, Any]) -> str:
    """Return how the output or the status is wrong, or an empty string."""
    if step.kind == "file":
        Path(step.file).write_text(step.text, encoding="utf-8")
        return ""
    if step.kind == "python":
        _execute(step.text, step.page, names)
        return ""
    more = words(_of(presumed.more, step))
    status, out, err = run(step.text, _of(presumed.typed, step), more)
    command = " ".join(words(step.text)[:2])
    if step.output and step.output[0].startswith(f"{command}: "):  # the page shows an error
        return difference(step.output, err.splitlines()) if status else "it ends without an error"
    if status:
        return f"status {status}: {err.strip()}"
    return difference(step.output, out.splitlines()) if step.output else ""


def _at(error: Exception, step: Step) -> Step:
    """Return the part of a Python block that starts at the line that raised."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == step.page]
    skipped = max((frames[0].lineno or 1) - 1, 0) if frames else 0
    lines = step.text.splitlines()[skipped:]
    return replace(step, line=step.line + skipped, text="\n".join(lines))


def _of(table: Mapping[str, str], step: Step) -> str:
    """Return the entry of a table whose key the step's text starts with."""
    return next((value for start, value in table.items() if step.text.startswith(start)), "")


def _execute(code: str, name: str, names: dict[str, Any]) -> None:
    """Execute code, with its lines in tracebacks and for `inspect.getsource`."""
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    exec(compile(code, name, "exec", dont_inherit=True), names)

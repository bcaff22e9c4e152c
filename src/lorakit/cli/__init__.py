"""The command line. Each command has one file, which parses options, calls one function and prints.

To add a command, list it in `COMMANDS` and write a module of its name with `run(argv)` and `CONFIGS`, the classes of
its options. The module imports torch only after it has parsed its arguments.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import IO

from lorakit.cli.torchrun import is_one_of_several, report_error
from lorakit.errors import LorakitError, memory_errors, nearest
from lorakit.formatting import visible
from lorakit.version import __version__

COMMANDS = {
    "demo": "Adapt a real language model in a few minutes and see what changed",
    "init": "Write a commented YAML file for your data, which every command reads",
    "data": "Preview a data set: tokens, loss mask, lengths and duplicates",
    "plan": "Predict the memory, time and size of a training run without loading weights",
    "train": "Train an adapter (or the whole model) and save it",
    "recipes": "List the paper's hyper-parameters for lorakit train --recipe NAME",
    "paper": "Reproduce a table of the paper on your model, next to the published rows",
    "evaluate": "Score a base model or an adapter on held-out data",
    "predict": "Predict the labels or scores of rows that have none",
    "report": "Write the HTML report of a run, or compare several runs",
    "score": "Score a file of generated texts with the paper's metrics",
    "generate": "Generate text for a prompt or a file of prompts",
    "chat": "Chat with a base model or an adapter",
    "serve": "Serve a base and many adapters with an OpenAI-compatible API, in mixed batches",
    "merge": "Merge an adapter into its base and save the whole model",
    "inspect": "Show the contents of an adapter without loading its base",
    "analyze": "Analyze adapters: spectrum, similarity, amplification, intruders, diff, drift",
    "compress": "Reduce the rank of an adapter with the smallest possible error",
    "combine": "Combine adapters: exact weighted sum, TIES or DARE",
    "extract": "Extract an adapter from the difference between a fine-tuned model and its base",
    "convert": "Convert a PEFT adapter to a loralib file, or back",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0, 1 for a user error, 2 for a command that is unknown or cannot run in several processes, 75 after SIGTERM or
    SIGHUP and a checkpoint (`lorakit.training.interruption.EXIT_TO_RESUME`), 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    command, *rest = arguments or ["--help"]
    _set_encodings()
    try:
        try:
            return _run(command, rest)
        except SystemExit as end:
            if not end.code:  # after --help; another status must not become that of a closed pipe
                _flush()
            raise
    except LorakitError as error:
        print(f"lorakit {command}: {error}", file=sys.stderr)
        report_error(str(error))
        return 1
    except KeyboardInterrupt:
        print(f"\nlorakit {command}: interrupted.", file=sys.stderr)
        return 130  # 128 + SIGINT, as in shells
    except OSError as error:
        if _is_closed_pipe(error):
            # Discard the buffered output; otherwise Python reports an error when it flushes at exit.
            assert sys.stdout is not None
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        # Not handled by the command: a library's own file, a failing disk.
        name = f"'{error.filename}': " if error.filename else ""
        print(f"lorakit {command}: {visible(f'{name}{error.strerror or error}')}.", file=sys.stderr)
        return 1


def _run(command: str, rest: Sequence[str]) -> int:
    """Run a command, or print the help or the version; return the exit status."""
    if command in ("-h", "--help", "help"):
        print(_overview(), flush=True)
        return 0
    if command in ("-V", "--version"):
        print(f"lorakit {__version__}", flush=True)
        return 0
    if command not in COMMANDS:
        print(
            f"lorakit: unknown command '{visible(command)}'.{nearest(command, COMMANDS)} "
            f"Commands: {', '.join(COMMANDS)}.",
            file=sys.stderr,
        )
        return 2
    if command != "train" and is_one_of_several():
        message = (
            f"lorakit {command}: torchrun started this command in {os.environ['WORLD_SIZE']} processes, but only "
            f"lorakit train shares its work between processes. Run 'lorakit {command}' without torchrun."
        )
        if os.environ.get("RANK") == "0":
            print(message, file=sys.stderr)
        report_error(message)
        return 2
    # A command imports PyTorch only after it has parsed its arguments, so that --help is fast.
    module = import_module(f"lorakit.cli.{command}")
    with memory_errors():
        status = module.run(rest) or 0
    _flush()
    return status


def _flush() -> None:
    """Write what was printed now, where a closed pipe is handled."""
    if sys.stdout is not None:  # None if the process started with stdout closed
        sys.stdout.flush()


def _set_encodings() -> None:
    """Use UTF-8 in files and pipes, where Windows' default is a code page; leave a terminal its encoding."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        if not stream.isatty() and "PYTHONIOENCODING" not in os.environ:
            # A caller may have read a line of its standard input.
            with suppress(io.UnsupportedOperation):
                stream.reconfigure(encoding="utf-8")
        if stream is not sys.stdin:
            # Escape characters that cannot be encoded, so that a print never ends a long run.
            stream.reconfigure(errors="backslashreplace")


def _is_closed_pipe(error: OSError) -> bool:
    """Return whether the reader of standard output, such as head, has closed it."""
    # Windows' error of a closed pipe is that of an invalid argument.
    is_of_a_pipe = isinstance(error, BrokenPipeError) or (
        sys.platform == "win32" and error.errno == errno.EINVAL
    )
    if not is_of_a_pipe or sys.stdout is None or _is_file(sys.stdout):
        return False
    try:  # the pipe may be another one, such as that to a logger's process; a closed one fails again
        print(flush=True)
    except OSError:
        return True
    return False


def _is_file(stream: IO[str]) -> bool:
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except OSError:  # it has no descriptor, or a closed one
        return False


def _overview() -> str:
    from lorakit.cli.help import entry, line_width

    column = max(map(len, COMMANDS)) + 4
    return "\n".join(
        [
            f"lorakit {__version__}: low-rank adaptation of large language models",
            "",
            "usage: lorakit COMMAND [--config FILE.yaml] [--option VALUE ...]",
            "",
            *(entry(name, text, column) for name, text in COMMANDS.items()),
            "",
            textwrap.fill(
                "A YAML file can set every option except --recipe, under the same name; one file can serve all "
                "commands. 'lorakit COMMAND --help' shows the options that matter, '--help all' the others too. Start "
                "with 'lorakit demo'.",
                line_width(),
            ),
        ]
    )

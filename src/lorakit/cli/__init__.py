"""The command line: one file for each command, which parses, calls one function and prints."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lorakit.errors import LorakitError, nearest
from lorakit.version import __version__

COMMANDS = {
    "demo": "Adapt a real language model in a few minutes and see what changed",
    "data": "Preview a data set as the model will see it",
    "plan": "Predict the memory, time and size of a training run, without weights",
    "train": "Train an adapter (or the whole model) and save it",
    "recipes": "List the paper's hyper-parameters, which lorakit train --recipe NAME takes",
    "paper": "Run a table of the paper on your model and print your rows beside the published ones",
    "evaluate": "Score a base model or an adapter on held-out data",
    "report": "Write the page of a run, or one that compares runs",
    "score": "Score a file of outputs with the paper's metrics",
    "generate": "Generate text for a prompt or a file of prompts",
    "merge": "Fold an adapter into its base and save the whole model",
    "inspect": "Show what an adapter holds, without loading its base",
    "analyze": "Look into adapters: spectrum, similarity, amplification, intruders, diff, drift",
    "compress": "Bring an adapter to a smaller rank, as exactly as that can be",
    "combine": "Put several adapters together: their exact weighted sum, TIES or DARE",
    "extract": "Make an adapter of the difference between a fine-tuned model and its base",
    "convert": "Turn a PEFT adapter into a loralib file, or the other way round",
}

EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C, by the shells' convention 128 + SIGINT."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 for an error of the user's, 2 for a wrong call."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"lorakit {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(
            f"lorakit: there is no command '{command}'.{nearest(command, COMMANDS)} "
            f"Commands: {', '.join(COMMANDS)}.",
            file=sys.stderr,
        )
        return 2
    for stream in (sys.stdout, sys.stderr):
        # What a terminal's encoding cannot show is written as escapes: no reason to lose hours of work.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Imported only now: most commands need PyTorch, and --help should not wait for it.
    module = import_module(f"lorakit.cli.{command}")
    try:
        status = module.run(rest) or 0
        if sys.stdout is not None:  # as it is where a command was started with it closed
            sys.stdout.flush()
        return status
    except LorakitError as error:
        print(f"lorakit {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nlorakit {command}: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        # What is left in the buffer goes nowhere, or Python would complain about it at its end.
        assert sys.stdout is not None
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # the last net: a library's own file, a disk that fails
        name = f"'{error.filename}': " if error.filename else ""
        print(f"lorakit {command}: {name}{error.strerror or error}.", file=sys.stderr)
        return 1


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return f"""lorakit {__version__}: low-rank adaptation of large language models

usage: lorakit COMMAND [--config FILE.yaml] [--option VALUE ...]

{commands}

Every option of a command but --recipe can stand in its YAML file under the same name.
'lorakit COMMAND --help' lists the options. Start with 'lorakit demo'."""

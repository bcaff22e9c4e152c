"""`lorakit chat`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorakit import storage
from lorakit.cli.parsing import parse
from lorakit.compute.adapted_config import AdaptedConfig
from lorakit.configuration import LocalPath
from lorakit.errors import ConfigurationError, DataError, LorakitError, nearest
from lorakit.evaluation.decoding import Decoding
from lorakit.formatting import visible

if TYPE_CHECKING:
    from lorakit.evaluation.conversation import Conversation

COMMANDS = ("/adapter", "/base", "/reset", "/quit")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(AdaptedConfig):
    """Options of `lorakit chat`."""

    adapter: LocalPath | None = None
    """Adapter folder. Omit to chat with the base model. /adapter loads others."""
    allow_other_base: bool = False
    """Allow adapters of a base other than this one."""
    system: str | None = None
    """Text of a system turn at the start of the conversation. If the chat template has no system role, it starts the
    first user message."""
    decoding: Decoding = field(default_factory=Decoding)
    """Greedy or sampling; in a chat, up to 512 tokens per answer by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.decoding.beams or 1) > 1:
            raise ConfigurationError(
                f"decoding.beams is {self.decoding.beams}, but answers are printed as they are generated, which needs "
                "one beam. Remove it."
            )


CONFIGS = (ChatConfig,)


def run(argv: Sequence[str]) -> None:
    """Answer each line of standard input, from a terminal or a pipe."""
    config = parse(
        ChatConfig,
        "chat",
        "Chat with a base model or an adapter, on a terminal or through a pipe (one message per line). Ctrl-C stops an "
        "answer. /adapter NAME|PATH, /base, /reset and /quit change the adapter, start anew and end the chat.",
        argv,
    )
    from lorakit.compute.adapted import base_of, open_adapted
    from lorakit.compute.adapter_file import AdapterFile, text_task
    from lorakit.evaluation.conversation import Conversation

    file = AdapterFile.read(config.adapter)
    task = text_task(file)
    # The conversation adds adapters.
    base = open_adapted(base_of(config.base, file), None, task=task)
    conversation = Conversation(
        base,
        system=config.system,
        decoding=config.decoding,
        allow_other_base=config.allow_other_base,
    )
    if file is not None:
        _load(conversation, file.path)
    template = conversation.template  # raises if there is none
    if config.system and not template.has_system_role:
        _say("the chat template has no system role; the system text starts the first user message.")
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        _say(f"{_voice(conversation)}. Commands: {', '.join(COMMANDS)}. Ctrl-C stops an answer.")
    for line in _lines(is_terminal):
        try:
            if line.startswith("/"):
                if not _obey(conversation, line):
                    return
            elif line.strip():
                _answer(conversation, line)
        except LorakitError as error:
            if not is_terminal:  # a script would read the answers of another adapter
                raise
            _say(str(error))


def _lines(is_terminal: bool) -> Iterator[str]:
    """Yield the lines of standard input. On a terminal, Ctrl-C discards the line."""
    if is_terminal:
        with suppress(ImportError):  # absent on Windows
            import readline  # noqa: F401 - gives `input` a history
    while True:
        try:
            with storage.reading("standard input", DataError):
                line = input("> " if is_terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            _say("\n/quit or Ctrl-D ends the chat.")
            continue
        yield line


def _answer(conversation: Conversation, message: str) -> None:
    """Print the answer to a message while it is generated; Ctrl-C ends it."""

    def write(piece: str) -> None:
        print(piece, end="", flush=True)

    with _ctrl_c() as pressed:
        conversation.reply(message, write=write, interrupted=pressed.is_set)
    print(flush=True)


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Set an event at the first Ctrl-C, so that a forward pass is never cut; the second one acts as usual."""
    pressed, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def press(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        pressed.set()

    # Python allows signal handlers in the main thread only. Respect a parent that ignores the signal.
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or before is signal.SIG_IGN:
        yield pressed
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _obey(conversation: Conversation, line: str) -> bool:
    """Carry out a command; return whether the chat goes on."""
    command, _, value = line.strip().partition(" ")
    if command == "/quit":
        return False
    if command == "/reset":
        conversation.reset()
        _say("new conversation")
    elif command == "/base":
        conversation.choose(None)
        _say(_voice(conversation))
    elif command == "/adapter" and value:
        _load(conversation, value.strip())
    elif command == "/adapter":
        _say(f"loaded: {', '.join(conversation.adapters) or 'none'}; {_voice(conversation)}")
    else:
        raise DataError(
            f"Unknown command '{command}'.{nearest(command, COMMANDS)} Commands: {', '.join(COMMANDS)}. A space "
            "before the slash makes the line a message."
        )
    return True


def _load(conversation: Conversation, name: str) -> None:
    """Activate the adapter with this name, or load it from this path."""
    from lorakit.compute.adapter_file import AdapterFile, text_task
    from lorakit.tasks import Chat

    if name in conversation.adapters:
        conversation.choose(name)
    else:
        file = AdapterFile.read(os.path.expanduser(name))
        assert file is not None
        task = text_task(file)
        conversation.load(file)
        if task is None:
            _say(
                f"note: the adapter {file.path} does not record its task; messages use the chat template."
            )
        elif not issubclass(task.type, Chat):
            _say(
                f"note: the adapter {file.path} was trained for {task.name}, not for chat; messages use the chat "
                "template all the same."
            )
    _say(_voice(conversation))


def _voice(conversation: Conversation) -> str:
    """Return which model answers."""
    adapter = f"adapter {conversation.adapter}" if conversation.adapter else "no adapter"
    return f"base {conversation.base.source.name}, {adapter}"


def _say(text: str) -> None:
    """Print a line that is no answer."""
    print(visible(text, keep="\n"), file=sys.stderr, flush=True)

"""A chat with a model, with its base alone or with one of several adapters."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TextStreamer

from lorakit.adapters.handle import own_handle
from lorakit.adapters.loading import default_name
from lorakit.compute.adapted import add_adapter
from lorakit.compute.adapter_file import AdapterFile
from lorakit.compute.batching import context_length, prompt_input, room_after
from lorakit.compute.model_input import virtual_tokens_of
from lorakit.errors import DataError
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.generate import generate
from lorakit.evaluation.prompt_cache import PromptCache
from lorakit.models.loading import Base
from lorakit.tasks import Chat, conversion
from lorakit.tasks.chat_template import ChatTemplate
from lorakit.tasks.messages import Message
from lorakit.tasks.task import checked_text

NEW_TOKENS = 512
"""Default maximum number of tokens in an answer."""


class Conversation:
    """The messages so far, and the model that answers.

    Each adapter formats the messages with its own tokenizer. Messages stay when the adapter changes.
    """

    def __init__(
        self,
        base: Base,
        *,
        system: str | None = None,
        decoding: Decoding | None = None,
        allow_other_base: bool = False,
    ) -> None:
        self.base = base
        self.system = system
        self.decoding = (decoding or Decoding()).over({"max_new_tokens": NEW_TOKENS})
        self.allow_other_base = allow_other_base
        self.messages: list[Message] = []
        self.adapter: str | None = None
        """Name of the active adapter; None for the base alone."""
        self._cache = PromptCache()
        self._folders: dict[Path, str] = {}
        self._tokenizers: dict[str | None, PreTrainedTokenizerBase | None] = {None: base.tokenizer}

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        return list(self._folders.values())

    @property
    def template(self) -> ChatTemplate:
        """The chat template of the active adapter.

        Raises:
            DataError: Its tokenizer has none.
        """
        tokenizer = self._tokenizers[self.adapter]
        assert tokenizer is not None  # open_base rejects a base without one
        return ChatTemplate(tokenizer)

    def choose(self, name: str | None) -> None:
        """Activate a loaded adapter; None for the base alone."""
        handle = own_handle(self.base.model)
        if handle is not None:
            handle.activate(name)
        self.adapter = name

    def load(self, file: AdapterFile) -> str:
        """Load and activate an adapter, once. Return its name: that of its folder, for a run's adapter the run's.

        Raises:
            LorakitError: The adapter does not fit the base.
        """
        folder = Path(file.path).resolve()
        if folder not in self._folders:
            name = default_name(folder)
            names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
            name = next(n for n in names if n not in self.adapters)
            self._tokenizers[name] = add_adapter(
                self.base, file, name=name, allow_other_base=self.allow_other_base
            )
            self._folders[folder] = name
        self.choose(self._folders[folder])
        return self._folders[folder]

    def reset(self) -> None:
        """Forget the messages."""
        self.messages = []

    def reply(
        self,
        message: str,
        *,
        write: Callable[[str], Any] = lambda _: None,
        interrupted: Callable[[], bool] | None = None,
    ) -> str:
        """Return the answer to a message, and append both to the messages.

        Args:
            message: The user's message.
            write: Called with each piece of the answer as it is generated.
            interrupted: Called after each token; the answer ends once it returns True.

        Raises:
            LorakitError: The conversation does not fit the model's context or the chat template. The messages are
                then unchanged.
        """
        turns = [*self.messages, {"role": "user", "content": checked_text(message, "message")}]
        template, model = self.template, self.base.model
        messages = template.prepared(conversion.with_system(turns, self.system))
        ids = prompt_input(model, template.tokenizer, template.ids(messages, answer=True))
        (answer,) = generate(
            model,
            template.tokenizer,
            [ids],
            dataclasses.replace(self.decoding, max_new_tokens=self._new_tokens(len(ids))),
            stop_ids=Chat.stop_ids(template.tokenizer),
            streamer=_Pieces(template.tokenizer, write),
            interrupted=interrupted,
            cache=self._cache,
        )
        self.messages = [*turns, {"role": "assistant", "content": Chat.answer(answer)}]
        return answer

    def _new_tokens(self, length: int) -> int:
        """Return the maximum number of new tokens after a prompt of `length` tokens."""
        wanted, model = self.decoding.new_tokens, self.base.model
        context = context_length(model)
        if context is None:
            return wanted
        used, encodes = length + virtual_tokens_of(model).total, model.config.is_encoder_decoder
        room = room_after(used, context, is_encoder_decoder=encodes)
        if room < 1:
            raise DataError(
                f"The conversation has {length:,} tokens and fills the model's context of {context:,}. Start a new "
                "one: /reset."
            )
        return min(wanted, room)


class _Pieces(TextStreamer):
    """Passes each finished piece of text to a function instead of printing it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)

"""Prompts as token ids, in a worker thread."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from lorakit.errors import ConfigurationError
from lorakit.serving.http.errors import ApiError, invalid_value
from lorakit.serving.http.schemas import Message
from lorakit.tasks import BadRow, Chat
from lorakit.tasks.chat_template import ChatTemplate
from lorakit.tasks.language_modelling import prompt_ids
from lorakit.tasks.messages import checked_messages
from lorakit.tasks.template_kwargs import check_template_kwargs

TOKENISING = threading.Lock()
"""A tokenizer of Rust raises "Already borrowed" if another thread sets its truncation meanwhile."""
_STOP_IDS: WeakKeyDictionary[PreTrainedTokenizerBase, frozenset[int]] = WeakKeyDictionary()


_LONGEST: WeakKeyDictionary[PreTrainedTokenizerBase, int] = WeakKeyDictionary()


def require_short(tokenizer: PreTrainedTokenizerBase, text: str, context: int, param: str) -> None:
    """Reject a text that cannot fit in the context, before others wait until it is tokenised.

    Raises:
        ApiError: It has more characters than the longest tokens of a context.
    """
    if tokenizer not in _LONGEST:
        _LONGEST[tokenizer] = max(map(len, tokenizer.get_vocab()), default=1)
    if len(text) > context * _LONGEST[tokenizer]:
        raise ApiError(
            400,
            f"'{param}' has {len(text):,} characters, more than {context:,} tokens, the context, can hold. Shorten it.",
            param=param,
            code="context_length_exceeded",
        )


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[int], context: int
) -> list[int]:
    """Return the token ids of a prompt, as in the training of completions.

    Raises:
        ApiError: It has no tokens, an id is not in the vocabulary, or the text is too long.
    """
    if isinstance(prompt, str):
        require_short(tokenizer, prompt, context, "prompt")
        with TOKENISING:
            ids = prompt_ids(tokenizer, prompt)
        if not ids:
            raise invalid_value("'prompt' has no tokens; it must have at least one.", "prompt")
        return ids
    wrong = [i for i in prompt if not 0 <= i < len(tokenizer)]
    if wrong:
        raise invalid_value(
            f"'prompt' has the token id {wrong[0]}; ids of this vocabulary are 0 to {len(tokenizer) - 1:,}.",
            "prompt",
        )
    return prompt


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    context: int,
    variables: Mapping[str, Any] | None = None,
) -> tuple[list[int], frozenset[int]]:
    """Return the token ids of a conversation, rendered for an answer, and the tokens that end one.

    Raises:
        ApiError: The template rejects the conversation or one of its `variables`, or the text is too long.
        DataError: The tokenizer has no chat template, or one that cannot be rendered.
    """
    turns = [message.model_dump() for message in messages]
    template = ChatTemplate(tokenizer, variables)
    try:
        check_template_kwargs(variables or {}, "chat_template_kwargs", tokenizer)
    except ConfigurationError as error:
        raise invalid_value(str(error), "chat_template_kwargs") from None
    try:
        rows = template.prepared(checked_messages({"messages": turns}, empty_answers=True))
        text = template.text(rows, answer=True)
    except BadRow as error:
        raise invalid_value(f"{error}.", "messages") from None
    require_short(tokenizer, text, context, "messages")
    with TOKENISING:
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # type: ignore[arg-type]
    if not ids:
        raise invalid_value("'messages' has no tokens; it must have at least one.", "messages")
    return ids, _stop_ids(tokenizer)


def special_stops(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> frozenset[int]:
    """Return the ids of the stop texts that are special tokens. The text of an answer leaves these tokens out."""
    if not stop:
        return frozenset()
    with TOKENISING:
        added = tokenizer.added_tokens_decoder
    return frozenset(i for i, token in added.items() if token.special and token.content in stop)


def _stop_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end an assistant's turn in the template."""
    if tokenizer not in _STOP_IDS:
        _STOP_IDS[tokenizer] = frozenset(Chat.stop_ids(tokenizer))
    return _STOP_IDS[tokenizer]

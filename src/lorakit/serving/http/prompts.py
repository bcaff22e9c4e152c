"""Prompts as token ids, in a worker thread."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from lorakit.serving.http.errors import ApiError
from lorakit.serving.http.schemas import Message
from lorakit.tasks import BadRow, Chat
from lorakit.tasks.chat import ChatTemplate, checked_messages
from lorakit.tasks.language_modelling import prompt_ids

TOKENISING = threading.Lock()
"""A tokenizer of Rust raises "Already borrowed" if another thread sets its truncation meanwhile."""
_STOP_IDS: WeakKeyDictionary[PreTrainedTokenizerBase, frozenset[int]] = WeakKeyDictionary()


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[int]) -> list[int]:
    """Return the token ids of a prompt, as in the training of completions.

    Raises:
        ApiError: It has no tokens, or an id is not in the vocabulary.
    """
    if isinstance(prompt, str):
        with TOKENISING:
            ids = prompt_ids(tokenizer, prompt)
        if not ids:
            raise _invalid("'prompt' has no tokens; it must have at least one.", "prompt")
        return ids
    wrong = [i for i in prompt if not 0 <= i < len(tokenizer)]
    if wrong:
        raise _invalid(
            f"'prompt' has the token id {wrong[0]}; ids of this vocabulary are 0 to {len(tokenizer) - 1:,}.",
            "prompt",
        )
    return prompt


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[int], frozenset[int]]:
    """Return the token ids of a conversation, rendered for an answer, and the tokens that end one.

    Raises:
        ApiError: The template rejects the conversation.
        DataError: The tokenizer has no chat template, or one that cannot be rendered.
    """
    # Templates know the role system only; developer is its new name.
    turns = [
        {
            "role": "system" if m.role == "developer" else m.role,
            "content": m.content
            if isinstance(m.content, str)
            else [p.model_dump() for p in m.content],
        }
        for m in messages
    ]
    try:
        template = ChatTemplate(tokenizer)
        rows = checked_messages({"messages": turns})
        if rows[0]["role"] == "system" and not template.has_system_role():
            # As in `lorakit chat`: the text starts the first user message.
            rows = template.with_system(rows[1:] or rows, rows[0]["content"])
        text = template.text(rows, answer=True)
    except BadRow as error:
        raise _invalid(f"'messages' {error}.", "messages") from None
    with TOKENISING:
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # type: ignore[arg-type]
    if not ids:
        raise _invalid("'messages' has no tokens; it must have at least one.", "messages")
    return ids, _stop_ids(tokenizer)


def _stop_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end an assistant's turn in the template."""
    if tokenizer not in _STOP_IDS:
        _STOP_IDS[tokenizer] = frozenset(Chat.stop_ids(tokenizer))
    return _STOP_IDS[tokenizer]


def _invalid(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")

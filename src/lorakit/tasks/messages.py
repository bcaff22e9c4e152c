"""The messages of a conversation: what a row must hold, and the parts of it that lorakit reads."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from lorakit.errors import nearest
from lorakit.tasks import conversion
from lorakit.tasks.task import BadRow, Fields, checked_text, json_type

Message = dict[str, Any]

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message's thoughts. transformers copies the value of one to the key that a template reads."""
ROLES = ("system", "developer", "user", "assistant", "tool")


def without_answer(messages: list[Message]) -> list[Message]:
    """Return the messages that the assistant answers: without a last assistant turn, which is the answer.

    Raises:
        BadRow: No other message is left.
    """
    if messages[-1]["role"] != "assistant":
        return messages
    if len(messages) == 1:
        raise bad_messages("has no message before the assistant's turn")
    return messages[:-1]


def checked_messages(fields: Fields, *, empty_answers: bool = False) -> list[Message]:
    """Return the messages of a row after validation, each as `{role, content, ...}` without null entries.

    The messages are a list, or a list as JSON text. A `system` text beside them becomes their first one.
    `empty_answers` accepts assistant turns without text, which a model may have given but none should learn.
    """
    messages = fields.get("messages", fields.get("conversations"))
    if messages is None:
        raise bad_messages("is missing")
    if isinstance(messages, str):  # as in CSV files
        with suppress(ValueError, RecursionError):
            messages = json.loads(messages)
    if not isinstance(messages, list | tuple):
        raise bad_messages(
            f"is {json_type(messages)}, expected a list of {{role, content}}, or its JSON text"
        )
    if not messages:
        raise bad_messages("is empty")
    checked = [
        _checked_message(message, number, empty_answers)
        for number, message in enumerate(messages, start=1)
    ]
    return conversion.with_system(checked, fields.get("system"))


def bad_messages(problem: str) -> BadRow:
    """Return the error of a row whose messages have this problem."""
    return BadRow(problem, "messages")


def key_of(messages: list[Message], tools: list[Any] | None) -> str:
    """Return a text that is the same for the same messages and tools, whatever chat template renders them.

    It leaves out what may differ between copies of a conversation: the ids of tool calls, and empty turns.
    """
    turns = [
        [m["role"], m["content"], *map(_without_id, m.get("tool_calls", ()))]
        for m in messages
        if m["content"].strip() or m.get("tool_calls")
    ]
    return json.dumps([turns, tools], sort_keys=True, default=str)


def _without_id(call: Any) -> Any:
    """Return the function of a call, which a nested call has as `function` beside its type and index."""
    function = call.get("function")
    return {**(function if isinstance(function, dict) else call), "id": ""}


def is_trained(message: Message) -> bool:
    """Return whether the loss includes an assistant's message: OpenAI's `weight` and axolotl's `train` exclude it."""
    return bool(message.get("weight", True) and message.get("train", True))


def _checked_message(message: Any, number: int, empty_answers: bool) -> Message:
    if not isinstance(message, dict):
        raise bad_messages(
            f"has {json_type(message)} as message {number}, expected {{role, content}}"
        )
    # In Parquet files every message has all keys; unused ones are null.
    message = {key: value for key, value in message.items() if value is not None}
    if conversion.is_sharegpt(message):
        message = conversion.role_and_content(message, number)
    role = message.get("role")
    if role is None:
        keys = ", ".join(map(str, message)) or "nothing"
        raise bad_messages(f"has a message without 'role' (message {number} has: {keys})")
    if role not in ROLES:
        raise bad_messages(
            f"has the unknown role {role!r} in message {number}; roles are {', '.join(ROLES)}."
            + nearest(str(role), ROLES)
        )
    for key in ("weight", "train"):
        if message.get(key, 1) not in (0, 1):
            raise bad_messages(
                f"has {message[key]!r} as {key!r} of message {number}; write 1 or true to train on the message, 0 or "
                "false to leave it out of the loss"
            )
    for key in THOUGHTS:
        if not isinstance(thoughts := message.get(key, ""), str):
            raise bad_messages(
                f"has {json_type(thoughts)} as {key!r} of message {number}, expected text"
            )
    if message.get("function_call"):
        raise bad_messages(
            f"has a 'function_call' in message {number}, which no chat template writes; write it as tool_calls: "
            "[{type: function, function: {name, arguments}}]"
        )
    if "tool_calls" in message:
        message["tool_calls"] = conversion.tool_calls(message["tool_calls"], number)
        message.setdefault("content", "")
        if not message["tool_calls"]:  # some servers log an empty list, which some templates write
            del message["tool_calls"]
    content = message.get("content")
    if content is None:
        raise bad_messages(f"has no 'content' in message {number} ({role})")
    if not isinstance(content, str | list):
        raise bad_messages(
            f"has {json_type(content)} as 'content' of message {number}, expected text or a list of "
            "{type: text, text: ...}"
        )
    # Templates of text models expect text. Some would write a list as Python prints it.
    text = message["content"] = _joined(content, number)
    is_empty = not text.strip() and role == "assistant" and not message.get("tool_calls")
    if is_empty and not empty_answers:
        raise bad_messages(f"has an empty assistant turn (message {number})")
    checked_text(text, "messages")
    return message


def _joined(content: str | list[Any], number: int) -> str:
    """Return the content of message `number` as text; its parts are `{type: text, text: ...}` or text."""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type", "unknown") if isinstance(part, dict) else json_type(part)
            raise bad_messages(
                f"has a part of type {kind!r} in message {number}; this task reads text only. Remove the part, or "
                "write it as {type: text, text: ...}"
            )
        texts.append(text)
    return "".join(texts)

"""Convert rows in the layouts of other projects: Alpaca's instructions, ShareGPT's messages, OpenAI's tool calls."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from lorakit.errors import nearest
from lorakit.tasks.task import BadRow, Fields, checked_text, json_type, text_field

ALPACA = ("instruction", "output")
"""Fields of an Alpaca row. `input`, and in chats `system` and `history`, are optional."""

PROMPT_COMPLETION = ("prompt", "completion")
"""Fields of a prompt with its completion. In TRL's conversational rows both are lists of messages."""

SENDERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""Role of each sender of ShareGPT's messages. A function call is a turn of the assistant with tool calls."""

_ALPACA_PROMPT = "{intro}\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
_INTRO = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
_INTRO_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request."
)


def is_alpaca(fields: Collection[str]) -> bool:
    """Return whether these fields include those of an Alpaca row."""
    return set(ALPACA) <= set(fields)


def lone_columns(columns: Collection[str]) -> set[str]:
    """Return a prompt without a completion, or the reverse, beside the columns of Alpaca's rows.

    It may be the whole text with the answer, so the task reads it only if `data.columns` names it.
    """
    found = set(columns).intersection(PROMPT_COMPLETION)
    return found if is_alpaca(columns) and len(found) == 1 else set()


def alpaca_prompt(fields: Fields) -> str:
    """Return the prompt of an Alpaca row, as Stanford Alpaca writes it (Taori et al. 2023).

    Raises:
        BadRow: The row has a system text or earlier turns, which this prompt cannot hold.
    """
    for name in ("system", "history"):
        if fields.get(name):
            raise BadRow(
                "is set, and Alpaca's prompt has no place for it. Set data.task to chat, or remove it from the row",
                name,
            )
    instruction, context = text_field(fields, "instruction"), _alpaca_input(fields)
    return _ALPACA_PROMPT.format(
        intro=_INTRO_WITH_INPUT if context else _INTRO,
        instruction=instruction,
        input=f"### Input:\n{context}\n\n" if context else "",
    )


def is_conversational(fields: Fields) -> bool:
    """Return whether prompt and completion are lists of messages, as in TRL's conversational rows."""
    return all(isinstance(fields.get(name), list | tuple) for name in PROMPT_COMPLETION)


def joined_messages(fields: Fields) -> list[Any]:
    """Return prompt and completion, each a list of messages or the text of one, as one conversation.

    The loss includes messages of the completion only.
    """
    prompt, completion = (
        list(fields[name])
        if isinstance(fields[name], list | tuple)
        else [{"role": role, "content": text_field(fields, name)}]
        for name, role in zip(PROMPT_COMPLETION, ("user", "assistant"), strict=True)
    )
    earlier = [{**turn, "weight": 0} if isinstance(turn, dict) else turn for turn in prompt]
    return [*earlier, *completion]


def alpaca_messages(fields: Fields) -> list[dict[str, Any]]:
    """Return the messages of an Alpaca row that its output answers.

    They are the `history`, pairs of a question and an answer, and one user message: instruction, blank line, input.
    """
    context = _alpaca_input(fields)
    question = text_field(fields, "instruction") + (f"\n\n{context}" if context else "")
    history = fields.get("history") or []
    if not isinstance(history, list | tuple) or not all(_is_pair(turn) for turn in history):
        raise BadRow("is not a list of [question, answer]", "history")
    texts = [*(text for turn in history for text in turn), question]
    return [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
    ]


def _is_pair(turn: Any) -> bool:
    is_list = isinstance(turn, list | tuple) and len(turn) == 2
    return is_list and all(isinstance(text, str) for text in turn)


def _alpaca_input(fields: Fields) -> str:
    """Return the input of an Alpaca row; most rows have none, or a blank one."""
    value = fields.get("input")
    is_blank = value is None or (isinstance(value, str) and not value.strip())
    return "" if is_blank else text_field(fields, "input")


def is_sharegpt(message: Any) -> bool:
    """Return whether a message has ShareGPT's keys, `from` and `value`."""
    return isinstance(message, dict) and "from" in message and "role" not in message


def role_and_content(message: dict[str, Any], number: int) -> dict[str, Any]:
    """Return ShareGPT's message `number` as `{role, content, ...}`, a function call as `{role, tool_calls}`."""
    sender = message["from"]
    if not isinstance(sender, str) or sender not in SENDERS:
        raise BadRow(
            f"has the unknown sender {sender!r} in message {number}; senders are {', '.join(SENDERS)}."
            + nearest(str(sender), SENDERS),
            "messages",
        )
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    if sender == "function_call":
        calls = _function_calls(message.get("value"), number)
        return {"role": "assistant", "tool_calls": calls, **rest}
    content = {"content": message["value"]} if "value" in message else {}
    return {"role": SENDERS[sender], **content, **rest}


def _function_calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Return the tool calls of message `number`, whose value is `{name, arguments}` as JSON text, or a list of them."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        raise BadRow(
            f"has a function call in message {number} that is not JSON of {{name, arguments}}, or a list of them",
            "messages",
        )
    return [{"type": "function", "function": call} for call in calls]


def with_system(messages: list[dict[str, Any]], system: Any) -> list[dict[str, Any]]:
    """Return the messages of a row after its `system` text, a field beside them, if it has one."""
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise BadRow(f"is {json_type(system)}, expected text", "system")
    if messages[0]["role"] in ("system", "developer"):
        if messages[0]["content"] == system:
            return messages
        raise BadRow("is set, and the messages start with another system turn; keep one", "system")
    return [{"role": "system", "content": checked_text(system, "system")}, *messages]


def tool_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Return the tool calls of message `number` with their arguments as objects.

    OpenAI's format has JSON text as arguments. Chat templates encode the arguments themselves, so text would be
    encoded twice.
    """
    if not isinstance(calls, list | tuple) or not all(isinstance(call, dict) for call in calls):
        raise BadRow(
            f"has {json_type(calls)} as 'tool_calls' of message {number}, expected a list of "
            "{type: function, function: {name, arguments}}",
            "messages",
        )
    return [_tool_call(call, number) for call in calls]


def _tool_call(call: dict[str, Any], number: int) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _tool_call(call["function"], number)}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        value = json.loads(arguments)
    except ValueError as error:
        value, reason = None, f"is not JSON ({error})"
    else:
        reason = f"is {json_type(value)} as JSON"
    if not isinstance(value, dict):
        raise BadRow(
            f"has a tool call in message {number} whose 'arguments' {reason}; write an object, for example "
            '{"city": "Paris"}',
            "messages",
        )
    return {**call, "arguments": value}


def tools(value: Any) -> list[Any] | None:
    """Return the tools of a row, a list of JSON schemas or that list as JSON text; None without any."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow(
                f"is text but not JSON ({error}); write a list of JSON schemas", "tools"
            ) from None
    if not value or isinstance(value, str):
        return None
    if not isinstance(value, list):
        raise BadRow(f"is {json_type(value)}, expected a list of JSON schemas", "tools")
    return value

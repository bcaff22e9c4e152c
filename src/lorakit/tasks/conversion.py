"""Convert rows in the layouts of other projects: Alpaca's instructions, ShareGPT's messages, OpenAI's tool calls."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from lorakit.tasks.task import BadRow, Fields, json_type, text_field

ALPACA = ("instruction", "output")
"""Fields of an Alpaca row; a third one, `input`, is optional."""

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
}
"""Role of each sender of ShareGPT's messages."""

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


def alpaca_prompt(fields: Fields) -> str:
    """Return the prompt of an Alpaca row, as Stanford Alpaca writes it (Taori et al. 2023)."""
    instruction, context = text_field(fields, "instruction"), _alpaca_input(fields)
    return _ALPACA_PROMPT.format(
        intro=_INTRO_WITH_INPUT if context else _INTRO,
        instruction=instruction,
        input=f"### Input:\n{context}\n\n" if context else "",
    )


def alpaca_messages(fields: Fields) -> list[dict[str, Any]]:
    """Return an Alpaca row as one user message (instruction, blank line, input) and the answer."""
    context = _alpaca_input(fields)
    question = text_field(fields, "instruction") + (f"\n\n{context}" if context else "")
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": text_field(fields, "output")},
    ]


def _alpaca_input(fields: Fields) -> str:
    """Return the input of an Alpaca row; most rows have none, or an empty one."""
    value = fields.get("input")
    return text_field(fields, "input") if value is not None and value != "" else ""


def is_sharegpt(message: Any) -> bool:
    """Return whether a message has ShareGPT's keys, `from` and `value`."""
    return isinstance(message, dict) and "from" in message and "role" not in message


def role_and_content(message: dict[str, Any]) -> dict[str, Any]:
    """Return a ShareGPT message as `{role, content, ...}`. A sender without a role stays, for the error message."""
    sender = message["from"]
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    role = SENDERS.get(sender, sender) if isinstance(sender, str) else sender
    return {"role": role, **({"content": message["value"]} if "value" in message else {}), **rest}


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

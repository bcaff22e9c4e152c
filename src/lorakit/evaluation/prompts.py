"""Prompts of a user: read from a file, and encoded with the token ids that training had before a completion."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorakit import storage
from lorakit.compute.adapter_file import PromptFormat
from lorakit.compute.batching import prompt_input
from lorakit.data.readers import lines_of, reader_for, text_lines
from lorakit.data.rows import Problem, Row
from lorakit.data.templates import Template
from lorakit.errors import DataError
from lorakit.models.loading import Base
from lorakit.tasks import BadRow, Chat, NamedText, Task, conversion
from lorakit.tasks.chat_template import ChatTemplate
from lorakit.tasks.language_modelling import prompt_ids
from lorakit.tasks.messages import checked_messages, without_answer
from lorakit.tasks.task import checked_text


@dataclass(frozen=True)
class PromptRow:
    """A row with `messages`, or with the columns of a named task; and its file and line for error messages."""

    fields: dict[str, Any]
    where: str


Prompt = str | PromptRow
"""A text, or a row that the task formats."""


@dataclass(frozen=True, kw_only=True)
class EncodedPrompts:
    """Prompts as token ids, and how to generate from them."""

    ids: list[list[int]]
    shown: list[Any]
    """Each prompt as it is written to a file: a text, or the messages of a conversation."""
    stop_ids: list[int] = field(default_factory=list)
    """Token ids that end a text, besides eos."""
    is_continuation: bool = False
    """Whether each prompt and the text generated from it are one text; a chat's answer is a text of its own."""
    decoding: Mapping[str, Any] | None = None
    """The task's settings of text generation; None without any."""
    answer: Callable[[str], str] = str
    """Returns the part of a generated text that is the task's answer."""


def read_prompts(
    file: str,
    task: type[Task] | None,
    columns: Mapping[str, str] = MappingProxyType({}),
    template: Template | None = None,
) -> list[Prompt]:
    """Return the prompts of a file: the rows of a format that training reads, or of other files the lines.

    A conversation ends before a last assistant turn, which is the answer. `-` reads lines from standard input.

    Args:
        file: The path.
        task: The task that formats the prompts; None leaves them unchanged.
        columns: Column of a row for each field, where a row has this column.
        template: Renders the prompts of rows without messages.

    Raises:
        DataError: The file cannot be read, has no prompt, or a row is invalid.
    """
    reader = reader_for(Path(file))
    prompts: list[Prompt]
    with storage.reading(file, DataError):
        if reader is not None:
            prompts = [_row_prompt(row, task, columns, template) for row in reader(Path(file))]
        else:
            lines = (
                lines_of(sys.stdin.read().removeprefix("\ufeff"))
                if file == "-"
                else text_lines(Path(file))
            )
            prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"'{file}' contains no prompt. Write one prompt per line.")
    return prompts


def _row_prompt(
    row: Row | Problem,
    task: type[Task] | None,
    columns: Mapping[str, str],
    template: Template | None,
) -> Prompt:
    """Return the prompt of a row, with the words that it has in training before the answer."""
    if isinstance(row, Problem):
        raise DataError(f"{row}.")
    found = {field: row.values[column] for field, column in columns.items() if column in row.values}
    fields = {**row.values, **found}
    is_conversation = "messages" in fields or "conversations" in fields
    if not is_conversation and isinstance(fields.get("prompt"), list):
        fields, is_conversation = {**fields, "messages": fields["prompt"]}, True
    try:
        if template is not None and not is_conversation:
            return checked_text(template.render(fields.__getitem__), "prompt")
        # ultrachat_200k has both columns. Its `prompt` is the first question.
        is_chat = is_conversation and task in (None, Chat)
        is_read = "prompt" in columns or "prompt" not in conversion.lone_columns(fields)
        if isinstance(fields.get("prompt"), str) and is_read and not is_chat:
            text = checked_text(fields["prompt"], "prompt")
            if task is not Chat:
                return text
            fields = {**fields, "messages": [{"role": "user", "content": text}]}
        if task is not None and issubclass(task, NamedText):
            return PromptRow(fields, row.origin)
        if "instruction" in fields and not is_conversation:
            if task is not Chat:
                return conversion.alpaca_prompt(fields)
            fields = {**fields, "messages": conversion.alpaca_messages(fields)}
        messages = without_answer(checked_messages(fields))
        tools = conversion.tools(fields.get("tools"))
        return PromptRow({"messages": messages, "tools": tools}, row.origin)
    except BadRow as error:
        prompt, messages, instruction = (
            repr(columns.get(field, field)) for field in ("prompt", "messages", "instruction")
        )
        needs = f"{prompt} (a string), {messages} (a list of role and content), or {instruction}."
        if template is not None:
            needs = f"the columns of the adapter's prompt_template {template.text!r}. --raw reads whole prompts."
        raise DataError(f"{row.origin}: {error}. A row needs {needs}") from None


def encode_prompts(
    base: Base, prompts: Sequence[Prompt], prompting: PromptFormat, system: str | None = None
) -> EncodedPrompts:
    """Return the token ids of prompts, formatted as `prompting` says. `system` starts each conversation.

    Rows with `messages` are always conversations.

    Raises:
        DataError: A row does not fit the task or the chat template, or the tokenizer has no template.
    """
    tokenizer, task = base.text_tokenizer, prompting.task
    if task is not None and issubclass(task, NamedText):
        # No maximum length: `generate` compares each prompt with the model's context.
        named = task(tokenizer, max_length=sys.maxsize, encoding=prompting.encoding)
        texts = [_task_prompt(named, prompt) for prompt in prompts]
        ids = [named.prompt_ids(text) for text in texts]
        encoded = EncodedPrompts(ids=ids, shown=texts, decoding=named.decoding, answer=named.answer)
    elif task is Chat or any(isinstance(prompt, PromptRow) for prompt in prompts):
        template, is_chat = ChatTemplate(tokenizer), task is Chat
        ids = [_chat_ids(template, prompt, is_chat, system) for prompt in prompts]
        shown = [
            prompt if isinstance(prompt, str) else prompt.fields["messages"] for prompt in prompts
        ]
        encoded = EncodedPrompts(ids=ids, shown=shown, stop_ids=Chat.stop_ids(tokenizer))
    else:
        ids = [prompt_ids(tokenizer, str(prompt)) for prompt in prompts]
        encoded = EncodedPrompts(ids=ids, shown=list(prompts), is_continuation=True)
    encoded.ids[:] = [prompt_input(base.model, tokenizer, prompt) for prompt in ids]
    return encoded


def _task_prompt(task: NamedText, prompt: Prompt) -> str:
    """Format a prompt as the task does in training."""
    if isinstance(prompt, str):
        return task.around(prompt)
    try:
        return task.prompt(prompt.fields)
    except BadRow as error:
        raise DataError(
            f"{prompt.where}: {error}. A row needs the columns of task {task.name} "
            f"({' or '.join(' + '.join(layout) for layout in task.layouts)}), or 'prompt', its context as a string."
        ) from None


def _chat_ids(
    template: ChatTemplate, prompt: Prompt, is_chat: bool, system: str | None
) -> list[int]:
    """Return the token ids of messages in the chat template; of a text unchanged, or with `is_chat` as a message."""
    if isinstance(prompt, str):
        if not is_chat:
            return prompt_ids(template.tokenizer, prompt)
        prompt = PromptRow(
            {"messages": [{"role": "user", "content": prompt}]}, f"prompt {prompt!r:.40}"
        )
    messages, tools = prompt.fields["messages"], prompt.fields.get("tools")
    try:
        messages = template.prepared(conversion.with_system(messages, system), tools)
        return template.ids(messages, tools, answer=True)
    except BadRow as error:
        raise DataError(f"{prompt.where}: {error}.") from None

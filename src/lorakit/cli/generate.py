"""`lorakit generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import storage
from lorakit.cli.parsing import parse
from lorakit.data.readers import lines_of
from lorakit.errors import ConfigurationError, DataError
from lorakit.evaluation.decoding import Decoding
from lorakit.models.base_config import BaseConfig
from lorakit.tasks import BadRow, NamedText
from lorakit.tasks.chat import checked_messages
from lorakit.tasks.chat import prompt_ids as chat_prompt_ids
from lorakit.tasks.language_modelling import prompt_ids
from lorakit.tasks.task import checked_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Options of `lorakit generate`."""

    base: BaseConfig | None = None
    """The base model. Default: the base recorded in the adapter."""
    adapter: str | None = None
    """Adapter folder. Omit to use the base model."""
    allow_other_base: bool = False
    """Allow a base other than the one recorded in the adapter."""
    method: str | None = None
    """Custom method of the adapter: path/to/file.py:Class."""
    prompt: str | None = None
    """The prompt."""
    file: str | None = None
    """A file of prompts: one per line, or .jsonl with `prompt` or `messages` in each row. `-` reads standard
    input."""
    task: str | None = None
    """Named task of the prompts. Formats them as in training; rows of a file may have the task's columns instead of
    `prompt`. Default: the adapter's task. completion leaves prompts unchanged."""
    encoding: str | None = None
    """The task's encoding, paper or prompt. Default: the adapter's, else the task's first."""
    chat: bool = False
    """Format each prompt as a user message with the tokenizer's chat template."""
    output: str | None = None
    """Write prompts and outputs to this .jsonl file instead of printing them."""
    overwrite: bool = False
    """Replace an existing output file."""
    decoding: Decoding = field(default_factory=Decoding)
    """Greedy, sampling or beam search. Unset fields take the named task's values (E2E: 10 beams)."""

    def __post_init__(self) -> None:
        if self.chat and (self.task or self.encoding):
            raise ConfigurationError(
                "chat and task exclude each other: both set the prompt format. Remove one of them."
            )
        if (self.prompt is None) == (self.file is None):
            raise ConfigurationError("Set either prompt (--prompt TEXT) or file (--file PATH).")


CONFIGS = (GenerateConfig,)


def run(argv: Sequence[str]) -> None:
    """Generate text, then print it or write it to the output file."""
    config = parse(
        GenerateConfig, "generate", "Generate text with a base model or an adapter.", argv
    )
    from lorakit.compute.adapted import AdapterFile, PromptFormat, open_adapted, prompt_format
    from lorakit.evaluation.generate import generate
    from lorakit.methods.registry import use_method

    if config.method is not None:
        use_method(config.method)
    if config.output:
        storage.require_free_file(config.output, overwrite=config.overwrite)
    adapter = AdapterFile.read(config.adapter)
    prompting = PromptFormat()
    if not config.chat:
        prompting = prompt_format(adapter, config.task, config.encoding)
    prompts = _prompts(config, prompting.task)  # before the base, which takes longer to load
    if prompting.note:
        print(f"note: {prompting.note}", file=sys.stderr)
    base = open_adapted(config.base, adapter, allow_other_base=config.allow_other_base)
    tokenizer = base.tokenizer
    assert tokenizer is not None  # open_adapted rejects a base without a tokenizer
    if prompting.task is not None:
        # No maximum length: `generate` compares each prompt with the model's context.
        task = prompting.task(tokenizer, max_length=sys.maxsize, encoding=prompting.encoding)
        prompts = [_task_prompt(task, prompt) for prompt in prompts]
        ids = [task.prompt_ids(str(prompt)) for prompt in prompts]
        decoding = config.decoding.over(task.decoding)
        texts = [task.answer(t) for t in generate(base.model, tokenizer, ids, decoding)]
    else:
        ids = [_encode(tokenizer, prompt, config.chat) for prompt in prompts]  # type: ignore[arg-type]
        texts = generate(base.model, tokenizer, ids, config.decoding)
    if config.output:
        with (
            storage.atomic_file(config.output) as temporary,
            temporary.open("w", encoding="utf-8") as file,
        ):
            for prompt, text in zip(prompts, texts, strict=True):
                file.write(
                    json.dumps({"prompt": prompt, "output": text}, ensure_ascii=False) + "\n"
                )
        print(f"{len(texts)} outputs in {config.output}", file=sys.stderr)
        return
    for text in texts:
        print(text)


@dataclass(frozen=True)
class _TaskRow:
    """A row with the columns of a task, and its file and line for error messages."""

    fields: dict[str, Any]
    where: str


Prompt = str | list[dict[str, Any]] | _TaskRow
"""A text, the messages of a chat, or a row that the task formats."""


def _prompts(config: GenerateConfig, task: type[NamedText] | None) -> list[Prompt]:
    """Read the prompts from the options or their file; rows of a .jsonl file may have the columns of `task`."""
    if config.prompt is not None:
        return [config.prompt]
    assert config.file is not None
    with storage.reading(config.file, DataError):
        text = sys.stdin.read() if config.file == "-" else Path(config.file).read_text("utf-8")
    lines = [(n, line) for n, line in enumerate(lines_of(text), 1) if line.strip()]
    if not lines:
        raise DataError(f"'{config.file}' contains no prompt. Write one prompt per line.")
    if not config.file.endswith(".jsonl"):
        return [line for _, line in lines]
    return [_row_prompt(line, f"{config.file}:{n}", task) for n, line in lines]


def _row_prompt(line: str, where: str, task: type[NamedText] | None) -> Prompt:
    """Return the prompt of one line of a .jsonl file; `where` is its file and line, for messages."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg}). Write one JSON object per line."
        ) from None
    row = row if isinstance(row, dict) else {}
    try:
        if isinstance(row.get("prompt"), str):
            return checked_text(row["prompt"], "prompt")
        if task is not None:
            return _TaskRow(row, where)
        return checked_messages(row)
    except BadRow as error:
        raise DataError(
            f"{where}: {error}. A row needs 'prompt' (a string) or 'messages' (a list of role and content)."
        ) from None


def _task_prompt(task: NamedText, prompt: Prompt) -> str:
    """Format a prompt as the task does in training."""
    if isinstance(prompt, str):
        return task.around(prompt)
    assert isinstance(prompt, _TaskRow)
    try:
        return task.prompt(prompt.fields)
    except BadRow as error:
        raise DataError(
            f"{prompt.where}: {error}. A row needs the columns of task {task.name} "
            f"({' or '.join(' + '.join(layout) for layout in task.layouts)}), or 'prompt', its context as a string."
        ) from None


def _encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, Any]], chat: bool
) -> list[int]:
    """Return the token ids of a text as it is, or of messages in the chat template; `chat` makes a text a message."""
    if isinstance(prompt, str) and not chat:
        return prompt_ids(tokenizer, prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return chat_prompt_ids(tokenizer, messages)

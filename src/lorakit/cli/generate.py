"""`lorakit generate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit import storage
from lorakit.cli.parsing import parse
from lorakit.compute.adapted_config import AdaptedConfig
from lorakit.configuration import LocalPath
from lorakit.errors import ConfigurationError, require_suffix
from lorakit.evaluation.decoding import Decoding
from lorakit.formatting import visible

if TYPE_CHECKING:
    from lorakit.evaluation.prompts import Prompt
    from lorakit.tasks import Task


@dataclass(frozen=True, kw_only=True)
class PromptDataConfig:
    """What the prompts are."""

    task: str = "auto"
    """Named task of the prompts, or chat. Formats them as in training; rows of a file may have the task's columns
    instead of `prompt`. auto is the adapter's task."""
    encoding: str | None = None
    """Text format of a named task: paper or prompt. Default: the adapter's, else the task's first."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AdaptedConfig):
    """Options of `lorakit generate`."""

    adapter: LocalPath | None = None
    """Adapter folder. Omit to use the base model."""
    prompt: str | None = None
    """The prompt."""
    file: LocalPath | None = None
    """A file of prompts: one per line, or .jsonl, .json, .csv, .tsv or .parquet with `prompt`, `messages` or Alpaca's
    `instruction` in each row, or the columns that the adapter was trained on. A last assistant turn is the answer, and
    is left out. `-` reads standard input."""
    data: PromptDataConfig = field(default_factory=PromptDataConfig)
    """The task and the text format of the prompts."""
    chat: bool = False
    """Format each prompt as a user message with the tokenizer's chat template. Default: as in training."""
    raw: bool = False
    """Use prompts unchanged, whatever the adapter's task."""
    system: str | None = None
    """Text of a system turn at the start of each conversation. If the chat template has no system role, it starts the
    first user message."""
    output: LocalPath | None = None
    """Write prompts and outputs to this .jsonl file instead of printing them."""
    overwrite: bool = False
    """Replace an existing output file."""
    decoding: Decoding = field(default_factory=Decoding)
    """Greedy, sampling or beam search. Unset fields take the named task's values (E2E: 10 beams)."""

    def __post_init__(self) -> None:
        chosen = {"chat": self.chat, "raw": self.raw, "data.task": self.data != PromptDataConfig()}
        formats = [name for name, on in chosen.items() if on]
        if len(formats) > 1:
            raise ConfigurationError(
                f"{' and '.join(formats)} exclude each other: each sets the prompt format. Keep one of them."
            )
        if (self.prompt is None) == (self.file is None):
            raise ConfigurationError("Set either prompt (--prompt TEXT) or file (--file PATH).")
        require_suffix("output", self.output, ".jsonl")
        super().__post_init__()  # may import PyTorch


CONFIGS = (GenerateConfig,)


def run(argv: Sequence[str]) -> None:
    """Generate text, then print it or write it to the output file."""
    config = parse(
        GenerateConfig,
        "generate",
        "Generate text with a base model or an adapter.",
        argv,
        unused=lambda typed, _: ["data"] if {"chat", "raw"} & typed.keys() else [],
    )
    if config.output:  # before the imports of PyTorch, which take seconds
        storage.require_free_file(config.output, overwrite=config.overwrite)
    from lorakit.cli.console import ProgressLine
    from lorakit.compute.adapted import open_adapted
    from lorakit.compute.adapter_file import AdapterFile, prompt_format, recorded_data, text_task
    from lorakit.data.readers import reader_for
    from lorakit.data.templates import Template
    from lorakit.evaluation.generate import generate
    from lorakit.evaluation.prompts import encode_prompts, read_prompts
    from lorakit.tasks import Chat, Completion
    from lorakit.tasks.chat_template import ChatTemplate

    adapter = AdapterFile.read(config.adapter)
    text_task(adapter)  # rejects an adapter that generates no text
    named = None if config.data.task == "auto" else config.data.task
    task = Chat.name if config.chat else Completion.name if config.raw else named
    prompting = prompt_format(adapter, task, config.data.encoding)
    data = recorded_data(adapter, named)
    is_recorded = named in (None, data.task) and not (config.chat or config.raw)
    columns = data.columns if is_recorded else {}
    template = data.prompt_template if is_recorded and prompting.task is None else None
    # Read the prompts before the base, which takes longer to load.
    if config.prompt is not None:
        prompts: list[Prompt] = [config.prompt]
    else:
        rendered = Template(template) if template else None
        prompts = read_prompts(str(config.file), prompting.task, columns, rendered)
    if template and (config.file is None or reader_for(Path(config.file)) is None):
        _note(
            f"the adapter {config.adapter} was trained with the prompt_template {template!r}, and prompts are used "
            "unchanged. Write whole prompts in this form, or name a file of rows: --file."
        )
    _check_conversations(config, prompting.task, prompts)
    if prompting.note:
        _note(prompting.note)
    base = open_adapted(config.base, adapter, allow_other_base=config.allow_other_base)
    tokenizer = base.text_tokenizer
    is_undecided = task is None and adapter is None and isinstance(prompts[0], str)
    if is_undecided and tokenizer.chat_template:
        _note("prompts are used unchanged; --chat formats them with the chat template.")
    if config.system and not ChatTemplate(tokenizer).has_system_role:
        _note(
            "the chat template has no system role; the system text starts the first user message."
        )
    encoded = encode_prompts(base, prompts, prompting, config.system)
    decoding = config.decoding.over(encoded.decoding)
    line = ProgressLine() if config.file else None
    texts = generate(
        base.model,
        tokenizer,
        encoded.ids,
        decoding,
        progress=line and (lambda done: line("prompts answered", done, len(encoded.ids))),
        stop_ids=encoded.stop_ids,
        is_continuation=encoded.is_continuation,
    )
    texts = [encoded.answer(text) for text in texts]
    if config.output:
        answered = zip(encoded.shown, texts, strict=True)
        storage.write_rows(
            config.output,
            ({"prompt": prompt, "output": text} for prompt, text in answered),
            overwrite=config.overwrite,
        )
        print(f"{len(texts)} outputs in {config.output}", file=sys.stderr)
        return
    for text in texts:
        print(text)


def _check_conversations(
    config: GenerateConfig, task: type[Task] | None, prompts: Sequence[Prompt]
) -> None:
    """Raise a ConfigurationError for `raw` with messages, and for `system` without the chat template."""
    if config.raw and any(not isinstance(prompt, str) for prompt in prompts):
        raise ConfigurationError(
            f"raw uses prompts unchanged, but '{config.file}' has 'messages', which need the chat template. Remove "
            "--raw."
        )
    is_text = task is None and any(isinstance(prompt, str) for prompt in prompts)
    if config.system and (is_text or (task is not None and task.name != "chat")):
        raise ConfigurationError(
            "system is a turn of the chat template, but these prompts do not use it. Set --chat, or remove "
            "--system."
        )


def _note(text: str) -> None:
    print(visible(f"note: {text}"), file=sys.stderr)

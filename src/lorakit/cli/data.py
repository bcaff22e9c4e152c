"""`lorakit data`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from lorakit.data.data_config import DataConfig
from lorakit.errors import require_at_least
from lorakit.models.base_config import BaseConfig

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.data.preview import Preview, SplitPreview

BAR = 40
"""Width of the longest bar of the length histogram."""


@dataclass(frozen=True, kw_only=True)
class DataCommandConfig:
    """What `lorakit data` previews."""

    base: BaseConfig
    """The base model, whose tokenizer reads the data."""
    data: DataConfig
    """The data."""
    examples: int = 3
    """Examples shown token by token."""
    json: bool = False
    """Print JSON for programs."""

    def __post_init__(self) -> None:
        require_at_least("examples", self.examples, 0)


def run(argv: Sequence[str]) -> None:
    """Show examples, lengths, labels and duplicates."""
    from lorakit.cli.console import console
    from lorakit.cli.parsing import parse
    from lorakit.data import preview
    from lorakit.models.loading import load_tokenizer

    config = parse(
        DataCommandConfig,
        "data",
        "Preview a data set as the model will see it: tokens, which of them carry loss, truncation, lengths, "
        "labels, and duplicates between training and evaluation.",
        argv,
    )
    tokenizer = load_tokenizer(
        config.base.name,
        revision=config.base.revision,
        trust_remote_code=config.base.trust_remote_code,
    )
    found = preview(config.data, tokenizer, config.examples)
    if config.json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        _print(console(), found)


def _print(console: Console, found: Preview) -> None:
    labels = f", labels {', '.join(found.labels)}" if found.labels else ""
    console.print(f"[bold]task[/bold] {found.task}{escape(labels)}")
    for example in found.examples:
        console.print(f"\n[dim]{escape(example.origin)}, {len(example.tokens)} tokens[/dim]")
        console.print(_marked(example))
        if example.label is not None:
            console.print(f"label: {example.label}", markup=False)
    if found.examples and found.examples[0].label is None:
        console.print("\n[dim]Tokens on green carry loss; a dot parts two tokens.[/dim]")
    for name, split in found.splits.items():
        _print_split(console, name, split)
    for overlap in found.overlaps:
        console.print(
            f"\n{overlap.prompts:,} examples of {overlap.second} have a prompt that stands in {overlap.first}, "
            f"{overlap.examples:,} of them with the same completion."
        )
    for note in found.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}")


def _marked(example: Any) -> Any:
    from rich.text import Text

    text = Text()
    for i, token in enumerate(example.tokens):
        if i:
            text.append("·", style="dim")
        text.append(token.text, style="black on green" if token.target else "")
    return text


def _print_split(console: Console, name: str, split: SplitPreview) -> None:
    console.print(f"\n[bold]{name}[/bold]  {escape(str(split.report))}")
    lengths = split.lengths
    console.print(
        f"tokens: {lengths.total:,} in all, half of the examples up to {lengths.p50}, nine in ten up to "
        f"{lengths.p90}, the longest {lengths.max}"
        + ("" if split.targets is None else f"; {split.targets:,} carry loss")
    )
    most = max((count for *_, count in lengths.histogram), default=1)
    for low, high, count in lengths.histogram:
        console.print(f"  {low:>5} to {high:<5} {'█' * round(BAR * count / most)} {count:,}")
    for label, count in split.labels.items():
        console.print(f"  label {label}: {count:,}", markup=False)
    if split.scores is not None:
        console.print("  score: least {:g}, mean {:.3g}, greatest {:g}".format(*split.scores))
    if split.repeated_examples or split.repeated_prompts:
        console.print(
            f"repeated: {split.repeated_prompts:,} prompts, {split.repeated_examples:,} whole examples; "
            f"{split.shared_prompts:.0%} of the examples share their prompt with another"
        )

"""`lorakit data`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from rich.markup import escape

from lorakit.cli.parsing import parse
from lorakit.data.data_config import DataConfig
from lorakit.errors import require_at_least
from lorakit.formatting import visible
from lorakit.models.base_config import BaseConfig

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from lorakit.data.preview import Preview, PreviewExample, SplitPreview

BAR = 40
"""Width of the longest bar of the length histogram, in characters."""


@dataclass(frozen=True, kw_only=True)
class DataCommandConfig:
    """Options of `lorakit data`."""

    base: BaseConfig
    """The base model, whose tokenizer encodes the data."""
    data: DataConfig
    """The data set to preview."""
    examples: int = 3
    """Number of examples to show token by token."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        require_at_least("examples", self.examples, 0)


CONFIGS = (DataCommandConfig,)


def run(argv: Sequence[str]) -> None:
    """Print examples, lengths, labels and duplicates."""
    config = parse(
        DataCommandConfig,
        "data",
        "Preview a data set as the model reads it: tokens, loss mask, truncation, lengths, labels, and "
        "duplicates between training and evaluation.",
        argv,
    )
    from lorakit.cli.console import console, print_json
    from lorakit.compute.base import is_encoder_decoder, read_text_tokenizer
    from lorakit.data import preview

    summary = preview(
        config.data,
        read_text_tokenizer(config.base),
        config.examples,
        is_encoder_decoder=is_encoder_decoder(config.base),
    )
    if config.json:
        print_json(summary.to_dict())
    else:
        _print(console(), summary)


def _print(console: Console, preview: Preview) -> None:
    labels = f", labels {', '.join(preview.labels)}" if preview.labels else ""
    console.print(f"[bold]task[/bold] {preview.task}: {escape(visible(preview.format + labels))}")
    in_colour = console.color_system is not None and not console.no_color
    for example in preview.examples:
        console.print(f"\n[dim]{escape(example.origin)}, {len(example.tokens)} tokens[/dim]")
        console.print(_marked(example, in_colour=in_colour))
        if example.label is not None:
            console.print(f"label: {example.label}", markup=False)
    if preview.examples and preview.examples[0].label is None:
        marked = "Green tokens" if in_colour else "Tokens between [[ and ]]"
        console.print(
            f"\n[dim]{escape(marked)} contribute to the loss; dots separate tokens.[/dim]"
        )
    for name, split in preview.splits.items():
        _print_split(console, name, split)
    for overlap in preview.overlaps:
        console.print(
            f"\n{overlap.prompts:,} examples of {overlap.second} share their prompt with {overlap.first}, "
            f"{overlap.examples:,} of them with the same completion."
        )
    for note in preview.notes:
        console.print(f"[yellow]note:[/yellow] {escape(note)}")


def _marked(example: PreviewExample, *, in_colour: bool) -> Text:
    """Return the tokens of an example: targets on green, or without colours between [[ and ]]."""
    from rich.text import Text

    dot, runs = Text("·", style="dim"), []
    for target, tokens in groupby(example.tokens, key=lambda token: token.target):
        style = "black on green" if target and in_colour else ""
        run = dot.join(Text(visible(token.text, keep="\n\t"), style) for token in tokens)
        runs.append(Text("[[") + run + "]]" if target and not in_colour else run)
    return dot.join(runs)


def _print_split(console: Console, name: str, split: SplitPreview) -> None:
    console.print(f"\n[bold]{name}[/bold]  {escape(str(split.report))}")
    lengths = split.lengths
    console.print(
        f"tokens: {lengths.total:,} in total; per example median {lengths.p50}, 90th percentile {lengths.p90}, "
        f"maximum {lengths.max}"
        + ("" if split.targets is None else f"; {split.targets:,} contribute to the loss")
    )
    most = max((count for *_, count in lengths.histogram), default=1)
    for low, high, count in lengths.histogram:
        console.print(f"  {low:>5} to {high:<5} {'█' * round(BAR * count / most)} {count:,}")
    for label, count in split.labels.items():
        console.print(f"  label {visible(label)}: {count:,}", markup=False)
    if split.scores is not None:
        console.print("  score: minimum {:g}, mean {:.3g}, maximum {:g}".format(*split.scores))
    if split.repeated_examples or split.repeated_prompts:
        console.print(
            f"repeated: {split.repeated_prompts:,} prompts, {split.repeated_examples:,} whole examples; "
            f"{split.shared_prompts:.0%} of the examples share their prompt with another example"
        )

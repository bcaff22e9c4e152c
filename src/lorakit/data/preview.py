"""Preview a data set as the model sees it: tokens and targets, lengths, labels, duplicates."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lorakit.data.data_config import DataConfig, Split
from lorakit.data.examples import ExampleSet, RowReader, load_examples
from lorakit.data.report import Report
from lorakit.data.templates import Template
from lorakit.errors import DataError
from lorakit.tasks import Example, LabelledExample, LanguageExample
from lorakit.tasks.language_modelling import continuation_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Token:
    """One token of an example."""

    id: int
    text: str
    target: bool
    """Whether the loss includes it."""


@dataclass(frozen=True)
class PreviewExample:
    """One example, token by token."""

    origin: str
    tokens: list[Token]
    prompt: str
    completion: str
    label: int | float | None
    """Class index or score; None for language modelling."""
    truncated: bool


@dataclass(frozen=True)
class Lengths:
    """Distribution of the number of tokens."""

    p50: int
    p90: int
    max: int
    total: int
    histogram: list[tuple[int, int, int]]
    """Bins of equal width as (minimum length, maximum length, examples)."""


@dataclass(frozen=True)
class SplitPreview:
    """Statistics of one split."""

    report: Report
    lengths: Lengths
    targets: int | None
    """Number of tokens in the loss; None for classification and regression."""
    labels: dict[str, int]
    """Examples of each class; empty without classes."""
    scores: tuple[float, float, float] | None
    """Minimum, mean and maximum score; None without scores."""
    repeated_prompts: int
    """Examples with the prompt of an earlier example."""
    repeated_examples: int
    """Examples with the prompt and completion of an earlier example."""
    shared_prompts: float
    """Fraction of the examples that share their prompt with another example."""


@dataclass(frozen=True)
class Overlap:
    """Examples that two splits share. They inflate scores on the second split."""

    first: str
    second: str
    prompts: int
    """Examples of the second split whose prompt the first split has."""
    examples: int
    """Examples of the second split whose prompt and completion the first split has."""


@dataclass(frozen=True)
class Preview:
    """The output of `lorakit data`."""

    task: str
    format: str
    """Format of the rows in a few words."""
    labels: tuple[str, ...]
    splits: dict[str, SplitPreview]
    examples: list[PreviewExample]
    """The first examples of the training set, or without one of the next split."""
    overlaps: list[Overlap]
    notes: list[str] = field(default_factory=list)
    """Warnings about likely mistakes."""

    def to_dict(self) -> dict[str, Any]:
        """Return the preview as JSON-able values."""
        return dataclasses.asdict(self)


def preview(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    n: int = 3,
    *,
    is_encoder_decoder: bool = False,
) -> Preview:
    """Return the first `n` examples token by token, and statistics of every configured split.

    Rows that would stop a training run do not stop the preview. The reports and a note list them.

    Raises:
        DataError: The data is missing or empty, its columns fit no task, or no row is valid.
    """
    lenient = dataclasses.replace(
        config, bad_rows="skip", too_long="skip" if config.too_long == "stop" else config.too_long
    )
    reader = RowReader()
    sets: dict[Split, ExampleSet] = {
        split: load_examples(
            lenient, split, tokenizer, reader=reader, is_encoder_decoder=is_encoder_decoder
        )
        for split in SPLITS
        if config.source(split) is not None
    }
    if not sets:
        raise DataError("the configuration has no data; set data.train")
    first, examples = next(iter(sets.items()))
    return Preview(
        task=examples.task,
        format=examples.format,
        labels=examples.labels,
        splits={str(split): _split_preview(split_set) for split, split_set in sets.items()},
        examples=[_preview_example(example, tokenizer) for example in examples.examples[:n]],
        overlaps=[_overlap(one, other, sets) for one, other in combinations(sets, 2)],
        notes=list(_notes(config, tokenizer, sets, first)),
    )


def _preview_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> PreviewExample:
    ids = example.input_ids
    mask = example.loss_mask if isinstance(example, LanguageExample) else [False] * len(example)
    return PreviewExample(
        origin=example.origin,
        tokens=[
            Token(id=token, text=_token_text(tokenizer, ids[:i][-1:], token), target=target)
            for i, (token, target) in enumerate(zip(ids, mask, strict=True))
        ],
        prompt=example.prompt,
        completion=example.completion,
        label=example.label if isinstance(example, LabelledExample) else None,
        truncated=example.truncated,
    )


def _token_text(tokenizer: PreTrainedTokenizerBase, before: list[int], token: int) -> str:
    text = continuation_text(tokenizer, before, [token], special=True)
    # A token may be part of a character. Then its vocabulary entry says more than a replacement character.
    is_part = not text or "\N{REPLACEMENT CHARACTER}" in text
    return str(tokenizer.convert_ids_to_tokens(token)) if is_part else text


def _split_preview(examples: ExampleSet) -> SplitPreview:
    prompts = Counter(example.key for example in examples)
    pairs = {(example.key, example.completion) for example in examples}
    masks = [example.loss_mask for example in examples if isinstance(example, LanguageExample)]
    labelled = [example for example in examples if isinstance(example, LabelledExample)]
    counts = Counter(example.completion for example in labelled) if examples.labels else Counter()
    scores = [float(example.label) for example in labelled] if not examples.labels else []
    shared = sum(count for count in prompts.values() if count > 1)
    return SplitPreview(
        report=examples.report,
        lengths=_lengths(examples.lengths),
        targets=sum(map(sum, masks)) if masks else None,
        labels={label: counts[label] for label in examples.labels},
        scores=(min(scores), math.fsum(scores) / len(scores), max(scores)) if scores else None,
        repeated_prompts=len(examples) - len(prompts),
        repeated_examples=len(examples) - len(pairs),
        shared_prompts=shared / len(examples),
    )


def _lengths(lengths: Sequence[int]) -> Lengths:
    bins = 12
    ordered = sorted(lengths)
    shortest, longest = ordered[0], ordered[-1]
    width = (longest - shortest) // bins + 1
    counts = Counter((length - shortest) // width for length in ordered)

    def percentile(share: float) -> int:
        return ordered[math.ceil(share * len(ordered)) - 1]

    return Lengths(
        p50=percentile(0.5),
        p90=percentile(0.9),
        max=longest,
        total=sum(ordered),
        histogram=[
            (shortest + i * width, shortest + (i + 1) * width - 1, counts[i])
            for i in range(max(counts) + 1)
        ],
    )


def _overlap(first: Split, second: Split, sets: dict[Split, ExampleSet]) -> Overlap:
    prompts = {example.key for example in sets[first]}
    pairs = {(example.key, example.completion) for example in sets[first]}
    return Overlap(
        first=first,
        second=second,
        prompts=sum(example.key in prompts for example in sets[second]),
        examples=sum((example.key, example.completion) in pairs for example in sets[second]),
    )


def _notes(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    sets: dict[Split, ExampleSet],
    first: Split,
) -> Iterator[str]:
    for split, examples in sets.items():
        report = examples.report
        if report.bad and config.bad_rows == "stop":
            yield (
                f"training would stop at {len(report.bad):,} bad rows of {split}: fix them or set "
                "data.bad_rows to skip (--data.bad_rows skip)"
            )
        if report.too_long and config.too_long == "stop":
            yield (
                f"training would stop at {len(report.too_long):,} rows of {split} above max_length "
                f"{config.max_length:,}: raise data.max_length, or set data.too_long to skip or truncate "
                "(--data.too_long truncate)"
            )
    yield from config.template_notes
    if (text := config.prompt_template) and not Template(text).fields:
        yield (
            "prompt_template contains no column, so all rows have the same prompt: write the name of a column in "
            "braces, for example {prompt}"
        )
    language = [example for example in sets[first] if isinstance(example, LanguageExample)]
    if spaced := sum(example.prompt.endswith(" ") for example in language if example.completion):
        yield (
            f"{spaced:,} prompts of {first} end in a space, which most tokenizers merge with the next word: "
            "start the completion with the space instead"
        )
    for special, count in _special_in_targets(language, tokenizer).items():
        yield (
            f"{count:,} examples of {first} have {special} inside a text with loss, and the tokenizer encodes it as a "
            "special token: remove it if the model must not write it there"
        )


def _special_in_targets(
    examples: Sequence[LanguageExample], tokenizer: PreTrainedTokenizerBase
) -> Counter[str]:
    """Return in how many examples each special token is a target that is not the last one of its turn.

    Chat templates write special tokens into turns too (channels, tool calls). These count only if they are in the text
    or end turns.
    """
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    added = tokenizer.added_tokens_decoder.items()
    special |= {i: str(token) for i, token in added if token.special}
    inside: list[set[int]] = []
    ends: set[int] = set()
    for example in examples:
        ids, followed = example.input_ids, [*example.loss_mask[1:], False]
        at = [i for i, target in enumerate(example.loss_mask) if target and ids[i] in special]
        inside.append({ids[i] for i in at if followed[i]})
        ends |= {ids[i] for i in at if not followed[i]}
    return Counter(
        special[token]
        for example, tokens in zip(examples, inside, strict=True)
        for token in sorted(tokens)
        if token in ends
        or token == tokenizer.eos_token_id
        or special[token] in (example.completion or example.prompt)
    )

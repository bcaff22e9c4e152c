"""The batches of a run, of which a plan simulates the largest and a mean one, from its data or from lengths."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from lorakit.compute.base import is_encoder_decoder, read_text_tokenizer
from lorakit.compute.batch_size import BatchSize
from lorakit.compute.batching import PACKED_STEP, padded_step
from lorakit.data import DataTask, RowReader, load_examples, task_class_of, task_of
from lorakit.data.packing import shared_once
from lorakit.errors import ConfigurationError
from lorakit.ops.rows import round_up
from lorakit.tasks import Example, Labelled, LabelledExample, LanguageExample
from lorakit.training.config import TrainConfig
from lorakit.training.schedule import Share
from lorakit.training.setup import step_plan_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 2000
"""Number of rows to read: enough for the distribution of lengths, and quick to read."""

GROUPED_ROWS = 50_000
"""Number of rows to read for `sampling: grouped`: rows with the same prompt may be far apart."""


@dataclass(frozen=True)
class Batches:
    """The batches of a run, of which a plan simulates two."""

    task: DataTask
    batches: list[list[Example]]
    """Examples of each batch of an epoch."""
    source: str
    """Where the lengths come from, as a phrase."""
    steps: int | None
    """Optimizer steps of the run; None if the number of examples is unknown."""
    per_step: int
    """Batches that a process computes in an optimizer step; fewer if the data set is smaller than one step."""
    tokens: int
    """Tokens of the examples of an optimizer step, over all processes, without sharing prefixes."""
    tokenizer: PreTrainedTokenizerBase | None = None
    longest: list[Example] = field(default_factory=list)
    """The longest examples in one batch: no later one is larger. Empty if the run has no other batches than `batches`,
    and for `sampling: grouped`, whose later batches may be larger than `batches` but are far smaller than this one."""
    kept_tokens: int = 0
    """Tokens of the training examples that stay in memory, also those held out, of the rows that were read."""

    def fullest_and_middle(self, *, packed: bool) -> tuple[list[Example], list[Example], float]:
        """Return the batch with the most tokens, or the longest examples, and the batch nearest to the mean.

        Sizes are those of packed or padded batches. The third value is their mean as a multiple of the middle batch's.
        Sizes are skewed to the right in most data, so the time of a run is that of mean batches, not of median ones.
        """

        def size(batch: list[Example]) -> tuple[int, int]:
            padded = max(map(len, batch)) * len(batch)
            return shared_once(batch) if packed else padded, sum(map(len, batch))

        sizes = [size(batch)[0] for batch in self.batches]
        mean = fmean(sizes)
        middle = min(range(len(sizes)), key=lambda n: abs(sizes[n] - mean))
        candidates = [*self.batches, self.longest] if self.longest else self.batches
        return max(candidates, key=size), self.batches[middle], mean / sizes[middle]

    def sizes(self, *, packed: bool, is_encoder_decoder: bool) -> int:
        """Return the number of different shapes of batches, as `lorakit.compute.batching.collator` makes them.

        A shape is the rounded number of tokens, packed; else the rows, and the rounded width, or both widths of an
        encoder-decoder, which are not rounded.
        """

        def shape(batch: list[Example]) -> tuple[int, ...]:
            if packed:
                return (round_up(shared_once(batch), PACKED_STEP),)
            texts = [e for e in batch if isinstance(e, LanguageExample)]
            if is_encoder_decoder and texts:
                answers = (len(e) - e.prompt_length for e in texts)
                return len(texts), max(e.prompt_length for e in texts), max(answers)
            longest = max(map(len, batch))
            return len(batch), round_up(longest, padded_step(longest))

        return len(set(map(shape, self.batches)))


def from_data(config: TrainConfig, processes: int = 1) -> Batches:
    """Read the first rows of the training data and batch them as training on `processes` does.

    Raises:
        LorakitError: The data or the tokenizer cannot be read.
    """
    most = GROUPED_ROWS if config.sampling == "grouped" else ROWS
    limit = min(config.data.limit or most, most)
    reader = RowReader()
    first = dataclasses.replace(config.data, limit=limit)
    is_labelled = issubclass(task_class_of(first, reader=reader), Labelled)
    # A label may occur in the last row only.
    task = task_of(config.data if is_labelled else first, reader=reader)
    tokenizer = read_text_tokenizer(config.base)
    data = dataclasses.replace(first, task=task.name)
    train = load_examples(
        data,
        "train",
        tokenizer,
        labels=task.labels,
        reader=reader,
        is_encoder_decoder=is_encoder_decoder(config.base),
    )
    plan = step_plan_of(config, train)
    first_epoch = list(itertools.islice(plan.steps(), plan.steps_per_epoch))
    shares = Share(
        train, batch_size=BatchSize(config.batch_size), count=processes, packed=config.packing
    )
    computed = [share for step in first_epoch for share in shares.of_all(step)]
    batches = [[train.examples[i] for i in batch] for share in computed for batch in share]
    whole = train.report.rows < limit or config.data.limit == limit
    longest = []
    if config.sampling != "grouped" and not (whole and plan.total <= plan.steps_per_epoch):
        # Every epoch sorts other examples together, and later rows have other lengths.
        longest = heapq.nlargest(max(map(len, batches)), train.examples, key=len)
    lengths, report = sorted(train.lengths), train.report
    others = "" if is_labelled else "; memory excludes those of the others"
    part = "" if whole else f" (from the first rows{others})"
    source = (
        f"{report.source}, {len(train):,} examples{part}: "
        f"{lengths[0]:,} to {lengths[-1]:,} tokens, median {lengths[len(lengths) // 2]:,}"
    )
    steps = plan.total if whole or config.max_steps else None
    per_step = max(map(len, computed)) if whole else _per_step(config, processes)
    read = sum(train.lengths)  # in as many steps as an epoch of the rows that were read has
    tokens = read // plan.steps_per_epoch
    if not whole:
        tokens = read * config.batch_size * config.accumulation // len(train)
    rows = len(reader.read(config.data if is_labelled else first, "train").rows)
    kept = (report.kept + report.held_out) / report.kept * rows / report.rows
    return Batches(
        task=task,
        batches=batches,
        source=source,
        steps=steps,
        per_step=per_step,
        tokens=tokens,
        tokenizer=tokenizer,
        longest=longest,
        kept_tokens=round(kept * read),
    )


def from_lengths(
    config: TrainConfig,
    length: int | None,
    target_tokens: int | None,
    *,
    labelled: bool,
    processes: int = 1,
) -> Batches:
    """Make synthetic examples of one length that share no prefix.

    Args:
        config: The run.
        length: Tokens per example; None means data.max_length, the upper bound.
        target_tokens: Target tokens per example; None means half of the tokens.
        labelled: Whether task "auto" is a classification, as for an encoder.
        processes: Number of processes that share a step.

    Raises:
        ConfigurationError: `target_tokens` is not between 1 and `length` - 1.
    """
    size = config.data.max_length if length is None else length
    name = config.data.task
    if name == "auto":
        name = "classification" if labelled else "completion"
    task = DataTask(name=name)
    if task.kind == "classification":
        task = dataclasses.replace(task, labels=("0", "1"))
    count = min(config.batch_size, _largest_share(config, processes))
    examples: list[Example]
    source = f"{size:,} tokens per example"
    if task.generates:
        if target_tokens is None:
            target_tokens = size // 2
        examples = [*language_examples(count, size, target_tokens)]
        source += f", {target_tokens:,} of them targets"
    else:
        label = 0.5 if task.kind == "regression" else 0
        example = LabelledExample(input_ids=[0] * size, prompt="", completion="", label=label)
        examples = [example] * count
    source += " (as configured)" if length else " (data.max_length, the upper bound)"
    return Batches(
        task=task,
        batches=[examples],
        source=source,
        steps=config.max_steps,
        per_step=_per_step(config, processes),
        tokens=config.batch_size * config.accumulation * size,
    )


def _per_step(config: TrainConfig, processes: int) -> int:
    """Return the batches of the process with the most examples of a step."""
    return -(-_largest_share(config, processes) // config.batch_size)


def _largest_share(config: TrainConfig, processes: int) -> int:
    return -(-config.batch_size * config.accumulation // processes)


def language_examples(count: int, length: int, target_tokens: int) -> list[LanguageExample]:
    """Return `count` examples that share no prefix; the last `target_tokens` of their `length` tokens are targets.

    Raises:
        ConfigurationError: `target_tokens` is not between 1 and `length` - 1.
    """
    if not 0 < target_tokens < length:
        raise ConfigurationError(
            f"target_tokens is {target_tokens}, but an example has {length} tokens; set it between 1 and {length - 1}."
        )
    return [
        LanguageExample(
            input_ids=[number, *[0] * (length - 1)],
            prompt=str(number),
            completion=str(number),  # not plain text
            loss_mask=[position >= length - target_tokens for position in range(length)],
            prompt_length=length - target_tokens,
        )
        for number in range(count)
    ]

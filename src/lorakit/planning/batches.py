"""The batches of a run, from its data or from lengths alone: the fullest, and one of middle size."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.data import DataTask, RowReader, load_examples, task_of
from lorakit.data.batches import BatchSampler
from lorakit.errors import ConfigurationError
from lorakit.models.loading import load_tokenizer
from lorakit.tasks import Example, LabelledExample, LanguageExample
from lorakit.training.config import TrainConfig
from lorakit.training.schedule import StepPlan
from lorakit.training.setup import groups_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 2000
"""Rows of the data that are read: enough for the lengths, and soon read."""


@dataclass(frozen=True)
class Batches:
    """What a run computes on."""

    task: DataTask
    fullest: list[Example]
    """The examples of the batch with the most tokens."""
    middle: list[Example]
    """The examples of a batch of middle size."""
    source: str
    """Where the lengths come from, in words."""
    steps: int | None
    """Optimizer steps of the run; None where the number of examples is not known."""
    tokenizer: PreTrainedTokenizerBase | None = None


def from_data(config: TrainConfig) -> Batches:
    """Read the first rows of the run's training data, and put them into batches as training would.

    Raises:
        LorakitError: The data or the tokenizer cannot be read.
    """
    limit = min(config.data.limit or ROWS, ROWS)
    rows = RowReader()
    task = task_of(dataclasses.replace(config.data, limit=limit), rows=rows)
    tokenizer = load_tokenizer(
        config.base.name,
        revision=config.base.revision,
        trust_remote_code=config.base.trust_remote_code,
    )
    data = dataclasses.replace(config.data, task=task.name, limit=limit)
    train = load_examples(data, "train", tokenizer, labels=task.labels, rows=rows)
    sampler = BatchSampler(
        train.lengths, config.batch_size, config.seed, groups=groups_of(config, train.examples)
    )
    plan = StepPlan(
        sampler,
        accumulation=config.accumulation,
        epochs=config.epochs,
        max_steps=config.max_steps,
    )
    drawn = [batch for step in plan.steps() for batch in step][: len(sampler)]
    batches = sorted(
        ([train.examples[i] for i in batch] for batch in drawn),
        key=lambda batch: (max(map(len, batch)) * len(batch), sum(map(len, batch))),
    )
    whole = train.report.read < limit or config.data.limit == limit
    lengths = sorted(train.lengths)
    source = (
        f"{train.report.source}, {len(train):,} examples{'' if whole else ' (the first rows)'}: "
        f"{lengths[0]:,} to {lengths[-1]:,} tokens, {lengths[len(lengths) // 2]:,} in the middle"
    )
    steps = plan.total if whole or config.max_steps else None
    return Batches(task, batches[-1], batches[len(batches) // 2], source, steps, tokenizer)


def from_lengths(
    config: TrainConfig, length: int | None, targets: int | None, *, encoder: bool
) -> Batches:
    """Make up examples of one length, which share nothing.

    Args:
        config: The run.
        length: Tokens of an example; None takes data.max_length, the most there can be.
        targets: Target tokens of an example; None takes half of them.
        encoder: Whether the base reads text and writes none, which makes its task a classification.

    Raises:
        ConfigurationError: There are more targets than tokens.
    """
    size = length or config.data.max_length
    name = config.data.task
    if name == "auto":
        name = "classification" if encoder else "completion"
    task = DataTask(name=name)
    if task.kind == "classification":
        task = dataclasses.replace(task, labels=("0", "1"))
    examples: list[Example]
    if not task.generates:
        label = 0.5 if task.kind == "regression" else 0
        examples = [_labelled(size, label) for _ in range(config.batch_size)]
        source = f"{size:,} tokens an example"
    else:
        wanted = size // 2 if targets is None else targets
        if not 0 < wanted < size:
            raise ConfigurationError(
                f"targets is {wanted}, and an example has {size} tokens; it must be at least 1 and below that."
            )
        examples = [language_example(number, size, wanted) for number in range(config.batch_size)]
        source = f"{size:,} tokens an example, {wanted:,} of them targets"
    source += " (as given)" if length else " (data.max_length, the most there can be)"
    return Batches(task, examples, examples, source, config.max_steps)


def language_example(number: int, length: int, targets: int) -> LanguageExample:
    """Make up an example that shares nothing with one of another number; its last `targets` tokens are targets."""
    return LanguageExample(
        input_ids=[number, *[0] * (length - 1)],
        prompt=str(number),
        completion="",
        loss_mask=[position >= length - targets for position in range(length)],
        prompt_length=length - targets,
    )


def _labelled(length: int, label: int | float) -> LabelledExample:
    return LabelledExample(input_ids=[0] * length, prompt="", completion="", label=label)

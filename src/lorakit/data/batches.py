"""From examples to batches of tensors, in an order that depends on seed and epoch alone."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from lorakit.tasks import Example, LabelledExample, LanguageExample

IGNORED = -100
"""Label of a position without a target, as in `torch.nn.functional.cross_entropy`."""

MEGABATCH = 50
"""Batches that are sorted by length together: enough that little is padding, few enough that the order
stays random."""


def round_up(count: int, step: int) -> int:
    """Return the least multiple of `step` that is not below `count`."""
    return -(-count // step) * step


def collate(examples: Sequence[Example], pad_id: int, *, step: int = 1) -> dict[str, Tensor]:
    """Return a right-padded batch of B examples, T tokens being the longest, or the next multiple of `step`.

    Returns:
        input_ids and attention_mask (B, T), int64; token_type_ids (B, T) where the examples have them;
        labels: for language modelling (B, T), the token itself where it is a target, else -100 (position
        t is predicted from positions before t: models shift labels themselves); for classification (B,)
        int64; for regression (B,) float32.
    """
    width = round_up(max(map(len, examples)), step)

    def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor(
            [[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long
        )

    batch = {
        "input_ids": padded([example.input_ids for example in examples], pad_id),
        "attention_mask": padded([[1] * len(example) for example in examples], 0),
    }
    language = [example for example in examples if isinstance(example, LanguageExample)]
    labelled = [example for example in examples if isinstance(example, LabelledExample)]
    if len(language) == len(examples):
        targets = [
            [
                token if target else IGNORED
                for token, target in zip(e.input_ids, e.loss_mask, strict=True)
            ]
            for e in language
        ]
        batch["labels"] = padded(targets, IGNORED)
    elif len(labelled) == len(examples):
        scores = any(isinstance(example.label, float) for example in labelled)
        dtype = torch.float32 if scores else torch.long
        batch["labels"] = torch.tensor([example.label for example in labelled], dtype=dtype)
        types = [
            example.token_type_ids for example in labelled if example.token_type_ids is not None
        ]
        if types:
            batch["token_type_ids"] = padded(types, 0)
    else:
        raise TypeError("a batch holds examples of one task")
    return batch


def token_count(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch's examples, each counted in full, without padding."""
    return int(batch["lengths" if "lengths" in batch else "attention_mask"].sum())


class BatchSampler:
    """The batches of each epoch, as indices: every example once per epoch, a short last batch included.

    With `bucket`, examples of like length share a batch, which saves padding: all are shuffled, sorted by
    length within stretches of 50 batches, cut into batches, and the batches shuffled. The order follows
    from `seed` and the epoch alone, so that a resumed run goes on with the batches it would have had.

    With `groups`, examples of one group (one prompt) share batches instead, so that packing computes what
    they share once. That is another order of training, with other results: choose it knowingly.

    Args:
        lengths: tokens of each example.
        groups: what each example is grouped by.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        bucket: bool = True,
        groups: Sequence[Hashable] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.bucket = bucket
        self.groups = groups

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def __call__(self, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch as lists of indices."""
        # A generator of its own: nothing else that draws random numbers can change the order of the data.
        # It is seeded with text, whose hash does not depend on the process.
        generator = random.Random(f"batches, seed {self.seed}, epoch {epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        if self.groups is not None:
            return self._grouped(order, generator)
        if self.bucket:
            stretch = self.batch_size * MEGABATCH
            order = [
                index
                for start in range(0, len(order), stretch)
                for index in sorted(order[start : start + stretch], key=self.lengths.__getitem__)
            ]
        batches = [
            order[start : start + self.batch_size]
            for start in range(0, len(order), self.batch_size)
        ]
        if self.bucket:
            generator.shuffle(batches)
        return batches

    def _grouped(self, order: list[int], generator: random.Random) -> list[list[int]]:
        """Batches of neighbours by group, the groups in random order."""
        assert self.groups is not None
        by_group: dict[Hashable, list[int]] = {}
        for index in order:
            by_group.setdefault(self.groups[index], []).append(index)
        order = [index for group in by_group.values() for index in group]
        batches = [
            order[start : start + self.batch_size]
            for start in range(0, len(order), self.batch_size)
        ]
        generator.shuffle(batches)
        return batches

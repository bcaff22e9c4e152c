"""Collate examples into batches of tensors. The order of the batches depends only on the seed and the epoch."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lorakit.ops.rows import round_up
from lorakit.tasks import Example, LabelledExample, LanguageExample

Item = TypeVar("Item")

IGNORED = -100
"""Label of a position without a target: the `ignore_index` of `torch.nn.functional.cross_entropy`."""

MEGABATCH = 50
"""Number of batches that are sorted by length together. More means less padding, fewer a more random order."""


def padded_rows(
    rows: Sequence[Sequence[int]], fill: int, *, width: int = 0, left: bool = False
) -> Tensor:
    """Return rows of whole numbers (R, longest row or `width`), int64, filled up on the right or on the left."""
    width = max(width, *map(len, rows))
    fills = [[fill] * (width - len(row)) for row in rows]
    pairs = zip(fills, rows, strict=True) if left else zip(rows, fills, strict=True)
    return torch.tensor([[*start, *end] for start, end in pairs], dtype=torch.long)


def collate(examples: Sequence[Example], pad_id: int, *, step: int = 1) -> dict[str, Tensor]:
    """Pad B examples on the right and return them as one batch.

    T is the length of the longest example, rounded up to a multiple of `step`.

    Returns:
        input_ids and attention_mask (B, T), int64; token_type_ids (B, T) if the examples have them. labels are
        (B, T) int64 for language modelling, (B,) int64 for classification and (B,) float32 for regression. A label
        of language modelling is the token id at a target and -100 elsewhere; the model shifts labels itself.
    """
    width = round_up(max(map(len, examples)), step)
    batch = {
        "input_ids": padded_rows([e.input_ids for e in examples], pad_id, width=width),
        "attention_mask": padded_rows([[1] * len(e) for e in examples], 0, width=width),
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
        batch["labels"] = padded_rows(targets, IGNORED, width=width)
    elif len(labelled) == len(examples):
        is_regression = any(isinstance(example.label, float) for example in labelled)
        dtype = torch.float32 if is_regression else torch.long
        batch["labels"] = torch.tensor([example.label for example in labelled], dtype=dtype)
        types = [e.token_type_ids for e in labelled if e.token_type_ids is not None]
        if types:
            batch["token_type_ids"] = padded_rows(types, 0, width=width)
    else:
        raise TypeError("the batch mixes examples of several tasks; expected those of one task")
    return batch


class BatchSampler:
    """Sampler of the batches of an epoch. Each epoch yields every example once; one batch may be short.

    Training draws the examples of a whole optimizer step as one batch and cuts it afterwards (`Share`).

    Examples of similar length share a batch, which reduces padding. The sampler shuffles all examples, sorts each run
    of 50 batches by length, cuts it into batches and shuffles the batches. The order depends only on `seed` and the
    epoch, so a resumed run continues with the same batches.

    With `groups` (the group of each example), examples of one group (one prompt) share a batch instead, and packing
    computes their common prefix once. This changes the order of training, and therefore its results. `lengths` are in
    tokens.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        groups: Sequence[Hashable] | None = None,
    ) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.groups = groups

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def __call__(self, epoch: int) -> list[list[int]]:
        """Return the batches of an epoch as lists of indices."""
        # A private generator: other users of random numbers cannot change the order of the data.
        # Seeding with a str gives the same order in every process.
        generator = random.Random(f"batches, seed {self.seed}, epoch {epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        if self.groups is not None:
            by_group: dict[Hashable, list[int]] = {}
            for index in order:
                by_group.setdefault(self.groups[index], []).append(index)
            order = [index for group in by_group.values() for index in group]
        else:
            runs = cut(order, self.batch_size * MEGABATCH)
            order = [index for run in runs for index in sorted(run, key=self.lengths.__getitem__)]
        batches = cut(order, self.batch_size)
        generator.shuffle(batches)
        return batches


def cut(items: list[Item], size: int) -> list[list[Item]]:
    """Return the items in parts of `size`; the last part may be shorter."""
    return [items[at : at + size] for at in range(0, len(items), size)]

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.batches import BatchSampler, collate
from lorakit.tasks import LabelledExample, LanguageExample

LENGTHS = st.lists(st.integers(min_value=1, max_value=500), max_size=300)


@given(
    lengths=LENGTHS,
    batch_size=st.integers(min_value=1, max_value=17),
    seed=st.integers(min_value=0, max_value=2**63),
    epoch=st.integers(min_value=0, max_value=1000),
)
def test_every_example_comes_once_per_epoch_in_full_batches(lengths, batch_size, seed, epoch):
    sampler = BatchSampler(lengths, batch_size, seed)
    batches = sampler(epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert len(batches) == len(sampler)
    sizes = sorted(map(len, batches), reverse=True)
    assert all(size == batch_size for size in sizes[:-1])
    assert all(1 <= size <= batch_size for size in sizes[-1:])
    assert batches == BatchSampler(lengths, batch_size, seed)(epoch)


@pytest.mark.parametrize("groups", [None, [index // 16 for index in range(64)]])
def test_every_seed_and_epoch_mixes_examples_of_one_length_anew(groups):
    """No two orders share a batch, and none has a batch of the file's order."""

    def members(seed, epoch):
        return [frozenset(batch) for batch in BatchSampler([5] * 64, 8, seed, groups)(epoch)]

    in_file_order = [frozenset(range(start, start + 8)) for start in range(0, 64, 8)]
    orders = [in_file_order, members(1, 0), members(1, 1), members(2, 0)]
    assert len({batch for order in orders for batch in order}) == 4 * 8


def test_every_seed_and_epoch_shuffles_batches_of_different_lengths():
    """Each batch holds neighbours by length; without a shuffle, training would begin with the shortest."""

    def starts(seed, epoch):
        return tuple(min(batch) for batch in BatchSampler(range(1, 201), 8, seed)(epoch))

    ascending = tuple(range(0, 200, 8))
    orders = [ascending, starts(1, 0), starts(1, 1), starts(2, 0)]
    assert all(tuple(sorted(order)) == ascending for order in orders)
    assert len(set(orders)) == 4


@pytest.mark.slow
def test_the_order_is_independent_of_other_random_numbers_and_of_the_process():
    sampler = BatchSampler([5] * 200, 8, seed=1)
    first = sampler(0)
    sampler(1)
    torch.manual_seed(7)
    random.seed(7)
    assert sampler(0) == first
    program = "from lorakit.data.batches import BatchSampler; print(BatchSampler([5] * 200, 8, seed=1)(0))"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(first)


def test_buckets_hold_little_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 500, (4000,), generator=generator).tolist()

    def padded(batches):
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches) / sum(lengths)

    assert padded(torch.arange(4000).view(250, 16).tolist()) > 1.7  # in random order
    assert padded(BatchSampler(lengths, 16, seed=0)(0)) < 1.06


def language(ids, mask):
    return LanguageExample(input_ids=ids, loss_mask=mask, prompt_length=1, prompt="", completion="")


def labelled(ids, label, types=None):
    return LabelledExample(
        input_ids=ids, label=label, token_type_ids=types, prompt="", completion=""
    )


def test_language_batches_are_right_padded_and_labels_mark_targets():
    batch = collate([language([5, 6, 7], [False, False, True]), language([8, 9], [False, True])], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, 9, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("labels", "dtype"), [([1, 0], torch.int64), ([1.5, 2.0], torch.float32)])
def test_labelled_batches_have_one_label_each(labels, dtype):
    batch = collate([labelled([5, 6], labels[0], [0, 1]), labelled([7], labels[1], [0])], 0)
    assert batch["labels"].tolist() == labels
    assert batch["labels"].dtype == dtype
    assert batch["token_type_ids"].tolist() == [[0, 1], [0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert "token_type_ids" not in collate([labelled([5], labels[0])], 0)


def test_tasks_do_not_mix_in_a_batch():
    with pytest.raises(TypeError, match="one task"):
        collate([language([5, 6], [False, True]), labelled([5], 1)], 0)


@given(
    groups=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    batch_size=st.integers(1, 9),
    epoch=st.integers(0, 3),
)
def test_grouped_batches_hold_every_example_once_and_groups_together(groups, batch_size, epoch):
    sampler = BatchSampler([1] * len(groups), batch_size, seed=3, groups=groups)
    batches = sampler(epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(groups)))
    assert batches == sampler(epoch)
    touched = sum(len({groups[i] for i in batch}) for batch in batches)
    assert touched <= len(set(groups)) + len(batches) - 1

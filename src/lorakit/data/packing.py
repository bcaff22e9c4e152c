"""Shared-prefix packing: tokens that several examples have in common are computed once.

The examples of a batch form trees: a prompt once, each completion after it. A tree is laid out as a
row of tokens, parents before children, with the position each token has in its own example and a mask
that lets it see its own ancestors and nothing else. Every token then sees exactly what it would see
alone, so the loss and all gradients are those of the separate examples (to the rounding of sums).

A token behind which no target follows, as the last of an example, is seen by nothing that the loss reads: it is a
target and stands in no row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np
import torch
from torch import Tensor

from lorakit.data.batches import round_up
from lorakit.tasks import LanguageExample

ROW_LENGTH = 1024
"""Tokens of a row at most, where a tree is not longer: the mask has their square, and attention under
it (`lorakit.ops.masked_attention`) costs no more for trees side by side than for trees in rows of their own."""


@dataclass(slots=True)
class _Node:
    token: int
    depth: int
    parent: _Node | None
    weight: int = 0
    """Examples in which this token is a target."""
    stands: bool = False
    """Whether it stands in a row: a target follows, or it is the first token, without which a row would be no input."""
    children: dict[int, _Node] = field(default_factory=dict)


def pack(examples: Sequence[LanguageExample], pad_id: int, *, step: int = 1) -> dict[str, Tensor]:
    """Return a batch of R rows of T tokens, a multiple of `step`, in which shared prefixes stand once.

    Returns:
        input_ids, position_ids (R, T) int64; attention_mask (R, 1, T, T) bool, True where row token i
        may see token j; target_at (N,) int64, the index into the flattened (R * T) positions that
        predicts each target; targets (N,) int64; target_weights (N,) float32, the number of examples
        that have this target there; lengths (B,) int64, the tokens of each example.
    """
    rows, width = _rows(_trees(examples), step)
    shape = (len(rows), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    # A padding token sees itself: a row of the softmax without any key would be NaN.
    mask = np.tile(np.eye(width, dtype=bool), (len(rows), 1, 1))
    target_at, targets, weights = [], [], []
    for r, row in enumerate(rows):
        place: dict[int, int] = {}
        for node in (node for tree in row for node in tree):
            above = -1 if node.parent is None else place[id(node.parent)]
            if node.weight:
                target_at.append(r * width + above)
                targets.append(node.token)
                weights.append(node.weight)
            if node.stands:
                at = place[id(node)] = len(place)
                input_ids[r, at], position_ids[r, at] = node.token, node.depth
                if node.parent is not None:
                    mask[r, at, :at] = mask[r, above, :at]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(position_ids),
        "attention_mask": torch.from_numpy(mask)[:, None],
        "target_at": torch.tensor(target_at, dtype=torch.long),
        "targets": torch.tensor(targets, dtype=torch.long),
        "target_weights": torch.tensor(weights, dtype=torch.float32),
        "lengths": torch.tensor([len(example) for example in examples]),
    }


def _trees(examples: Sequence[LanguageExample]) -> list[list[_Node]]:
    """The examples as one tree per first token, each as its nodes up to the last targets, parents before children."""
    roots: dict[int, _Node] = {}
    for example in sorted(examples, key=lambda example: example.input_ids):
        first, *rest = example.input_ids
        node = roots.setdefault(first, _Node(token=first, depth=0, parent=None, stands=True))
        last = max((i for i, is_target in enumerate(example.loss_mask) if is_target), default=0)
        for depth, token in enumerate(rest[:last], start=1):
            if token not in node.children:
                node.children[token] = _Node(token=token, depth=depth, parent=node)
            node = node.children[token]
            node.weight += example.loss_mask[depth]
            node.stands |= depth < last
    return [list(_nodes(root)) for root in roots.values()]


def _nodes(root: _Node) -> Iterator[_Node]:
    """The nodes of a tree, each after its parent."""
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children.values()))


def _size(tree: list[_Node]) -> int:
    return sum(node.stands for node in tree)


def _rows(trees: list[list[_Node]], step: int) -> tuple[list[list[list[_Node]]], int]:
    """Trees in as many rows as leave the fewest places empty, of as few in the shortest, and the width of these."""
    trees = sorted(trees, key=_size, reverse=True)
    sizes = [_size(tree) for tree in trees]
    longest = max(ROW_LENGTH, sizes[0])
    fewest = -(-sum(sizes) // longest)
    # From twice as many rows on only those of one tree each can be fuller: trees of one length.
    counts = {n for n in (*range(fewest, 2 * fewest + 1), len(trees)) if n <= len(trees)}
    divided = [_divided(sizes, n) for n in counts]
    fitting = [(rows, round_up(width, step)) for rows, width in divided if width <= longest]
    rows, width = min(fitting, key=lambda found: (len(found[0]) * found[1], -len(found[0])))
    return [[trees[i] for i in row] for row in rows], width


def _divided(sizes: list[int], count: int) -> tuple[list[list[int]], int]:
    """Which sizes, the largest first, each into the emptiest of `count` rows; and what the fullest row holds."""
    rows: list[list[int]] = [[] for _ in range(count)]
    fill = [(0, r) for r in range(count)]
    for i, size in enumerate(sizes):
        used, r = heappop(fill)
        rows[r].append(i)
        heappush(fill, (used + size, r))
    return rows, max(fill)[0]

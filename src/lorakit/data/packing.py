"""Shared-prefix packing: tokens that several examples have in common are computed once.

The examples of a batch form trees: a prompt once, each completion after it. A tree is laid out as a
row of tokens, parents before children, with the position each token has in its own example and a mask
that lets it see its own ancestors and nothing else. Every token then sees exactly what it would see
alone, so the loss and all gradients are those of the separate examples (to the rounding of sums).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorakit.tasks import LanguageExample

PAIRS_PER_TOKEN = 1000
"""Attended pairs that cost as much as pushing one more token through a layer: where joining two trees
saves fewer tokens than the longer row costs in attention, they stay apart. (A small Llama's layer takes
about 3,000 times the products of one pair for one token; a mask makes the pairs some three times as dear.)"""


@dataclass(slots=True)
class _Node:
    token: int
    depth: int
    parent: _Node | None
    weight: int = 0
    """Examples in which this token is a target."""
    children: dict[int, _Node] = field(default_factory=dict)


def pack(examples: Sequence[LanguageExample], pad_id: int) -> dict[str, Tensor]:
    """Return a batch of R rows of T tokens in which shared prefixes stand once.

    Returns:
        input_ids, position_ids (R, T) int64; attention_mask (R, 1, T, T) bool, True where row token i
        may see token j; target_at (N,) int64, the index into the flattened (R * T) positions that
        predicts each target; targets (N,) int64; target_weights (N,) float32, the number of examples
        that have this target there; lengths (B,) int64, the tokens of each example.
    """
    rows = _cheapest_rows(examples)
    width = _width(rows)
    shape = (len(rows), width)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    position_ids = torch.zeros(shape, dtype=torch.long)
    # A padding token sees itself: a row of the softmax without any key would be NaN.
    mask = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
    target_at, targets, weights = [], [], []
    for r, row in enumerate(rows):
        place: dict[int, int] = {}
        for node in (node for tree in row for node in tree):
            at = place[id(node)] = len(place)
            input_ids[r, at], position_ids[r, at] = node.token, node.depth
            if node.parent is not None:
                above = place[id(node.parent)]
                mask[r, at] |= mask[r, above]
                if node.weight:
                    target_at.append(r * width + above)
                    targets.append(node.token)
                    weights.append(node.weight)
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": mask[:, None],
        "target_at": torch.tensor(target_at, dtype=torch.long),
        "targets": torch.tensor(targets, dtype=torch.long),
        "target_weights": torch.tensor(weights, dtype=torch.float32),
        "lengths": torch.tensor([len(example) for example in examples]),
    }


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of tokens with which both begin."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _trees(examples: Sequence[LanguageExample], *, join: bool = True) -> list[_Node]:
    """The examples as trees; neighbours in sorted order join where that saves more than it costs."""
    ordered = sorted(examples, key=lambda example: example.input_ids)
    trees: list[_Node] = []
    size, last = 0, None
    for example in ordered:
        length = len(example)
        shared = 0 if last is None else shared_length(last.input_ids, example.input_ids)
        joined = size + length - shared
        dearer = joined**2 - size**2 - length**2
        if join and shared and shared * PAIRS_PER_TOKEN > dearer:
            _insert(trees[-1], example)
            size = joined
        else:
            trees.append(_Node(token=example.input_ids[0], depth=0, parent=None))
            _insert(trees[-1], example)
            size = length
        last = example
    return trees


def _insert(root: _Node, example: LanguageExample) -> None:
    node = root
    for depth, token in enumerate(example.input_ids[1:], start=1):
        if token not in node.children:
            node.children[token] = _Node(token=token, depth=depth, parent=node)
        node = node.children[token]
        node.weight += example.loss_mask[depth]


def _nodes(root: _Node) -> Iterator[_Node]:
    """The nodes of a tree, each after its parent."""
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children.values()))


Row = list[list[_Node]]
"""Trees side by side, each as its nodes."""


def _cheapest_rows(examples: Sequence[LanguageExample]) -> list[Row]:
    """The layout that costs least: joined into trees or not, in rows of one tree's length or of several.

    Joining saves tokens, but trees of unequal size leave padding, which longer rows fill, which costs attention.
    """
    layouts = []
    for trees in (_trees(examples), _trees(examples, join=False)):
        listed = sorted((list(_nodes(tree)) for tree in trees), key=len, reverse=True)
        longest, total = len(listed[0]), sum(map(len, listed))
        for count in range(1, min(len(listed), total // longest) + 1):
            layouts.append(_rows(listed, room=max(longest, -(-total // count))))
    return min(layouts, key=_cost)


def _cost(rows: list[Row]) -> int:
    """Work of a layout, padding included, in attended pairs."""
    width = _width(rows)
    return len(rows) * (width * PAIRS_PER_TOKEN + width**2)


def _width(rows: list[Row]) -> int:
    return max(sum(map(len, row)) for row in rows)


def _rows(trees: list[list[_Node]], room: int) -> list[Row]:
    """Trees, the largest first, each into the first row in which it fits."""
    rows: list[Row] = []
    used: list[int] = []
    for tree in trees:
        fits = next((i for i, n in enumerate(used) if n + len(tree) <= room), None)
        if fits is None:
            rows.append([tree])
            used.append(len(tree))
        else:
            rows[fits].append(tree)
            used[fits] += len(tree)
    return rows

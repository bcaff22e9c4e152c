"""Shared-prefix packing: a prefix that several examples share is computed once.

The examples of a batch form trees (tries): one copy of a prompt, followed by each of its completions. A row holds the
tokens of its trees, parents before children. Each token keeps its position in its own example, and the mask lets it
attend to itself and its ancestors only. Loss and gradients therefore equal those of separate examples, up to rounding.

Tokens after the last target are dropped. The last target itself is predicted but is not an input, so it has no place
in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lorakit.ops.rows import round_up
from lorakit.tasks import Example, LanguageExample
from lorakit.tasks.language_modelling import common_length

ROW_LENGTH = 1024
"""Maximum length of a row in tokens, unless a single tree is longer. The mask grows with its square. Attention under
the mask (`ops.attention.masked_attention`) costs the same for trees in one row as for trees in separate rows."""

PAIRS_OF_A_COPY = 2**18
"""A tree longer than `ROW_LENGTH` is cut into several if that adds at most one token for each so many entries of its
mask, which take about as long as a token of a model with 135 million parameters. Most tokenizers and chat templates
begin every text with the same token: without cuts a batch would be one row, with a mask of 268 MB for 16 texts of
1,024."""


@dataclass(slots=True)
class _Node:
    token: int
    depth: int
    parent: _Node | None
    weight: int = 0
    """Number of examples in which this token is a target."""
    is_input: bool = False
    """Whether a row contains it: a target follows, or it is the first token, because a row cannot be empty."""
    children: dict[int, _Node] = field(default_factory=dict)


def pack(examples: Sequence[LanguageExample], pad_id: int, *, step: int = 1) -> dict[str, Tensor]:
    """Pack B examples into R rows of T tokens with one copy of each shared prefix. T is a multiple of `step`.

    Returns:
        input_ids, position_ids (R, T) int64; attention_mask (R, 1, T, T) bool, True where token i of the row attends
        to token j; target_at (N,) int64, the index into the flattened (R * T) positions that predicts each target;
        read_at (M,) int64, the same indices, each once; targets (N,) int64; target_weights (N,) float32, the number of
        examples with this target at this position.
    """
    rows, width = _rows(_trees(examples), step)
    shape = (len(rows), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    # A padding token attends to itself: a softmax over no keys would be NaN.
    mask = np.tile(np.eye(width, dtype=bool), (len(rows), 1, 1))
    target_at, targets, weights = [], [], []
    for r, row in enumerate(rows):
        position: dict[int, int] = {}  # of each input node in the row, by its id()
        for node in (node for tree in row for node in tree):
            parent = -1 if node.parent is None else position[id(node.parent)]
            if node.weight:  # a target has a parent, which predicts it
                target_at.append(r * width + parent)
                targets.append(node.token)
                weights.append(node.weight)
            if node.is_input:
                at = position[id(node)] = len(position)
                input_ids[r, at], position_ids[r, at] = node.token, node.depth
                if node.parent is not None:  # attend to what the parent attends to, and to itself
                    mask[r, at, :at] = mask[r, parent, :at]
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(position_ids),
        "attention_mask": torch.from_numpy(mask)[:, None],
        "target_at": torch.tensor(target_at, dtype=torch.long),
        "targets": torch.tensor(targets, dtype=torch.long),
        "read_at": torch.from_numpy(np.unique(np.array(target_at, dtype=np.int64))),
        "target_weights": torch.tensor(weights, dtype=torch.float32),
    }


def shared_once(examples: Sequence[Example]) -> int:
    """Return the tokens of the examples with each shared prefix counted once, about as many as `pack` computes."""
    ordered = sorted(example.input_ids for example in examples)
    count = sum(map(len, ordered))
    return count - sum(common_length(one, other) for one, other in pairwise(ordered))


def _trees(examples: Sequence[LanguageExample]) -> list[list[_Node]]:
    """Return one tree per first token, or its parts, as nodes up to the last targets, parents before children."""
    roots: dict[int, _Node] = {}
    for example in sorted(examples, key=lambda example: example.input_ids):
        first, *rest = example.input_ids
        node = roots.setdefault(first, _Node(token=first, depth=0, parent=None, is_input=True))
        targets = (i for i, is_target in enumerate(example.loss_mask) if is_target)
        last_target = max(targets, default=0)
        for depth, token in enumerate(rest[:last_target], start=1):
            if token not in node.children:
                node.children[token] = _Node(token=token, depth=depth, parent=node)
            node = node.children[token]
            node.weight += example.loss_mask[depth]
            node.is_input |= depth < last_target
    return [part for root in roots.values() for part in _parts(root)]


def _parts(root: _Node) -> Iterator[list[_Node]]:
    """Yield the nodes of a tree, in several trees with a copy of its prefix each if it is long and the prefix short."""
    stack = [root]
    while stack:
        root = stack.pop()
        nodes = list(_nodes(root))
        prefix = [root]
        while len(prefix[-1].children) == 1:
            prefix.extend(prefix[-1].children.values())
        first, *others = prefix[-1].children.values() or [root]
        size = _size(nodes)
        copies = len(prefix) * len(others)
        if not others or size <= ROW_LENGTH or copies * PAIRS_OF_A_COPY > size**2:
            yield nodes
            continue
        prefix[-1].children = {first.token: first}
        stack += [root, *(_after_copy(prefix, child) for child in others)]


def _after_copy(prefix: Sequence[_Node], child: _Node) -> _Node:
    """Put a subtree after a copy of a prefix, whose targets count in the original only, and return the copy's root."""
    end: _Node | None = None
    nodes = []
    for node in prefix:
        end = replace(node, parent=end, weight=0, children={})
        nodes.append(end)
    for one, other in pairwise([*nodes, child]):
        one.children[other.token] = other
    child.parent = end
    return nodes[0]


def _nodes(root: _Node) -> Iterator[_Node]:
    """Yield the nodes of a tree, parents before children."""
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(node.children.values()))


def _size(tree: list[_Node]) -> int:
    return sum(node.is_input for node in tree)


def _rows(trees: list[list[_Node]], step: int) -> tuple[list[list[list[_Node]]], int]:
    """Distribute trees over rows of one width, with the least padding. Return the rows and the width.

    Of two distributions with equal padding, the one with more and therefore shorter rows is better: the mask grows
    with the square of the width.
    """
    trees = sorted(trees, key=_size, reverse=True)
    sizes = [_size(tree) for tree in trees]
    max_width = max(ROW_LENGTH, sizes[0])
    fewest = -(-sum(sizes) // max_width)
    # Beyond twice as many rows, only one tree per row can need less padding: trees of equal length.
    counts = {n for n in (*range(fewest, 2 * fewest + 1), len(trees)) if n <= len(trees)}
    candidates = [_distribute(sizes, n) for n in counts]
    fitting = [(rows, round_up(width, step)) for rows, width in candidates if width <= max_width]
    rows, width = min(fitting, key=lambda option: (len(option[0]) * option[1], -len(option[0])))
    return [[trees[i] for i in row] for row in rows], width


def _distribute(sizes: list[int], count: int) -> tuple[list[list[int]], int]:
    """Assign sizes in descending order to the emptiest of `count` rows. Return the indices and the largest fill."""
    rows: list[list[int]] = [[] for _ in range(count)]
    fill = [(0, r) for r in range(count)]
    for i, size in enumerate(sizes):
        used, r = heappop(fill)
        rows[r].append(i)
        heappush(fill, (used + size, r))
    return rows, max(fill)[0]

"""The limit of training speed: the operations that a batch needs, and the matmul rate of this machine.

A batch needs 4 operations per matmul weight and distinct token: a multiplication and an addition, in the forward
and in the backward pass. A prefix that examples of a batch share counts once. The head needs 4 operations per weight
and token before a target. Attention adds its own products.

Three things are not needed:

- the last token of an example, which has no target and which no token attends to;
- the gradient of the embeddings;
- the last block, except keys and values, for tokens whose last hidden state is not read.

The rate is that of products in the model's own shapes, forward and backward, with the same threads. No training can
be faster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

from benchmarks.examples import IGNORED
from benchmarks.workloads import Task
from lorakit.models.blocks import stacks
from lorakit.models.layers import is_inside
from lorakit.models.places import find_places

SECONDS_PER_PRODUCT = 0.05


@dataclass(frozen=True)
class Shapes:
    """Shapes of the matrix products of a model."""

    linear: dict[tuple[int, int], int]
    """(in, out) of the linear layers of the blocks -> number of such layers."""
    first: int
    """Weights of the query, key and value projections of the first block, whose input needs no gradient."""
    last: int
    """Weights of the linear layers of the last block, without the key and value projections."""
    head: tuple[int, int] | None
    """(in, vocabulary) of a language model's head."""
    attention_width: int
    """Width of the queries of one block."""
    blocks: int

    @property
    def weights(self) -> int:
        """Total weights of the linear layers."""
        return sum(i * o * count for (i, o), count in self.linear.items())


@dataclass(frozen=True)
class Counts:
    """Numbers of tokens and attention pairs that a batch needs."""

    tokens: int
    """Distinct tokens before a target. Equal tokens with the same prefix count once."""
    read: int
    """Tokens among them whose last hidden state is read. Several targets after one token need one row of logits."""
    pairs: int
    """Pairs of a distinct token and a token that it attends to."""
    read_pairs: int
    """Pairs among them whose first token is read."""


def shapes_of(model: Any, task: Task) -> Shapes:
    """Return the shapes of a model."""
    # Ignore the pooler and the head of a classifier: they process one token per example.
    layers = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and ".layer" in path
    }
    (blocks,) = stacks(model).values()
    to_keys = {place.path for place in find_places(model, "attention.kv")}
    to_any = to_keys | {place.path for place in find_places(model, "attention.q")}

    def weights(block: str, *, among: set[str]) -> int:
        return sum(
            layer.weight.numel()
            for path, layer in layers.items()
            if path in among and is_inside(path, block)
        )

    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shapes(
        linear=dict(Counter((layer.in_features, layer.out_features) for layer in layers.values())),
        first=weights(blocks[0], among=to_any),
        last=weights(blocks[-1], among=layers.keys() - to_keys),
        head=(config.hidden_size, config.vocab_size) if task == "completion" else None,
        attention_width=config.num_attention_heads * head_dim,
        blocks=config.num_hidden_layers,
    )


def counts_of(batch: list[dict[str, Any]], task: Task) -> Counts:
    """Count the tokens and pairs of a batch. In a causal model, tokens with a common prefix count once."""
    lengths = [len(example["input_ids"]) for example in batch]
    if task == "classification":
        return Counts(
            tokens=sum(lengths),
            read=len(batch),
            pairs=sum(length**2 for length in lengths),
            read_pairs=sum(lengths),
        )
    nodes: dict[tuple[int, int], int] = {}  # (node of the previous token, token) -> its node
    attended: dict[int, int] = {}  # node before a target -> number of tokens that it attends to
    read: set[int] = set()
    for example in batch:
        path = [-1]
        labelled = zip(example["input_ids"], example["labels"], strict=True)
        for token, label in labelled:
            node = nodes.setdefault((path[-1], token), len(nodes))
            if label != IGNORED and len(path) > 1:
                read.add(path[-1])
                attended |= {above: number for number, above in enumerate(path[1:], start=1)}
            path.append(node)
    return Counts(
        tokens=len(attended),
        read=len(read),
        pairs=sum(attended.values()),
        read_pairs=sum(attended[node] for node in read),
    )


def operations(shapes: Shapes, counts: Counts) -> int:
    """Return the floating-point operations that a batch needs."""
    head = shapes.head[0] * shapes.head[1] * counts.read if shapes.head else 0
    pairs = (shapes.blocks - 1) * counts.pairs + counts.read_pairs
    # Forward: scores and weighted values. Backward: gradients of values, weights, queries and keys.
    attention = 6 * 2 * shapes.attention_width * pairs
    linear = 4 * shapes.weights * counts.tokens
    linear -= 2 * shapes.first * counts.tokens
    linear -= 4 * shapes.last * (counts.tokens - counts.read)
    return linear + 4 * head + attention


def sample_rate(shapes: Shapes, counts: Counts, dtype: torch.dtype) -> float:
    """Return the operations per second of `dtype` products in the model's shapes, weighted by their number.

    Takes one sample of about a second. :func:`settled` combines several samples.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [(shape, count, counts.tokens) for shape, count in shapes.linear.items()]
    if shapes.head:
        rows.append((shapes.head, 1, counts.read))
    total, seconds = 0.0, 0.0
    for (width, out), count, tokens in rows:
        weight = torch.randn(out, width, dtype=dtype, device=device)
        inputs = torch.randn(tokens, width, dtype=dtype, device=device)
        gradient = torch.randn(tokens, out, dtype=dtype, device=device)
        for product in ("inputs @ weight.T", "gradient @ weight"):
            timer = Timer(
                product,
                globals={"inputs": inputs, "weight": weight, "gradient": gradient},
                num_threads=torch.get_num_threads(),
            )
            total += 2 * tokens * width * out * count
            seconds += timer.blocked_autorange(min_run_time=SECONDS_PER_PRODUCT).median * count
    return total / seconds


def settled(rates: Sequence[float]) -> float:
    """Return the median of the faster half of the samples.

    Other processes make a sample slower, never faster, so the slower half is unreliable. The fastest sample
    may come from a boost clock that no training sustains.
    """
    faster = sorted(rates, reverse=True)[: (len(rates) + 1) // 2]
    return median(faster)

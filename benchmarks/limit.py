"""The products that a batch cannot do without, and how fast this machine multiplies.

Needed are 4 products of two operations per matmul weight for each distinct token: its forward pass and its
gradient, a multiplication and an addition each. A prefix that examples of a batch share is one set of
distinct tokens. To that come 4 per weight of the head for each target, and attention. The rate is that of
products in the model's own shapes, forward and backward, on the same threads. No training is faster.
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

SECONDS_PER_PRODUCT = 0.05


@dataclass(frozen=True)
class Shapes:
    """The products of a model."""

    linear: dict[tuple[int, int], int]
    """(in, out) of the linear layers of the blocks -> how many there are."""
    head: tuple[int, int] | None
    """(in, vocabulary) of a language model's head."""
    attention_width: int
    """Width of all queries of all layers."""

    @property
    def weights(self) -> int:
        """Weights of the linear layers."""
        return sum(i * o * count for (i, o), count in self.linear.items())


@dataclass(frozen=True)
class Counts:
    """What of a batch has to be computed."""

    tokens: int
    """Distinct tokens: those with the same prefix are one."""
    targets: int
    """Distinct targets."""
    pairs: int
    """Pairs of a distinct token and one that it attends to."""


def shapes_of(model: Any, task: Task) -> Shapes:
    """Read the shapes off a model."""
    # A classifier's pooler and head see one token of an example, and are nothing beside the blocks.
    linear = Counter(
        (layer.in_features, layer.out_features)
        for path, layer in model.base_model.named_modules()
        if isinstance(layer, nn.Linear) and "pooler" not in path
    )
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shapes(
        linear=dict(linear),
        head=(config.hidden_size, config.vocab_size) if task == "completion" else None,
        attention_width=config.num_hidden_layers * config.num_attention_heads * head_dim,
    )


def counts_of(batch: list[dict[str, Any]], task: Task) -> Counts:
    """Count what a batch needs; where tokens see their prefix alone, those that share it are one."""
    lengths = [len(example["input_ids"]) for example in batch]
    if task == "classification":
        return Counts(sum(lengths), len(batch), sum(length**2 for length in lengths))
    nodes: dict[tuple[int, int], int] = {}  # (node of the token before, token) -> its node
    targets: set[int] = set()
    pairs = 0
    for example in batch:
        node = -1
        labelled = zip(example["input_ids"], example["labels"], strict=True)
        for position, (token, label) in enumerate(labelled):
            if (node, token) not in nodes:
                nodes[node, token] = len(nodes)
                pairs += position + 1
            node = nodes[node, token]
            if label != IGNORED:
                targets.add(node)
    return Counts(len(nodes), len(targets), pairs)


def operations(shapes: Shapes, counts: Counts) -> int:
    """Return the floating-point operations that a batch needs."""
    head = shapes.head[0] * shapes.head[1] * counts.targets if shapes.head else 0
    # Scores and values forward; the gradients of values, weights, queries and keys backward.
    attention = 6 * 2 * shapes.attention_width * counts.pairs
    return 4 * shapes.weights * counts.tokens + 4 * head + attention


def sample_rate(shapes: Shapes, counts: Counts, dtype: torch.dtype) -> float:
    """Return the operations per second of `dtype` products in the model's shapes, as often as they occur.

    One sample, of about a second; :func:`settled` makes one figure of several.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [(shape, count, counts.tokens) for shape, count in shapes.linear.items()]
    if shapes.head:
        rows.append((shapes.head, 1, counts.targets))
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
    """Return the median of the faster half of samples.

    Whatever else runs on the machine makes a sample slower, never faster: the slower half may say more about
    that than about the machine. The fastest alone may be a moment at a clock that no training holds.
    """
    faster = sorted(rates, reverse=True)[: (len(rates) + 1) // 2]
    return median(faster)

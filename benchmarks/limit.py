"""The products that a batch cannot do without, and how fast this machine multiplies.

Needed are 4 operations per matmul weight for each distinct token: a product in its forward pass and one for its
gradient, a multiplication and an addition each. A prefix that examples of a batch share is one set of
distinct tokens. Not needed are the last token of an example, which predicts nothing and is seen by nothing, the
gradient of the embeddings, and in the last block all but keys and values of the tokens whose hidden states nothing
reads. To that come 4 per weight of the head for each token before a target, and
attention. The rate is that of products in the model's own shapes, forward and backward, on the same threads. No
training is faster.
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
    """The products of a model."""

    linear: dict[tuple[int, int], int]
    """(in, out) of the linear layers of the blocks -> how many there are."""
    first: int
    """Weights of the first block's projections to queries, keys and values, below which nothing needs a gradient."""
    last: int
    """Weights of the last block's other linear layers than those to keys and values."""
    head: tuple[int, int] | None
    """(in, vocabulary) of a language model's head."""
    attention_width: int
    """Width of the queries of one block."""
    blocks: int

    @property
    def weights(self) -> int:
        """Weights of the linear layers."""
        return sum(i * o * count for (i, o), count in self.linear.items())


@dataclass(frozen=True)
class Counts:
    """What of a batch has to be computed."""

    tokens: int
    """Distinct tokens with a target behind them: those with the same prefix are one."""
    read: int
    """Those of them whose last hidden states are read: of several targets behind one token the logits are one row."""
    pairs: int
    """Pairs of a distinct token and one that it attends to."""
    read_pairs: int
    """Those of them whose first token is read."""


def shapes_of(model: Any, task: Task) -> Shapes:
    """Read the shapes off a model."""
    # A classifier's pooler and head see one token of an example, and are nothing beside the blocks.
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
    """Count what a batch needs; where tokens see their prefix alone, those that share it are one."""
    lengths = [len(example["input_ids"]) for example in batch]
    if task == "classification":
        return Counts(
            tokens=sum(lengths),
            read=len(batch),
            pairs=sum(length**2 for length in lengths),
            read_pairs=sum(lengths),
        )
    nodes: dict[tuple[int, int], int] = {}  # (node of the token before, token) -> its node
    seen: dict[int, int] = {}  # node with a target behind it -> tokens that it sees
    read: set[int] = set()
    for example in batch:
        path = [-1]
        labelled = zip(example["input_ids"], example["labels"], strict=True)
        for token, label in labelled:
            node = nodes.setdefault((path[-1], token), len(nodes))
            if label != IGNORED and len(path) > 1:
                read.add(path[-1])
                seen |= {above: number for number, above in enumerate(path[1:], start=1)}
            path.append(node)
    return Counts(
        tokens=len(seen),
        read=len(read),
        pairs=sum(seen.values()),
        read_pairs=sum(seen[node] for node in read),
    )


def operations(shapes: Shapes, counts: Counts) -> int:
    """Return the floating-point operations that a batch needs."""
    head = shapes.head[0] * shapes.head[1] * counts.read if shapes.head else 0
    pairs = (shapes.blocks - 1) * counts.pairs + counts.read_pairs
    # Scores and values forward; the gradients of values, weights, queries and keys backward.
    attention = 6 * 2 * shapes.attention_width * pairs
    linear = 4 * shapes.weights * counts.tokens
    linear -= 2 * shapes.first * counts.tokens
    linear -= 4 * shapes.last * (counts.tokens - counts.read)
    return linear + 4 * head + attention


def sample_rate(shapes: Shapes, counts: Counts, dtype: torch.dtype) -> float:
    """Return the operations per second of `dtype` products in the model's shapes, as often as they occur.

    One sample, of about a second; :func:`settled` makes one figure of several.
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
    """Return the median of the faster half of samples.

    Whatever else runs on the machine makes a sample slower, never faster: the slower half may say more about
    that than about the machine. The fastest alone may be a moment at a clock that no training holds.
    """
    faster = sorted(rates, reverse=True)[: (len(rates) + 1) // 2]
    return median(faster)

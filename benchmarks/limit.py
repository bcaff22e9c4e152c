"""The limit of training speed: the operations and the bytes that a batch needs, and the rates of this machine.

A step takes at least as long as its products, and at least as long as its memory traffic. The limit is the slower of
the two. No training that computes every product once can be faster.

**Operations.** A batch needs 4 operations per matmul weight and distinct token: a multiplication and an addition, in
the forward and in the backward pass. A prefix that examples of a batch share counts once. The head needs 4 operations
per weight and token before a target. Attention adds its own products.

Three things are not needed:

- the last token of an example, which has no target and which no token attends to;
- the gradient of the embeddings;
- the last block, except keys and values, for tokens whose last hidden state is not read.

The rate is that of products in the model's own shapes, forward and backward, with the same threads.

**Bytes.** A batch needs, in the compute dtype:

- every matmul weight twice: read in the forward and again in the backward pass, those of the head included, without the
  weights of the first block whose input needs no gradient;
- the output of every linear layer twice, for the same tokens as the operations: written in the forward and read in the
  backward pass. Attention, gates and norms need it for their gradients, and no product is computed a second time. (The
  output of an addition, which a norm may read in its place, is as large.)

Everything else could stay in the cache: the inputs of layers, gradients, logits, the passes of separate element-wise
operations. The bound assumes that the weights and outputs together exceed the last-level cache many times, so that
none of them survives there from the forward to the backward pass. The weights alone of a small model (MiniLM) may
survive. They count all the same.

With gradient checkpointing, products are computed again, and the outputs need not be written. Then only the weights
count.

The rate counts the bytes that adding one array to another reads and writes, where both are larger than the cache.
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
from lorakit.models.float32_products import faster_float32
from lorakit.models.places import find_places
from lorakit.models.tree import is_inside

SECONDS_PER_PRODUCT = 0.05

ARRAY_BYTES = 2**27
"""Bytes of each of the two arrays that measure the bandwidth. Together they exceed the last-level cache."""
ADDITIONS = 5
"""Additions per sample of the bandwidth."""


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
    last_outputs: int
    """Outputs per token of the linear layers of the last block, without the key and value projections."""
    attention_width: int
    """Width of the queries of one block."""
    blocks: int

    @property
    def weights(self) -> int:
        """Total weights of the linear layers."""
        return sum(i * o * count for (i, o), count in self.linear.items())

    @property
    def outputs(self) -> int:
        """Total outputs per token of the linear layers."""
        return sum(o * count for (_, o), count in self.linear.items())


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

    def layers_of(block: str, among: set[str]) -> list[nn.Linear]:
        return [layer for path, layer in layers.items() if path in among and is_inside(path, block)]

    first = layers_of(blocks[0], to_any)
    last = layers_of(blocks[-1], layers.keys() - to_keys)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shapes(
        linear=dict(Counter((layer.in_features, layer.out_features) for layer in layers.values())),
        first=sum(layer.weight.numel() for layer in first),
        last=sum(layer.weight.numel() for layer in last),
        head=(config.hidden_size, config.vocab_size) if task == "completion" else None,
        last_outputs=sum(layer.out_features for layer in last),
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


def moved_bytes(
    shapes: Shapes, counts: Counts, dtype: torch.dtype, *, checkpointing: bool = False
) -> int:
    """Return the bytes that a batch must read from memory and write to it."""
    head = shapes.head[0] * shapes.head[1] if shapes.head else 0
    weights = 2 * (shapes.weights + head) - shapes.first
    outputs = shapes.outputs * counts.tokens
    outputs -= shapes.last_outputs * (counts.tokens - counts.read)
    return (weights + (0 if checkpointing else 2 * outputs)) * dtype.itemsize


@faster_float32()
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


def sample_bandwidth() -> float:
    """Return the bytes per second that an addition of large arrays reads and writes.

    Takes one sample of about a quarter of a second. :func:`settled` combines several samples.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Adding in place reads all that it writes. A copy would also read its target, which does not count.
    total = torch.ones(ARRAY_BYTES // 4, device=device)
    added = torch.ones_like(total)
    timer = Timer(
        "total.add_(added)",
        globals={"total": total, "added": added},
        num_threads=torch.get_num_threads(),
    )
    return 3 * ARRAY_BYTES / timer.timeit(ADDITIONS).median


def settled(rates: Sequence[float]) -> float:
    """Return the median of the faster half of the samples.

    Other processes make a sample slower, never faster, so the slower half is unreliable. The fastest sample
    may come from a boost clock that no training sustains.
    """
    faster = sorted(rates, reverse=True)[: (len(rates) + 1) // 2]
    return median(faster)

"""The products that a batch cannot do without, and how fast this machine multiplies.

Needed are 4 products of two operations per matmul weight for each distinct token: its forward pass and its
gradient, a multiplication and an addition each. A prefix that examples of a batch share is one set of
distinct tokens. To that come 4 per weight of the head for each target, and attention. The rate is that of
products in the model's own shapes, forward and backward, on the same threads. No training is faster.

python -m benchmarks.limit FOLDER    prints the rate and the seconds of each batch as JSON
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

from benchmarks.examples import IGNORED, Prepared
from benchmarks.systems import load_model
from lorakit.models.loading import compute_dtype

SECONDS_PER_SHAPE = 0.3


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


def shapes_of(prepared: Prepared) -> Shapes:
    """Read the shapes off the row's model."""
    model = load_model(prepared, "float32")
    # A classifier's pooler and head see one token of an example, and are nothing beside the blocks.
    linear = Counter(
        (layer.in_features, layer.out_features)
        for path, layer in model.base_model.named_modules()  # type: ignore[operator]
        if isinstance(layer, nn.Linear) and "pooler" not in path
    )
    config: Any = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    completes = prepared.workload.task == "completion"
    return Shapes(
        linear=dict(linear),
        head=(config.hidden_size, config.vocab_size) if completes else None,
        attention_width=config.num_hidden_layers * config.num_attention_heads * head_dim,
    )


def counts_of(prepared: Prepared, batch: list[dict[str, Any]]) -> Counts:
    """Count what a batch needs; where tokens see their prefix alone, those that share it are one."""
    lengths = [len(example["input_ids"]) for example in batch]
    if prepared.workload.task == "classification":
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


def rate(shapes: Shapes, counts: Counts, dtype: torch.dtype) -> float:
    """Return the operations per second of `dtype` products in the model's shapes, as often as they occur."""
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
            seconds += timer.blocked_autorange(min_run_time=SECONDS_PER_SHAPE).median * count
    return total / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--result", type=Path, help="write the figures here too")
    args = parser.parse_args()
    prepared = Prepared.read(args.folder)
    shapes, dtype = shapes_of(prepared), compute_dtype("auto")
    batches = prepared.in_order(prepared.workload.orders[-1])[prepared.workload.warmup :]
    counts = [counts_of(prepared, batch) for batch in batches]
    middle = sorted(counts, key=lambda c: c.tokens)[len(counts) // 2]
    per_second = rate(shapes, middle, dtype)
    figures = {
        "dtype": str(dtype).removeprefix("torch."),
        "rate": per_second,
        "threads": torch.get_num_threads(),
        "distinct_tokens": [c.tokens for c in counts],
        "targets": [c.targets for c in counts],
        "seconds": [operations(shapes, c) / per_second for c in counts],
        "tokens": prepared.tokens(prepared.workload.orders[-1])[prepared.workload.warmup :],
    }
    print(json.dumps(figures))
    if args.result:
        args.result.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()

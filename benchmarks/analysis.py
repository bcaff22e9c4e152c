"""Run time of the adapter measures against dense computation and against the limit of the machine.

Measures the spectrum of an adapter shaped like one of Llama 7B (rank 64 on all linear layers, random factors).
Then measures one layer of 4096 x 4096: spectrum, amplification and intruders, with lorakit and with full
decompositions.

python -m benchmarks.analysis [--quick]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks import report
from lorakit.analysis import amplification, intruders, spectrum

RANK = 64
WIDTH, INNER, BLOCKS = 4096, 11008, 32
LLAMA_7B = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]
"""(out, in) of the linear layers of a block."""
ROUNDS, QUICK_ROUNDS = 5, 2
QUICK_BLOCKS = 4


def main(*, quick: bool) -> None:
    """Run the measures, and write the tables."""
    report.say("\nanalysis: run time of the measures")
    torch.manual_seed(0)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    adapter = whole_adapter(QUICK_BLOCKS if quick else BLOCKS, rounds)
    layer = one_layer(rounds if quick else 3)
    sections = [
        report.Section(
            f"Spectrum of an adapter on all {adapter['matrices']} linear layers of a 7B model, rank {RANK}",
            adapter_table(adapter),
            "The limit is the time of the required operations (Gram matrices and their Cholesky factors, products, "
            "decompositions of rank x rank) at the rate of 2048 x 2048 products in float64.",
        ),
        report.Section(
            f"One layer of {WIDTH} x {WIDTH}",
            layer_table(layer),
            "Dense: full decompositions of the product, the base weight and the adapted weight, in float32, with "
            "the same number of threads.",
        ),
    ]
    record = {"machine": report.machine(), "adapter": adapter, "layer": layer}
    report.publish("analysis", record, sections, quick)


def whole_adapter(blocks: int, rounds: int) -> dict[str, Any]:
    """Time the spectra of all layers, interleaved with the rate of float64 products."""
    factors = [
        (torch.randn(RANK, n_in), torch.randn(n_out, RANK))
        for _ in range(blocks)
        for n_out, n_in in LLAMA_7B
    ]
    needed = sum(operations(A.shape[1], B.shape[0]) for A, B in factors)
    square = torch.randn(2048, 2048, dtype=torch.float64)
    seconds, rates = [], []
    for _ in range(rounds + 1):
        rates.append(2 * 2048**3 / seconds_of(lambda: square @ square))
        seconds.append(seconds_of(lambda: [spectrum(A, B, 0.5) for A, B in factors]))
    seconds, rates = seconds[1:], rates[1:]  # the first round warms up
    rate = median(rates)
    return {
        "matrices": len(factors),
        "operations": needed,
        "rate": rate,
        "limit": needed / rate,
        "seconds": median(seconds),
        "all_seconds": seconds,
    }


def operations(n_in: int, n_out: int) -> float:
    """Return the floating-point operations of one spectrum: two Gram matrices, and rank x rank work."""
    gram = 2 * RANK**2 * (n_in + n_out)
    # Two Cholesky factors, a product, and singular values.
    small = 2 * RANK**3 / 3 + 2 * RANK**3 + 8 * RANK**3 / 3
    return gram + small


def one_layer(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Time each measure of one layer with lorakit, and once with full decompositions."""
    W = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    A, B = torch.randn(8, WIDTH) / WIDTH**0.5, 4 * torch.randn(WIDTH, 8) / WIDTH**0.5
    wide_A, wide_B = torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK)
    ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        f"spectrum, rank {RANK}": (
            lambda: spectrum(wide_A, wide_B),
            lambda: torch.linalg.svdvals(wide_B @ wide_A),
        ),
        "amplification, rank 8": (
            lambda: amplification(W, A, B),
            lambda: dense_amplification(W, A, B),
        ),
        "intruders among 10, 8 present": (
            lambda: intruders(W, W + B @ A),
            lambda: dense_intruders(W, W + B @ A),
        ),
        "intruders among 10, none present": (
            lambda: intruders(W, W + 0.05 * B @ A),
            lambda: dense_intruders(W, W + 0.05 * B @ A),
        ),
    }
    times: dict[str, dict[str, list[float]]] = {}
    for name, (ours, dense) in ways.items():
        ours()  # warm up
        # One timing of the dense computation is enough, because it takes long.
        row = {"lorakit": [seconds_of(ours) for _ in range(rounds)], "dense": [seconds_of(dense)]}
        times[name] = row
        report.say(f"  {name}: {median(row['lorakit']):.3g} s, dense {median(row['dense']):.3g} s")
    return times


def dense_amplification(W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norms of W projected on the directions of B A, and on its own, by full decompositions."""
    U, _, Vh = torch.linalg.svd(B @ A)
    own = torch.linalg.svdvals(W)[: len(A)].norm()
    return (U[:, : len(A)].T @ W @ Vh[: len(A)].T).norm(), own


def dense_intruders(W: Tensor, adapted: Tensor) -> Tensor:
    """Return which of ten singular vectors are intruders, by algorithm 1 of Shuttleworth et al."""
    base, own = (torch.linalg.svd(M).U for M in (W, adapted))
    return (base.T @ own[:, :10]).abs().amax(0) < 0.5


def seconds_of(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def adapter_table(figures: dict[str, Any]) -> Table:
    table = report.table("", "operations", "rate", "limit", "lorakit", "times the limit")
    table.add_row(
        f"{figures['matrices']} matrices",
        f"{figures['operations'] / 1e9:.1f} G",
        f"{figures['rate'] / 1e9:.0f} G/s",
        f"{figures['limit']:.2f} s",
        f"{figures['seconds']:.2f} s",
        f"{figures['seconds'] / figures['limit']:.2f}",
    )
    return table


def layer_table(times: dict[str, dict[str, list[float]]]) -> Table:
    table = report.table("measure", "lorakit", "dense", "dense over lorakit")
    for name, row in times.items():
        ours, dense = median(row["lorakit"]), median(row["dense"])
        table.add_row(name, f"{ours:.4f} s", f"{dense:.2f} s", f"{dense / ours:.0f}")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="four blocks, two rounds")
    main(quick=parser.parse_args().quick)

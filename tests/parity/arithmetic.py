"""Reference implementation of LoRA's formulas in float64, written from the papers, without lorakit.

``W' = W + s B A`` (Hu et al. 2021), ``m W' / ||W'||`` row by row (DoRA, Liu et al. 2024), and
``W - W_r + s B A`` with W_r the best approximation of rank r (PiSSA, Meng et al. 2024).
"""

from __future__ import annotations

import tiny_models
import torch
from covering_array import fresh_model
from layouts import Rows
from torch import Tensor, nn

TIGHT = 1e-6
"""Tolerance of float64 logits: transformers computes some norms and softmaxes in float32."""


def float64_model(arch: str, head: str | None = None) -> nn.Module:
    model = fresh_model(arch, head or tiny_models.natural_head(arch)).double()
    model.config._experts_implementation = "eager"  # grouped products do not support float64
    return model


def inputs(arch: str, model: nn.Module) -> dict[str, Tensor]:
    """Return a batch without padding: some float64 softmaxes return NaN for fully masked rows."""
    batch = tiny_models.example_batch(arch, model)
    if "input_ids" in batch:
        batch["input_ids"][batch["input_ids"] == tiny_models.PAD] = 5
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    return {
        key: value.double() if value.is_floating_point() else value for key, value in batch.items()
    }


def low_rank(
    A: Tensor, B: Tensor, scaling: float, out: int, slices: tuple[Rows, ...] = ()
) -> Tensor:
    """Return ``s B A`` as an (out, in) matrix. The i-th slice uses the i-th group of rows of A and of B."""
    delta = torch.zeros(out, A.shape[1], dtype=torch.float64)
    slices = slices or (tuple(range(out)),)
    rank, start = A.shape[0] // len(slices), 0
    for i, rows in enumerate(slices):
        slice_A, slice_B = A[i * rank : (i + 1) * rank], B[start : start + len(rows)]
        delta[list(rows)] = scaling * (slice_B.double() @ slice_A.double())
        start += len(rows)
    return delta


def convolution(A: Tensor, B: Tensor, scaling: float, groups: int) -> Tensor:
    """Return ``dW[o] = s sum_r B[o, r] A[r]``, where an output channel uses only the r of its group."""
    out, per_group = B.shape[:2]
    delta = torch.zeros(out, *A.shape[1:], dtype=torch.float64)
    for o in range(out):
        group = o // (out // groups)
        for r in range(per_group):
            delta[o] += scaling * B[o, r].double().item() * A[group * per_group + r].double()
    return delta


def rescaled(weight: Tensor, magnitude: Tensor, slices: tuple[Rows, ...] = ()) -> Tensor:
    """Return ``W + dW`` with the norm of each adapted row set to its magnitude (DoRA)."""
    weight = weight.clone()
    rows = [row for indices in slices for row in indices] or range(len(weight))
    for row, length in zip(rows, magnitude.double(), strict=True):
        weight[row] *= length / weight[row].square().sum().sqrt()
    return weight


def principal(W: Tensor, rank: int, slices: tuple[Rows, ...] = ()) -> Tensor:
    """Return the best approximation of rank r to the matrix, or to each slice of its rows."""
    best = torch.zeros_like(W)
    for rows in slices or (tuple(range(len(W))),):
        U, S, Vh = torch.linalg.svd(W[list(rows)], full_matrices=False)
        best[list(rows)] = sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in range(rank))
    return best


def set_matrix(layer: nn.Module, matrix: Tensor) -> None:
    """Set the layer's weight to a new parameter from an (out, in) matrix, in the layer's layout."""
    transposed = isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"
    name = "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"
    matrix = matrix.T if transposed else matrix
    setattr(layer, name, nn.Parameter(matrix.reshape(getattr(layer, name).shape).contiguous()))


def matrix_of(layer: nn.Module) -> Tensor:
    """Return the layer's weight as an (out, in) matrix."""
    if isinstance(layer, nn.MultiheadAttention):
        return layer.in_proj_weight.detach().clone()
    transposed = isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"
    weight = layer.weight.detach().clone()
    return weight.T if transposed else weight.flatten(1)

"""AdamW with the parameter groups that LoRA+ and weight decay need."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lorakit.models.sharding import is_sharded, local_part
from lorakit.training.config import OptimizerConfig


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, peak_rate: float
) -> torch.optim.AdamW:
    """Return AdamW over the named `parameters`, in groups: B or not B, with or without decay, sharded or not.

    A group's ``peak`` is its peak learning rate. For B it is `lr_ratio` times that of the other parameters (LoRA+,
    Hayou et al. 2024, equation 6). Vectors have no weight decay: biases, norms, DoRA's magnitudes.
    """
    groups: dict[tuple[bool, bool, bool], dict] = {}
    for name, parameter in parameters.items():
        is_b, decays = name.endswith("lora_B"), parameter.ndim > 1
        group = groups.setdefault(
            (is_b, decays, is_sharded(parameter)),  # one update takes sharded tensors or others
            {
                "params": [],
                "names": [],
                "peak": peak_rate * (config.lr_ratio if is_b else 1.0),
                "weight_decay": config.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    # An adapter has hundreds of small tensors: separate updates would spend more on overhead than on arithmetic.
    return torch.optim.AdamW(
        list(groups.values()), lr=peak_rate, betas=config.betas, eps=config.eps, fused=True
    )


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set each group's learning rate to `factor` times its peak; return the lowest (A's, unless `lr_ratio` < 1)."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]
    return min(group["lr"] for group in optimizer.param_groups)


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float, square: float = 0.0) -> float:
    """Scale all gradients down to a joint norm of at most `limit` (0: no limit); return the norm before scaling.

    `square` is the squared norm of the gradients that are sharded over processes.
    """
    gradients = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    norm = nn.utils.get_total_norm([gradient for gradient in gradients if not is_sharded(gradient)])
    if square:
        norm = torch.hypot(norm.double(), norm.new_tensor(square, dtype=torch.float64).sqrt())
    if limit and gradients:
        factor = torch.clamp(limit / (norm + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_
        parts = list(map(local_part, gradients))
        torch._foreach_mul_(parts, factor)  # pyright: ignore[reportPrivateImportUsage]
    return float(norm)


def slow_down(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply the peak learning rate of all groups by `factor`."""
    for group in optimizer.param_groups:
        group["peak"] *= factor

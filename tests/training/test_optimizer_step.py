"""A step of a run, compared with a plain loop over single examples in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_runs
import torch

from lorakit.training.config import OptimizerConfig
from lorakit.training.job import Job
from lorakit.training.setup import prepare
from lorakit.training.step import optimizer_step

RATE = 1e-2
FACTORS = (1 / 2, 1.0, 1.0, 1 / 2)  # two steps of warm-up, then linear to 0 after the fourth
CLIP, RATIO, DECAY, BETAS, EPS = 0.05, 4.0, 0.1, (0.7, 0.95), 1e-3


def noisy(folder: Path, base: str) -> Job:
    """Prepare a run in float64, with adapters that are not zero."""
    optimizer = OptimizerConfig(
        learning_rate=RATE,
        schedule="linear",
        warmup=2,
        clip=CLIP,
        lr_ratio=RATIO,
        weight_decay=DECAY,
        betas=BETAS,
        eps=EPS,
    )
    job = prepare(tiny_runs.config(folder, base, optimizer=optimizer, max_steps=len(FACTORS)))
    job.model.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in job.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator).double(), alpha=0.1)
    return job


@pytest.mark.slow
def test_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    base = tiny_runs.save_base(tmp_path / "base")  # without dropout
    job, plain = noisy(tmp_path, base), noisy(tmp_path, base)
    is_b = {name: name.endswith("lora_B") for name in plain.parameters}
    groups = [
        {"params": [p for name, p in plain.parameters.items() if is_b[name] == b], "lr": RATE}
        for b in (False, True)
    ]
    adamw = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, weight_decay=DECAY)
    clipped = 0
    for step, examples in enumerate(job.step_plan.steps()):
        done = optimizer_step(job, examples, step)
        losses = [tiny_runs.summed_loss(plain.model, plain.train[i]) for i in examples]
        loss = sum(value for value, _ in losses) / sum(count for _, count in losses)
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters.values(), CLIP)
        clipped += float(norm) > CLIP
        for group, ratio in zip(adamw.param_groups, (1.0, RATIO), strict=True):
            group["lr"] = RATE * ratio * FACTORS[step]
        adamw.step()
        assert done.loss == pytest.approx(loss.item(), rel=1e-10)
        assert done.norm == pytest.approx(float(norm), rel=1e-9)
        assert done.rate == pytest.approx(RATE * FACTORS[step])
    assert clipped == len(FACTORS)
    for name, parameter in job.parameters.items():
        torch.testing.assert_close(parameter, plain.parameters[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("arch", "method"), [("t5", "lora"), ("llama", "prefix_embedding"), ("llama", "lora")]
)
def test_the_tokens_are_those_of_the_examples(arch: str, method: str, tmp_path: Path) -> None:
    """As in the plan: an encoder-decoder's answer counts, and virtual tokens do not."""
    base = tiny_runs.save_base(tmp_path / "base", arch)
    job = prepare(tiny_runs.config(tmp_path, base, method=method, max_steps=1))
    examples = next(iter(job.step_plan.steps()))
    done = optimizer_step(job, examples, 0)
    assert done.tokens == sum(len(job.train[i]) for i in examples)
    if arch == "t5":
        assert done.computed_tokens >= done.tokens

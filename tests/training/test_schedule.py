from __future__ import annotations

import pytest
import torch

from lorakit.data.batches import BatchSampler
from lorakit.errors import ConfigurationError, LorakitError
from lorakit.training.config import OptimizerConfig
from lorakit.training.divergence import require_finite
from lorakit.training.optimizer import build_optimizer, clip_gradients, set_rate
from lorakit.training.schedule import StepPlan, rate_factor


def factors(schedule, warmup, total=10):
    return [rate_factor(s, total=total, warmup=warmup, schedule=schedule) for s in range(total)]


def test_linear_rises_then_falls_to_the_step_after_the_last() -> None:
    assert factors("linear", 2, 6) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_warmup_is_a_share_below_one_and_a_number_of_steps_from_one_on() -> None:
    assert factors("constant", 0.4) == factors("constant", 4) == [0.25, 0.5, 0.75, *[1.0] * 7]


@pytest.mark.parametrize("share", [0.07, 0.14, 0.28, 0.55, 0.56])
def test_a_share_of_a_hundred_steps_is_exact(share: float) -> None:
    """Each product with 100 is a little above a whole number."""
    assert 1.0 in factors("linear", share, 100)[: round(100 * share)]
    assert factors("constant", share, 100).index(1.0) == round(100 * share) - 1


def test_cosine_is_half_way_down_in_the_middle() -> None:
    values = factors("cosine", 0)
    assert values[0] == 1.0
    assert values[5] == pytest.approx(0.5)
    assert values == sorted(values, reverse=True)
    assert values[-1] > 0


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.03, 1.0, 10, 50])
def test_every_step_moves_the_weights(schedule, warmup) -> None:
    assert all(0 < factor <= 1 for factor in factors(schedule, warmup))


def plan(**settings) -> StepPlan:
    """25 examples in steps of 8."""
    settings = {"epochs": 2.0, "max_steps": None, **settings}
    return StepPlan(BatchSampler([5] * 25, batch_size=8, seed=1), **settings)


def test_an_epoch_visits_each_example_once_and_one_step_is_shorter() -> None:
    steps = list(plan(epochs=1).steps())
    assert sorted(map(len, steps)) == [1, 8, 8, 8]
    assert sorted(i for step in steps for i in step) == list(range(25))


@pytest.mark.parametrize("start", range(8))
def test_steps_from_the_middle_are_the_rest_of_all_steps(start: int) -> None:
    assert list(plan().steps(start)) == list(plan().steps())[start:]


def test_max_steps_replaces_epochs() -> None:
    assert plan().total == 8
    assert plan(epochs=0.5).total == 2
    assert plan(max_steps=11).total == len(list(plan(max_steps=11).steps())) == 11


def named_parameters():
    return {
        "q.lora_A": torch.nn.Parameter(torch.ones(2, 3)),
        "q.lora_B": torch.nn.Parameter(torch.ones(3, 2)),
        "q.bias": torch.nn.Parameter(torch.ones(3)),
    }


def test_lora_plus_gives_b_its_own_rate_and_vectors_do_not_decay() -> None:
    parameters = named_parameters()
    optimizer = build_optimizer(parameters, OptimizerConfig(lr_ratio=16, weight_decay=0.1), 1e-3)
    assert set_rate(optimizer, 0.5) == 5e-4
    groups = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["names"]
    }
    assert groups == {"q.lora_A": (5e-4, 0.1), "q.lora_B": (8e-3, 0.1), "q.bias": (5e-4, 0.0)}
    # Adam's first step equals the learning rate for any size of gradient.
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    moved = {name: float((1 - p).detach().flatten()[0]) for name, p in parameters.items()}
    assert moved["q.bias"] == pytest.approx(5e-4, rel=1e-4)
    assert moved["q.lora_B"] == pytest.approx(8e-3 * 1.1, rel=1e-3)


def test_clipping_scales_all_gradients_together_and_zero_leaves_them() -> None:
    optimizer = build_optimizer(parameters := named_parameters(), OptimizerConfig(), 1e-3)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    assert clip_gradients(optimizer, 0) == pytest.approx(15**0.5)
    assert parameters["q.bias"].grad.tolist() == [1, 1, 1]
    assert clip_gradients(optimizer, 1.0) == pytest.approx(15**0.5)
    squares = sum(float(p.grad.square().sum()) for p in parameters.values())
    assert squares == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_divergence_names_the_step_and_what_to_try(loss: float, norm: float) -> None:
    with pytest.raises(LorakitError, match=r"diverged at step 12.*Lower optimizer.learning_rate"):
        require_finite(11, loss, norm, 1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"lr_ratio": 0.0},
        {"warmup": -0.1},
        {"warmup": 2.5},
        {"weight_decay": -1.0},
        {"clip": -1.0},
        {"betas": (0.9, 1.0)},
        {"schedule": "cubic"},
    ],
)
def test_settings_that_cannot_work_name_themselves(settings) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        OptimizerConfig(**settings)

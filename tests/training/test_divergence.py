"""A run that diverges stops, or goes back to a good checkpoint with half the learning rate."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import Crash, adapter_bytes

from lorakit.errors import ConfigurationError, DivergenceError
from lorakit.reporting.run_record import read_run
from lorakit.reporting.run_summary import summary
from lorakit.training import loop
from lorakit.training.checkpoint import KEPT_LOSSES, State
from lorakit.training.config import CheckpointConfig, HeldOutConfig, OptimizerConfig, TrainConfig
from lorakit.training.divergence import (
    LASTING,
    last_good_step,
    require_finite,
    require_no_explosion,
)
from lorakit.training.events import record_rewind
from lorakit.training.loop import train

PEAK = 2e-2


def settings(folder: Path, base: str, **overrides: Any) -> TrainConfig:
    """A run of 18 steps with dropout, and a checkpoint every 3 steps."""
    optimizer = OptimizerConfig(learning_rate=PEAK, schedule="constant", on_divergence="rewind")
    return tiny_runs.config(
        folder,
        base,
        **{"optimizer": optimizer, "evaluation": HeldOutConfig(every=5), **overrides},
    )


def diverge(patch: pytest.MonkeyPatch, at: int, *, above: float = 0.6 * PEAK) -> None:
    """Let the loss of a step be NaN while the peak learning rate is above a limit."""
    original = loop.optimizer_step

    def step(*args: Any) -> Any:
        job, number = args[0], args[2]
        peak = job.optimizer.param_groups[0]["peak"]
        done = original(*args)
        if number + 1 == at and peak > above:
            require_finite(number, math.nan, 1.0, peak)
        return done

    patch.setattr(loop, "optimizer_step", step)


def crash(patch: pytest.MonkeyPatch, at: int) -> None:
    """Crash before a step with half the learning rate."""
    original = loop.optimizer_step

    def step(*args: Any) -> Any:
        if args[2] + 1 == at and args[0].optimizer.param_groups[0]["peak"] < PEAK:
            raise Crash
        return original(*args)

    patch.setattr(loop, "optimizer_step", step)


def records(run: Path, split: str = "train") -> list[dict[str, Any]]:
    found = tiny_runs.metrics(run, split)
    return [{k: v for k, v in record.items() if k != "seconds"} for record in found]


def events(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "events.json").read_text())["events"]


# --- rewind ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, base: str) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(settings(folder, base))
    return folder / "run"


@pytest.fixture(scope="module")
def rewound(tmp_path_factory: pytest.TempPathFactory, base: str) -> Path:
    """A run that diverges at step 11, and goes back to step 9."""
    folder = tmp_path_factory.mktemp("rewound")
    with pytest.MonkeyPatch.context() as patch:
        diverge(patch, at=11)
        train(settings(folder, base))
    return folder / "run"


@pytest.mark.slow
def test_a_run_goes_back_to_the_newest_good_checkpoint(undisturbed: Path, rewound: Path) -> None:
    usual, halved = records(undisturbed), records(rewound)
    assert [r["step"] for r in halved] == [*range(1, 19)]
    assert halved[:9] == usual[:9]
    assert [r["learning_rate"] for r in halved[9:]] == [PEAK / 2] * 9
    # Weights, optimizer and dropout are those of step 9.
    assert halved[9]["loss"] == usual[9]["loss"]
    assert halved[9]["gradient_norm"] == usual[9]["gradient_norm"]
    assert halved[10]["loss"] != usual[10]["loss"]
    assert [r["step"] for r in records(rewound, "validation")] == [0, 5, 10, 15, 18]
    assert events(rewound) == [
        {
            "event": "rewind",
            "step": 9,
            "from_step": 10,
            "learning_rate": PEAK / 2,
            "reason": "Training diverged at step 11: the loss is nan and the gradient norm 1, at learning rate 0.02",
        }
    ]
    assert not (undisturbed / "events.json").exists()
    (sentence,) = [s for s in summary(read_run(rewound)) if "diverged" in s]
    assert sentence.endswith("went back to step 9 and continued with half the learning rate.")


@pytest.mark.slow
@pytest.mark.parametrize("at", [10, 12, 14])
def test_a_resumed_run_keeps_the_lower_rate(
    tmp_path: Path, base: str, rewound: Path, at: int
) -> None:
    """Killed before the first, the third and the fifth step after the rewind; steps 12 and 15 have checkpoints."""
    config = settings(tmp_path, base)
    with pytest.MonkeyPatch.context() as patch:
        diverge(patch, at=11)
        crash(patch, at)
        with pytest.raises(Crash):
            train(config)
    train(dataclasses.replace(config, resume=True))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(rewound)
    assert records(tmp_path / "run") == records(rewound)
    assert events(tmp_path / "run") == events(rewound)


@pytest.mark.slow
def test_the_loggers_stay_open(tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of Weights & Biases has the steps before and after; TensorBoard hides those before."""
    opened: list[list[int]] = []

    def init(**_: Any) -> SimpleNamespace:
        opened.append([])
        return SimpleNamespace(
            define_metric=lambda *_, **__: None,
            log=lambda values: opened[-1].append(values["step"]),
            finish=lambda exit_code: opened[-1].append(-1 - exit_code),
        )

    wandb = SimpleNamespace(login=lambda: None, init=init)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    diverge(monkeypatch, at=5)
    config = settings(tmp_path, base, max_steps=6, evaluation=HeldOutConfig(every=6))
    train(dataclasses.replace(config, loggers=("wandb", "tensorboard")))
    assert opened == [[0, 1, 2, 3, 4, 4, 5, 6, 6, -1]]
    accumulator = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    accumulator.Reload()
    shown = accumulator.Scalars("train/loss")
    assert [event.step for event in shown] == [1, 2, 3, 4, 5, 6]
    losses = [record["loss"] for record in records(tmp_path / "run")]
    assert [event.value for event in shown] == pytest.approx(losses)


@pytest.mark.slow
def test_a_run_without_checkpoints_goes_back_to_its_start(
    tmp_path: Path, base: str, undisturbed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        diverge(patch, at=2)
        train(settings(tmp_path, base))
    halved, usual = records(tmp_path / "run"), records(undisturbed)
    assert [r["learning_rate"] for r in halved] == [PEAK / 2] * 18
    assert halved[0]["loss"] == usual[0]["loss"]
    assert records(tmp_path / "run", "validation")[0] == records(undisturbed, "validation")[0]
    (line,) = [r.getMessage() for r in caplog.records if r.name == loop.__name__]
    assert line == (
        "Training diverged at step 2: the loss is nan and the gradient norm 1, at learning rate 0.02. Back to step 0, "
        "with half the learning rate: 0.01 at its peak."
    )


@pytest.mark.slow
def test_the_fourth_time_a_run_stops(tmp_path: Path, base: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        diverge(patch, at=5, above=0)
        with pytest.raises(DivergenceError, match=r"diverged at step 5.*gone back .* 3 times"):
            train(settings(tmp_path, base))
    assert [event["learning_rate"] / PEAK for event in events(tmp_path / "run")] == [
        0.5,
        0.25,
        1 / 8,
    ]
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
def test_a_checkpoint_with_the_same_weights_is_not_good(tmp_path: Path, base: str) -> None:
    """Before the first step, a lower rate changes nothing. Then the default stops, and a resumed run may go back."""
    with pytest.MonkeyPatch.context() as patch:
        diverge(patch, at=1)
        with pytest.raises(DivergenceError, match=r"diverged at step 1.* No checkpoint is old"):
            train(settings(tmp_path, base))
    assert not (tmp_path / "run" / "events.json").exists()


@pytest.mark.slow
def test_a_stopped_run_can_be_resumed_to_go_back(tmp_path: Path, base: str, rewound: Path) -> None:
    config = settings(tmp_path, base)
    stopping = dataclasses.replace(config.optimizer, on_divergence="stop")
    with pytest.MonkeyPatch.context() as patch:
        diverge(patch, at=11)
        with pytest.raises(DivergenceError, match="diverged at step 11"):
            train(dataclasses.replace(config, optimizer=stopping))
        train(dataclasses.replace(config, resume=True))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(rewound)


@pytest.mark.slow
@pytest.mark.parametrize("on_divergence", ["stop", "rewind"])
def test_weights_that_are_not_finite_never_reach_a_checkpoint(
    tmp_path: Path, base: str, on_divergence: Any
) -> None:
    original = loop.optimizer_step

    def step(*args: Any) -> Any:
        done = original(*args)
        if args[2] + 1 == 6 and args[0].optimizer.param_groups[0]["peak"] == PEAK:
            next(iter(args[0].parameters.values())).data[0] = math.inf
        return done

    config = settings(tmp_path, base, max_steps=7)
    optimizer = dataclasses.replace(config.optimizer, on_divergence=on_divergence)
    config = dataclasses.replace(config, optimizer=optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "optimizer_step", step)
        if on_divergence == "stop":
            with pytest.raises(
                DivergenceError, match=r"after step 6 .*lora_A has .*new run .*from_adapter"
            ):
                train(config)
            checkpoints = tmp_path / "run" / "checkpoints"
            names = sorted(path.name for path in checkpoints.iterdir())
            assert names == ["step-000003", "step-000005"]  # the latter has the best scores
        else:
            train(config)
            (event,) = events(tmp_path / "run")
            assert (event["step"], event["from_step"]) == (5, 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "keep", "to"),
    [
        (5, 5, 20),
        (5, 1, 20),  # all kept by number are of the last 10 steps
        (1, 2, 17),
    ],
)
def test_an_exploded_run_goes_back_to_before_its_first_high_loss(
    tmp_path: Path, base: str, every: int, keep: int, to: int
) -> None:
    original = loop.optimizer_step

    def step(*args: Any) -> Any:
        done = original(*args)
        high = args[2] + 1 >= 25 and args[0].optimizer.param_groups[0]["peak"] == PEAK
        return dataclasses.replace(done, loss=100 + args[2]) if high else done

    config = settings(
        tmp_path,
        base,
        max_steps=36,
        evaluation=HeldOutConfig(every=36),
        checkpoints=CheckpointConfig(every=every, keep=keep),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "optimizer_step", step)
        train(config)
    (event,) = events(tmp_path / "run")
    assert (event["step"], event["from_step"]) == (to, 34)
    assert "in each of the last 10 steps it was more than 3 times the usual" in event["reason"]
    assert [r["step"] for r in records(tmp_path / "run")] == [*range(1, 37)]
    assert max(r["loss"] for r in records(tmp_path / "run")) < 100


def test_the_best_adapter_stays_and_its_patience_goes_back() -> None:
    """The folder best/ has the adapter of step 35, which the run has left."""
    restored = State(step=30, best_step=20, best_scores={"loss": 2.0}, without_best=1)
    diverged = State(
        step=40,
        best_step=35,
        best_scores={"loss": 1.0},
        without_best=0,
        batch_sizes=[[4, 8]],
        events=[{"event": "out of memory", "step": 36}],
    )
    record_rewind(restored, diverged, DivergenceError("Diverged. Lower the rate."), 1e-3)
    assert (restored.step, restored.best_step, restored.best_scores) == (30, 35, {"loss": 1.0})
    assert restored.without_best == 1
    assert restored.batch_sizes == [[4, 8]]
    assert [event["step"] for event in restored.events] == [36, 30]


# --- exploding losses -----------------------------------------------------------------------------


def first_explosion(losses: list[float], factor: float = 3.0) -> int | None:
    """Return the step at which a run with these losses has exploded; None if it never does."""
    state = State()
    for loss in losses:
        state.advance(loss, tokens=1, computed_tokens=1, seconds=0.0, processor_seconds=0.0)
        try:
            require_no_explosion(state, factor)
        except DivergenceError:
            return state.step
    assert len(state.losses) <= KEPT_LOSSES
    return None


def falling(steps: int, start: float, end: float, noise: float, seed: int) -> list[float]:
    """A loss that falls exponentially, with log-normal noise."""
    draw = random.Random(seed)
    return [
        end + (start - end) * math.exp(-5 * i / steps) * math.exp(draw.gauss(0, noise))
        for i in range(steps)
    ]


NORMAL = {
    "language model": [falling(3000, 3.5, 1.5, 0.3, seed) for seed in range(5)],
    "single examples": [falling(3000, 3.5, 1.0, 1.0, seed) for seed in range(5)],
    # A classifier that knows its data, with a wrong label here and there, and a new epoch of them.
    "learnt by heart": [[0.69] * 100 + [1e-5] * 500 + [1e-5, 2.0] * 50 + [0.5] * 30 + [1e-5] * 99],
    "hard batches": [([2.0] * 40 + [30.0] * 9) * 20],
    "squared errors of single examples": [
        [random.Random(f"{seed} {i}").gauss(0, 1) ** 2 for i in range(3000)] for seed in range(5)
    ],
    "twice the loss": [[2.0] * 50 + [4.5] * 200],
    "no loss": [[0.0] * 100],
}


@pytest.mark.parametrize("kind", NORMAL)
def test_normal_losses_do_not_explode(kind: str) -> None:
    for losses in NORMAL[kind]:
        assert first_explosion(losses) is None


@pytest.mark.parametrize("start", [LASTING, 19, 500])
def test_a_loss_that_stays_high_has_exploded_after_ten_steps(start: int) -> None:
    losses = [*falling(500, 2.5, 2.0, 0.1, 0)[:start], *[10.8] * 60]
    assert first_explosion(losses) == start + LASTING
    assert first_explosion(losses, factor=0) is None
    assert first_explosion(losses, factor=6) is None


def test_the_last_good_step_is_before_the_first_high_loss() -> None:
    state = State()
    for loss in [2.0] * 30 + [50.0] * LASTING:
        state.advance(loss, tokens=1, computed_tokens=1, seconds=0.0, processor_seconds=0.0)
    with pytest.raises(DivergenceError, match=r"at step 40: the loss is 50, .* the usual 2\. "):
        require_no_explosion(state, 3.0)
    # The update of step 30 led to the loss of step 31.
    assert last_good_step(state, 3.0) == 29
    assert last_good_step(State(step=7, losses=[2.0] * 7), 3.0) == 6


def test_a_resumed_run_decides_alike() -> None:
    state = State()
    for loss in [2.0] * 100 + [50.0] * (LASTING - 1):
        state.advance(loss, tokens=1, computed_tokens=1, seconds=0.0, processor_seconds=0.0)
        require_no_explosion(state, 3.0)
    restored = State(**json.loads(json.dumps(dataclasses.asdict(state))))
    restored.advance(50.0, tokens=1, computed_tokens=1, seconds=0.0, processor_seconds=0.0)
    with pytest.raises(DivergenceError, match="more than 3 times"):
        require_no_explosion(restored, 3.0)


@pytest.mark.parametrize("factor", [1.0, 0.5, -1.0])
def test_a_factor_that_every_loss_exceeds(factor: float) -> None:
    with pytest.raises(ConfigurationError, match=r"optimizer.explosion is .*; it must be"):
        OptimizerConfig(explosion=factor)


def test_a_held_out_loss_that_is_not_finite_names_the_learning_rate(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation can follow the bad update before the next step does."""
    original = loop.optimizer_step

    def step(*args: Any) -> Any:
        done = original(*args)
        next(iter(args[0].parameters.values())).data[0] = math.nan
        return done

    monkeypatch.setattr(loop, "optimizer_step", step)
    config = tiny_runs.config(tmp_path, base, max_steps=2, evaluation=HeldOutConfig(every=1))
    with pytest.raises(DivergenceError, match=r"step 1: the held-out loss .*Lower optimizer\.lear"):
        train(config)

"""Decoding steps with slots compute what the layers compute one adapter after the other."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tiny_models
import torch
from random_adapters import randomise
from tiny_models import logits_with_cache
from torch import Tensor
from transformers import DynamicCache

from lorakit.adapters import Adapters, attach, slots
from lorakit.adapters.attach import handle_for
from lorakit.adapters.choice import AdapterChoice
from lorakit.adapters.slots import Slots
from lorakit.methods import LoRA

METHODS = {
    "a": LoRA(rank=2, alpha=3, targets="all-linear"),
    "b": LoRA(rank=3, alpha=-2, targets="attention.qv"),
    "c": LoRA(rank=1, alpha=4, targets=("mlp", "attention.q")),
    "dora": LoRA(rank=2, dora=True, targets="attention.q"),
}
CHOICES: Sequence[AdapterChoice] = [
    *(None, "a", "b", "c", "dora"),
    *({"a": 0.5, "b": -2.0}, {"c": 0.3}, {"c": 1.0, "a": 0.0}),
]
PROMPT = 5


def adapted(arch: str = "llama", *names: str) -> Adapters:
    model = tiny_models.build(arch)
    for seed, name in enumerate(names or METHODS):
        randomise(attach(model, METHODS[name], name=name, seed=seed), name, seed=seed)
    adapters = handle_for(model)
    adapters.activate(None)
    model.double()
    return adapters


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 99, shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def without_slots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "MOST_TOKENS", 0)
        yield


def steps(adapters: Adapters, batches: Sequence[Sequence[AdapterChoice]]) -> Tensor:
    """Return the logits of steps after a prompt, each with a block of its own and the same slots."""
    model: Any = adapters.model
    cache, kept, logits = DynamicCache(config=model.config), Slots(), []
    with torch.no_grad():
        logits_with_cache(model, ids(len(batches[0]), PROMPT), cache)
        for step, rows in enumerate(batches):
            with adapters.per_token([(row, 1) for row in rows], slots=kept):
                x = ids(len(rows), 1, seed=step)
                logits.append(logits_with_cache(model, x, cache)[:, -1])
    return torch.stack(logits)


def compositions(
    seed: int, choices: Sequence[AdapterChoice] = CHOICES
) -> list[list[AdapterChoice]]:
    """Return random rows. Each composition stays for two steps."""
    chosen = random.Random(seed)
    return [rows for _ in range(6) for rows in [chosen.choices(choices, k=9)] * 2]


@pytest.mark.parametrize("seed", range(4))
def test_steps_of_changing_rows(seed: int) -> None:
    adapters = adapted()
    batches = compositions(seed)
    found = steps(adapters, batches)
    with without_slots():
        torch.testing.assert_close(found, steps(adapters, batches))


@pytest.mark.parametrize("arch", ["gpt2", "gpt-neox", "qwen3"])
def test_architectures(arch: str) -> None:
    adapters = adapted(arch, "a", "b")
    batches = compositions(0, [None, "a", "b", {"a": 0.5, "b": 2.0}])
    found = steps(adapters, batches)
    with without_slots():
        torch.testing.assert_close(found, steps(adapters, batches))


def test_slots_are_used() -> None:
    """The products of a step come from the slots alone: without the layers' own they are the same."""
    adapters = adapted("llama", "a", "b")
    expected = steps(adapters, [["a", "b"]] * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorakit.adapters.layer_adapters.lora_linear", None)
        torch.testing.assert_close(steps(adapters, [["a", "b"]] * 2), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spans", [("a", "b", None), ("a", "b", None, "b", "b", "a")])
def test_nan_of_one_adapter_stays_in_its_tokens(value: float, spans: tuple) -> None:
    adapters = adapted("llama", "a", "b")
    expected = steps(adapters, [spans])
    with torch.no_grad():
        for module in adapters.modules("a").values():
            module.lora_A.fill_(value)  # type: ignore[operator]
    found = steps(adapters, [spans])
    others = [i for i, name in enumerate(spans) if name != "a"]
    torch.testing.assert_close(found[:, others], expected[:, others])
    assert found[:, 0].isnan().all()


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("choice", ["a", "dora"])
def test_generate_with_one_adapter(beams: int, choice: str) -> None:
    adapters = adapted()
    adapters.activate(choice)
    model: Any = adapters.model
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    found = model.generate(ids(3, PROMPT), **options)
    with without_slots():
        assert found.equal(model.generate(ids(3, PROMPT), **options))


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_an_adapter_for_each_row(beams: int) -> None:
    adapters = adapted()
    model: Any = adapters.model
    rows = ["a", None, "dora", {"a": 0.5, "b": 1.0}]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    with adapters.per_sample(rows):
        found = model.generate(ids(4, PROMPT), **options)
    for i, row in enumerate(rows):
        adapters.activate(row)
        assert found[i].equal(model.generate(ids(4, PROMPT)[i : i + 1], **options)[0])


def test_bfloat16_rounds_no_more_than_layer_by_layer() -> None:
    adapters = adapted("llama", "a", "b", "c")
    batches = compositions(1, ["a", "b", "c", None])
    exact = steps(adapters, batches)
    adapters.model.to(torch.bfloat16)
    for name in "abc":
        for parameter in adapters.modules(name).values():
            parameter.float()
    error = (steps(adapters, batches) - exact).norm()
    with without_slots():
        assert error <= 1.05 * (steps(adapters, batches) - exact).norm()


def test_an_optimizer_step_inside_the_block() -> None:
    """A pass with gradients drops the slots, so the next evaluation reads the new numbers."""
    adapters = adapted("llama", "a", "b")
    model: Any = adapters.model
    parameters = [p for name in "ab" for p in adapters.trainable_parameters(name)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with adapters.per_sample(["a", "b"]):
        with torch.no_grad():
            model(ids(2, 2))
        model(ids(2, 2)).logits.square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            found = model(ids(2, 2)).logits
    with torch.no_grad(), adapters.per_sample(["a", "b"]):
        torch.testing.assert_close(found, model(ids(2, 2)).logits)


def test_more_adapters_than_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapted("llama", "a", "b", "c")
    batches = compositions(2, ["a", "b", "c", {"a": 0.5}, None])
    expected = steps(adapters, batches)
    monkeypatch.setattr(slots, "MOST_SLOTS", 2)
    torch.testing.assert_close(steps(adapters, batches), expected)

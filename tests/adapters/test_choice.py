"""Which adapter acts: for all threads, for one thread or task, and for all passes of a generation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import own_loop
import pytest
import tiny_models
import torch
from random_adapters import randomise
from torch import Tensor, nn

from lorakit.adapters import Adapters, attach
from lorakit.errors import AdapterStateError
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.method import LoRA

IDS = torch.arange(3, 17).view(2, 7)


class Toy(nn.Module):
    """Two layers, and a callback between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between: Callable[[], object] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.between()
        return self.second(h)


@pytest.fixture
def toy() -> tuple[Toy, Adapters]:
    model = Toy()
    for seed, name in enumerate(("a", "b")):
        adapters = attach(model, LoRA(rank=2, targets=("first", "second")), name=name)
        randomise(adapters, name, seed=seed)
    return model, adapters


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 4)


@pytest.fixture
def expected(toy: tuple[Toy, Adapters], x: Tensor) -> dict[str | None, Tensor]:
    """The output under each adapter alone, and of the base."""
    model, adapters = toy
    outputs: dict[str | None, Tensor] = {}
    for choice in (None, "a", "b"):
        adapters.activate(choice)
        outputs[choice] = model(x)
    assert not torch.allclose(outputs["a"], outputs["b"])
    return outputs


@pytest.fixture
def other_thread() -> Iterator[Callable[[Callable], object]]:
    """Run a function in a new thread and return its result."""
    with ThreadPoolExecutor(1) as pool:
        yield lambda function: pool.submit(function).result(timeout=60)


# --- threads and tasks ---------------------------------------------------------------------------------


def test_activate_holds_in_a_fresh_thread(toy, x, expected, other_thread) -> None:
    model, adapters = toy
    adapters.activate("a")
    assert torch.equal(other_thread(lambda: model(x)), expected["a"])


def test_per_sample_is_local_to_its_thread(toy, x, expected, other_thread) -> None:
    model, adapters = toy
    adapters.activate("a")
    with adapters.per_sample(["b", "b"]):
        assert torch.equal(other_thread(lambda: model(x)), expected["a"])
        torch.testing.assert_close(model(x), expected["b"])
    assert torch.equal(model(x), expected["a"])


def test_a_replica_of_data_parallel_sees_no_block_and_says_so(
    toy, x, expected, other_thread
) -> None:
    model, adapters = toy
    adapters.activate("a")
    replica = model._replicate_for_data_parallel()
    replica._parameters = model._parameters
    assert torch.equal(other_thread(lambda: replica(x)), expected["a"])
    with (
        adapters.per_sample(["b", "b"]),
        pytest.raises(AdapterStateError, match=r"nn\.DataParallel"),
    ):
        other_thread(lambda: replica(x))


def test_per_sample_is_local_to_its_task(toy, x, expected) -> None:
    model, adapters = toy
    adapters.activate("b")

    async def rows(name: str | None) -> Tensor:
        with adapters.per_sample([name, name]):
            await asyncio.sleep(0)
            output = model(x)
            await asyncio.sleep(0)
        return output

    async def surroundings() -> Tensor:
        await asyncio.sleep(0)
        return model(x)

    async def run() -> list[Tensor]:
        return await asyncio.gather(rows("a"), surroundings(), rows(None))

    for output, name in zip(own_loop.run(run()), ("a", "b", None), strict=True):
        torch.testing.assert_close(output, expected[name])


def test_disabled_is_the_base_in_its_thread_alone(toy, x, expected, other_thread) -> None:
    model, adapters = toy
    adapters.activate("a")
    with adapters.disabled():
        assert torch.equal(model(x), expected[None])
        assert torch.equal(other_thread(lambda: model(x)), expected["a"])
        with adapters.per_sample(["b", None]):
            torch.testing.assert_close(model(x)[0], expected["b"][0])
        with pytest.raises(
            AdapterStateError, match="inside per_sample, per_token, using or disabled"
        ):
            adapters.activate("b")
    assert torch.equal(model(x), expected["a"])
    adapters.merge()
    with (
        pytest.raises(AdapterStateError, match=r"unmerge\(\) before you open a using"),
        adapters.disabled(),
    ):
        raise AssertionError("the block of a merged adapter has begun")


METHODS = {
    "DoRA": LoRA(rank=2, dora=True),
    "a trained head": LoRA(rank=2, train_modules=("lm_head",)),
    "a trained norm": LoRA(rank=2, train_modules=("norm",)),
    "all weights": FullFineTuning(),
}


@pytest.mark.parametrize("choice", ["b", {"a": 0.5, "b": -2.0}], ids=["name", "blend"])
def test_using_activates_in_its_thread_alone(toy, x, expected, other_thread, choice) -> None:
    model, adapters = toy
    adapters.activate(choice)
    wanted = model(x)
    adapters.activate("a")
    with adapters.using(choice):
        torch.testing.assert_close(model(x), wanted)
        assert torch.equal(other_thread(lambda: model(x)), expected["a"])
    assert torch.equal(model(x), expected["a"])
    with pytest.raises(AdapterStateError, match="No adapter is named 'c'"), adapters.using("c"):
        raise AssertionError("the block of an unknown adapter has begun")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_disabled_is_the_base_bit_for_bit_and_using_is_the_adapter(method) -> None:
    model = tiny_models.build("llama").eval()
    base = model(IDS).logits
    adapters = attach(model, method)
    randomise(adapters, "default", seed=1)
    adapted = model(IDS).logits
    with adapters.disabled():
        assert torch.equal(model(IDS).logits, base)
    assert torch.equal(model(IDS).logits, adapted)
    adapters.activate(None)
    with adapters.using("default"):
        torch.testing.assert_close(model(IDS).logits, adapted)
    assert not torch.allclose(adapted, base)


# --- generations ---------------------------------------------------------------------------------------


def generator(attached_to: str = "the model") -> tuple[nn.Module, Adapters]:
    model = tiny_models.build("llama")
    part = {"the model": model, "its backbone": model.model, "its parent": nn.ModuleList([model])}
    for seed, name in enumerate(("a", "b")):
        method = LoRA(rank=2, alpha=3, targets="all-linear")
        adapters = attach(part[attached_to], method, name=name)
        randomise(adapters, name, seed=seed)
    return model, adapters


def generate(model: nn.Module, **options) -> Tensor:
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    return model.generate(IDS, pad_token_id=0, **options)  # type: ignore[operator]


class Between:
    """A stopping criterion that calls a function after the first token."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function: Callable[[], object] | None = function

    def __call__(self, ids: Tensor, scores: Tensor, **_) -> Tensor:
        function, self.function = self.function, None
        if function is not None:
            function()
        return torch.zeros(len(ids), dtype=torch.bool)


ATTACHED_TO = pytest.mark.parametrize("part", ["the model", "its backbone", "its parent"])


@ATTACHED_TO
def test_a_generation_keeps_the_choice_of_its_first_pass(part: str) -> None:
    model, adapters = generator(part)
    adapters.activate("a")
    alone = generate(model)
    change = Between(lambda: adapters.activate("b"))
    assert torch.equal(generate(model, stopping_criteria=[change]), alone)
    assert change.function is None
    assert adapters.active == {"b": 1.0}
    assert not torch.equal(generate(model), alone)


@ATTACHED_TO
def test_a_generation_repeats_the_rows_for_its_beams(part: str) -> None:
    model, adapters = generator(part)
    with adapters.per_sample(["a", "b"]):
        mixed = generate(model, num_beams=3)
    for i, name in enumerate(("a", "b")):
        adapters.activate(name)
        assert torch.equal(mixed[i], generate(model, num_beams=3)[i])


def test_a_block_inside_a_generation_is_for_its_own_calls() -> None:
    """Contrastive decoding compares with the base between two passes."""
    model, adapters = generator()
    adapters.activate(None)
    base = model(IDS).logits  # type: ignore[operator]
    adapters.activate("a")
    alone, seen = generate(model), []

    def compare() -> None:
        with adapters.per_sample([None, None]):
            seen.append(model(IDS).logits)  # type: ignore[operator]

    assert torch.equal(generate(model, stopping_criteria=[Between(compare)]), alone)
    torch.testing.assert_close(seen[0], base)


def test_generate_of_the_user_is_kept() -> None:
    model = tiny_models.build("llama")
    own = lambda *args, **kwargs: "mine"  # noqa: E731
    model.generate = own
    adapters = attach(model, LoRA())
    assert model.generate(IDS) == "mine"
    adapters.detach()
    assert model.generate is own

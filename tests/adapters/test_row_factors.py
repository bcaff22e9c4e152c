"""DoRA's factors are computed once for each prompt, and again after any change: the logits stay equal to the bit."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny_models
import torch
from random_adapters import randomise
from tiny_models import logits_with_cache
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import DynamicCache

from lorakit.adapters import Adapters, attach
from lorakit.adapters.row_factors import RowFactors
from lorakit.methods import LoRA
from lorakit.methods.lora.layer import LoRALayer
from lorakit.models.quantised import quantised_weights
from lorakit.models.quantising import quantise

Change = Callable[[Adapters], Any]

PROMPT = torch.tensor([[5, 8, 13, 21, 34], [2, 55, 9, 30, 7]])
NEXT = torch.tensor([[3], [11]])
LAYER = "model.layers.0.self_attn.q_proj"


def adapted(arch: str = "llama", method: LoRA | None = None, **settings: Any) -> Adapters:
    model = tiny_models.build(arch, **settings)
    adapters = attach(model, method or LoRA(rank=2, dora=True, targets="all-linear"), seed=0)
    randomise(adapters)
    return adapters


def module_of(adapters: Adapters) -> Any:
    return adapters.modules()[LAYER]


def layer_of(adapters: Adapters) -> Any:
    return adapters.model.get_submodule(LAYER)


@contextlib.contextmanager
def not_kept() -> Iterator[None]:
    """Compute the factors in each call: the reference."""

    def adapt(self: RowFactors, module: LoRALayer, *args: Any) -> Tensor:
        return module.adapt(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowFactors, "adapt", adapt)
        yield


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[LoRALayer]:
    """The module of each time that factors are computed."""
    found: list[LoRALayer] = []
    compute = LoRALayer.row_factors

    def counted(self: LoRALayer, layer: nn.Module) -> Tensor:
        found.append(self)
        return compute(self, layer)

    monkeypatch.setattr(LoRALayer, "row_factors", counted)
    return found


def steps(adapters: Adapters, change: Change | None = None, *, rows: int = 1) -> Tensor:
    """Return the logits of a prompt's last token and of 4 steps, with a change between two of them."""
    model: Any = adapters.model
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = [logits_with_cache(model, PROMPT.repeat(rows, 1), cache)[:, -1:]]
        for number in range(4):
            if number == 2 and change:
                change(adapters)
            logits.append(logits_with_cache(model, NEXT.repeat(rows, 1), cache)[:, -1:])
    return torch.stack([each.double() for each in logits])


# --- how often --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 20], ids=["few rows", "many rows"])
@pytest.mark.parametrize(
    ("arch", "targets"),
    [
        ("llama", "all-linear"),
        ("llama", ("attention.qv", "embedding")),
        ("gpt2", "attention.qv"),
        ("phi3", "attention.qv"),
    ],
    ids=["linear", "embedding", "slices of a Conv1D", "slices"],
)
def test_factors_are_computed_once_for_a_prompt(
    arch: str, targets: Any, rows: int, computed: list[LoRALayer]
) -> None:
    adapters = adapted(arch, LoRA(rank=2, dora=True, targets=targets))
    found = steps(adapters, rows=rows)
    assert computed == list(adapters.modules().values())
    with not_kept():
        assert torch.equal(found, steps(adapters, rows=rows))


def test_generate(computed: list[LoRALayer]) -> None:
    adapters = adapted()
    options: dict = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
    }
    found = adapters.model.generate(PROMPT, **options)
    assert len(computed) == len(adapters.modules())
    with not_kept():
        assert torch.equal(found, adapters.model.generate(PROMPT, **options))


def test_a_server_computes_them_once(computed: list[LoRALayer]) -> None:
    adapters = adapted()
    prompt = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(0))
    for ids in (prompt, prompt[:, :1], prompt):
        with torch.no_grad(), adapters.per_token([("default", ids.numel())], unchanged=True):
            adapters.model(ids)
    assert len(computed) == len(adapters.modules())


@pytest.mark.parametrize("by_token", [False, True])
def test_gradients_need_new_factors(by_token: bool, computed: list[LoRALayer]) -> None:
    """The magnitude has its gradient through them."""
    adapters = adapted()
    gradients = []
    for reference in (contextlib.nullcontext(), not_kept()):
        spans = adapters.per_token([("default", PROMPT.numel())])
        with reference, spans if by_token else contextlib.nullcontext():
            with torch.no_grad():
                adapters.model(PROMPT)
            computed.clear()
            adapters.model(PROMPT, labels=PROMPT).loss.backward()
            assert len(computed) == len(adapters.modules())
        gradients.append([p.grad for p in adapters.trainable_parameters()])
        adapters.model.zero_grad()
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert torch.equal(one, other)


# --- what is noticed --------------------------------------------------------------------------------------


def in_place(name: str) -> Change:
    def change(adapters: Adapters) -> None:
        owner = layer_of(adapters) if name == "weight" else module_of(adapters)
        with torch.no_grad():
            getattr(owner, name).mul_(-1.5)

    change.__name__ = f"{name} in place"
    return change


def swapped(name: str) -> Change:
    def change(adapters: Adapters) -> None:
        owner = layer_of(adapters) if name == "weight" else module_of(adapters)
        setattr(owner, name, nn.Parameter(getattr(owner, name).detach() + 0.5))

    change.__name__ = f"{name} swapped"
    return change


def new_data(adapters: Adapters) -> None:
    weight = layer_of(adapters).weight
    weight.data = weight.data + 0.5


def transposed(adapters: Adapters) -> None:
    weight = layer_of(adapters).weight
    weight.data = weight.data.T


def elsewhere_in_the_storage(adapters: Adapters) -> None:
    magnitude = module_of(adapters).magnitude
    magnitude.data = torch.arange(1.0, 2 * len(magnitude) + 1)[: len(magnitude)]
    adapters.model(PROMPT)  # computes the factors of these magnitudes
    magnitude.data = magnitude.data.as_strided((len(magnitude),), (1,), len(magnitude))


def another_storage_at_the_address(adapters: Adapters) -> None:
    """As where a tensor is freed, and the next one gets its memory."""
    magnitude = module_of(adapters).magnitude
    memory = magnitude.detach().numpy().copy()
    magnitude.data = torch.from_numpy(memory)
    adapters.model(PROMPT)
    memory *= -1.5
    magnitude.data = torch.from_numpy(memory)


def step_of(fused: bool, base: bool) -> Change:
    """An optimizer that writes into the adapter or into the base; a fused one counts no version."""

    def change(adapters: Adapters) -> None:
        trained = [layer_of(adapters).weight] if base else list(adapters.trainable_parameters())
        for parameter in trained:
            parameter.grad = torch.full_like(parameter, 0.1)
        torch.optim.AdamW(trained, lr=0.3, fused=fused).step()

    change.__name__ = f"{'fused' if fused else 'plain'} step of the {'base' if base else 'adapter'}"
    return change


def scaling(adapters: Adapters) -> None:
    module_of(adapters).scaling = 7.0


def there_and_back(adapters: Adapters) -> None:
    """Round to bfloat16. The last tensors may get the addresses of the first."""
    adapters.model.to(torch.bfloat16)
    adapters.model.float()


def other_dtype(adapters: Adapters) -> None:
    adapters.model.double()


def state_dict(assign: bool) -> Change:
    def change(adapters: Adapters) -> None:
        state = {name: t + 0.1 for name, t in adapters.model.state_dict().items()}
        adapters.model.load_state_dict(state, assign=assign)

    change.__name__ = f"load_state_dict, assign={assign}"
    return change


def remove_and_attach(adapters: Adapters) -> None:
    adapters.remove("default")
    again = attach(adapters.model, LoRA(rank=2, dora=True, targets="all-linear"), seed=3)
    randomise(again, seed=3)


def merge_edit_unmerge(adapters: Adapters) -> None:
    adapters.merge()
    adapters.unmerge()
    in_place("weight")(adapters)


NOTICED = [
    *map(in_place, ("weight", "lora_A", "lora_B", "magnitude")),
    *map(swapped, ("weight", "lora_A", "lora_B", "magnitude")),
    new_data,
    transposed,
    elsewhere_in_the_storage,
    another_storage_at_the_address,
    *(step_of(fused, base) for fused in (False, True) for base in (False, True)),
    scaling,
    there_and_back,
    other_dtype,
    state_dict(assign=False),
    state_dict(assign=True),
    remove_and_attach,
    merge_edit_unmerge,
]


@pytest.mark.parametrize("change", NOTICED, ids=lambda change: change.__name__)
def test_a_change_acts_in_the_next_step(change: Change) -> None:
    found = steps(adapted(), change)
    with not_kept():
        expected = steps(adapted(), change)
    assert torch.equal(found, expected)
    assert not torch.equal(found, steps(adapted()))


def test_merge_and_unmerge_between_two_steps() -> None:
    def merge(adapters: Adapters) -> None:
        adapters.merge()

    def merge_and_unmerge(adapters: Adapters) -> None:
        adapters.merge()
        adapters.unmerge()

    assert torch.equal(steps(adapted(), merge_and_unmerge), steps(adapted()))
    torch.testing.assert_close(steps(adapted(), merge), steps(adapted()), rtol=1e-3, atol=1e-4)


def test_an_edit_of_data_acts_from_the_next_prompt_on() -> None:
    """PyTorch does not count it, so no step can see it."""
    adapters = adapted()
    steps(adapters)
    for parameter in adapters.trainable_parameters():
        parameter.data.mul_(-1.5)
    found = steps(adapters)
    with not_kept():
        assert torch.equal(found, steps(adapters))


def test_an_edit_of_data_acts_in_the_next_prompt_by_token() -> None:
    """Without the promise that the adapters do not change."""
    adapters = adapted()

    def by_token() -> Tensor:
        with torch.no_grad(), adapters.per_token([("default", PROMPT.numel())]):
            return adapters.model(PROMPT).logits

    by_token()
    for parameter in adapters.trainable_parameters():
        parameter.data.mul_(-1.5)
    found = by_token()
    with not_kept():
        assert torch.equal(found, by_token())


@pytest.mark.parametrize("in_inference_mode", [False, True])
def test_tensors_of_inference_mode(in_inference_mode: bool) -> None:
    """They have no count of versions."""
    with torch.inference_mode(in_inference_mode):
        adapters = adapted()
    with torch.inference_mode():
        found = steps(adapters, in_place("lora_B"))
    with torch.inference_mode(in_inference_mode):
        other = adapted()
    with torch.inference_mode(), not_kept():
        assert torch.equal(found, steps(other, in_place("lora_B")))


def test_rows_with_a_trained_copy_of_the_weight() -> None:
    """Rows of one adapter compute with their own weight, in the place of the base's."""
    found = []
    for reference in (contextlib.nullcontext(), not_kept()):
        adapters = adapted(method=LoRA(rank=2, dora=True, targets="attention"))
        model: Any = adapters.model
        attach(model, LoRA(rank=2, dora=True, targets="mlp"), name="other", seed=2)
        randomise(adapters, "other", seed=2)
        cache = DynamicCache(config=model.config)
        with reference, torch.no_grad(), adapters.per_sample(["default", "other"]):
            logits = [
                logits_with_cache(model, ids, cache)[:, -1:] for ids in (PROMPT, NEXT, NEXT, NEXT)
            ]
        found.append(torch.stack(logits))
    assert torch.equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(kind: Any, computed: list[LoRALayer]) -> None:
    def scales(adapters: Adapters) -> None:
        quantised = dict(quantised_weights(adapters.model))[LAYER]
        quantised.tensors[1].mul_(1.5)

    def model() -> Adapters:
        base = tiny_models.build("llama", hidden_size=64, intermediate_size=64, head_dim=16)
        quantise(base, kind)
        adapters = attach(base, LoRA(rank=2, dora=True, targets="all-linear"), seed=0)
        randomise(adapters)
        return adapters

    found = steps(model(), scales)
    assert len(computed) == len(model().modules()) + 1
    with not_kept():
        assert torch.equal(found, steps(model(), scales))


# --- what is kept -----------------------------------------------------------------------------------------


def test_memory_is_one_vector_for_each_layer_and_ends_with_the_adapter() -> None:
    adapters = adapted()
    steps(adapters)
    factors = adapters._activation.decoding.row_factors
    assert len(factors._known) == len(adapters.modules())
    assert all(
        vector.shape == (module.out_features,) for module, (_, vector) in factors._known.items()
    )
    old = StorageWeakRef(layer_of(adapters).weight.untyped_storage())
    layer_of(adapters).weight = nn.Parameter(torch.zeros_like(layer_of(adapters).weight))
    modules = [weakref.ref(module) for module in adapters.modules().values()]
    adapters.remove("default")
    gc.collect()
    assert old.expired()
    assert not any(reference() for reference in modules)
    assert not len(factors._known)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_nothing(copied: Callable[[Any], Any]) -> None:
    adapters = adapted()
    keys = list(adapters.model.state_dict())
    found = steps(adapters)
    assert list(adapters.model.state_dict()) == keys
    twin = copied(adapters)
    assert not len(twin._activation.decoding.row_factors._known)
    assert torch.equal(steps(twin), found)
    in_place("lora_B")(twin)
    assert torch.equal(steps(adapters), found)
    assert not torch.equal(steps(twin), found)


def test_two_threads() -> None:
    """Steps of two threads share factors, also while a prompt of the other discards them."""
    adapters = adapted()
    expected, found = steps(adapters), []

    def run() -> None:
        found.extend(steps(adapters) for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 10
    assert all(torch.equal(each, expected) for each in found)

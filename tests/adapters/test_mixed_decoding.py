"""Decoding steps of mixed batches compute for each request what its adapters compute alone."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny_models
import torch
from random_adapters import randomise
from test_decoding import (
    assign_state_dict,
    layer_by_layer,
    load_state_dict,
    new_parameter,
    new_scaling,
    there_and_back,
)
from tiny_models import logits_with_cache
from torch import Tensor
from transformers import DynamicCache

from lorakit.adapters import Adapters, attach, decoding, stacked_products, stacks
from lorakit.adapters.attach import handle_for
from lorakit.adapters.choice import AdapterChoice
from lorakit.adapters.stacks import Stack, Stacks
from lorakit.methods.lora.method import LoRA

Rows = Sequence[AdapterChoice]

METHODS = {
    "a": LoRA(rank=2, alpha=3, targets="all-linear"),
    "b": LoRA(rank=3, alpha=-2, targets="attention.qv"),
    "c": LoRA(rank=1, alpha=4, targets=("mlp", "attention.q")),
    "d": LoRA(rank=2, alpha=1, targets="all-linear"),
}
CHOICES: Rows = [None, "a", "b", "c", "d", {"a": 0.5, "b": -2.0}, {"d": 0.3}, {"c": 1.0, "a": 0.0}]
ROWS = 6


def adapted(arch: str = "llama", methods: dict[str, LoRA] = METHODS) -> Adapters:
    model = tiny_models.build(arch)
    for seed, (name, method) in enumerate(methods.items()):
        randomise(attach(model, method, name=name, seed=seed), name, seed=seed)
    adapters = handle_for(model)
    adapters.activate(None)
    model.double()
    return adapters


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 99, shape, generator=torch.Generator().manual_seed(seed))


def compositions(count: int, rows: int = ROWS, seed: int = 0) -> list[Rows]:
    """Return random compositions of a batch. Each stays for two steps."""
    chosen = random.Random(seed)
    return [r for _ in range(count) for r in [chosen.choices(CHOICES, k=rows)] * 2]


def in_one_batch(
    adapters: Adapters, batches: Sequence[Rows], change: Callable[[int], Any] = lambda step: None
) -> Tensor:
    """Return the logits of each step of rows whose adapters change from step to step."""
    model: Any = adapters.model
    cache = DynamicCache(config=model.config)
    logits = []
    with torch.no_grad():
        logits_with_cache(model, ids(len(batches[0]), 5), cache)
        for step, rows in enumerate(batches):
            change(step)
            with adapters.per_sample(rows):
                logits.append(logits_with_cache(model, ids(len(rows), 1, seed=step), cache)[:, -1])
    return torch.stack(logits)


def alone(adapters: Adapters, batches: Sequence[Rows]) -> Tensor:
    """Return the same logits, each row in a batch of its own with its adapters active."""
    model: Any = adapters.model
    results = []
    with torch.no_grad(), layer_by_layer():
        for row in range(len(batches[0])):
            cache = DynamicCache(config=model.config)
            adapters.activate(None)
            logits_with_cache(model, ids(len(batches[0]), 5)[row : row + 1], cache)
            logits = []
            for step, rows in enumerate(batches):
                adapters.activate(rows[row])
                x = ids(len(rows), 1, seed=step)[row : row + 1]
                logits.append(logits_with_cache(model, x, cache)[0, -1])
            results.append(torch.stack(logits))
    adapters.activate(None)
    return torch.stack(results, dim=1)


def packed(adapters: Adapters, tokens: Rows) -> Tensor:
    """Return the logits of one packed row of tokens with an adapter each."""
    with torch.no_grad(), adapters.per_token([(choice, 1) for choice in tokens]):
        return adapters.model(input_ids=ids(1, len(tokens)), use_cache=False).logits  # type: ignore[operator]


def stacked_layers(adapters: Adapters) -> int:
    """Return how many layers the stacks computed in the last step."""
    found = adapters._activation.decoding._stacks
    if found is None or found._arrangement is None:
        return 0
    return len(found._arrangement.parts)


# --- equality ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_each_row_computes_what_it_computes_alone(seed: int) -> None:
    adapters = adapted()
    batches = compositions(6, seed=seed)
    found = in_one_batch(adapters, batches)
    assert stacked_layers(adapters) == 14
    torch.testing.assert_close(found, alone(adapters, batches))


@pytest.mark.parametrize("arch", ["gpt2", "gpt-neox", "qwen3"])
def test_architectures(arch: str) -> None:
    adapters = adapted(arch, {n: METHODS[n] for n in "ad"})
    batches = [["a", None, "d", {"a": 0.5, "d": 1.5}, "a", "a"]] * 3
    found = in_one_batch(adapters, batches)
    assert stacked_layers(adapters) > 0
    torch.testing.assert_close(found, alone(adapters, batches))


@pytest.mark.parametrize("size", [1, 2, 7, 33])
def test_packed_tokens_compute_what_segments_compute(size: int) -> None:
    adapters = adapted()
    for tokens in compositions(8, size, seed=size):
        found = packed(adapters, tokens)
        with layer_by_layer():
            torch.testing.assert_close(found, packed(adapters, tokens))


def test_a_packed_step_needs_no_cache_of_transformers() -> None:
    adapters = adapted()
    for _ in range(2):
        packed(adapters, ["a", None, "b"])
    assert stacked_layers(adapters) == 14


def test_many_tokens_of_one_adapter_beside_single_ones() -> None:
    """The single ones have a product of their own, with a row each."""
    adapters = adapted()
    tokens: Rows = [*["a"] * 40, "b", "c", None, "d", {"a": 2.0}]
    packed(adapters, tokens)
    found = packed(adapters, tokens)
    used = adapters._activation.decoding._stacks
    assert used is not None
    assert used._arrangement is not None
    part = next(iter(used._arrangement.parts.values()))
    assert [len(A) for A, _ in part.matrices] == [5, 1]  # one slot is that of the many tokens
    with layer_by_layer():
        torch.testing.assert_close(found, packed(adapters, tokens))


def test_a_composition_makes_its_indices_once_for_all_layers(monkeypatch) -> None:
    """The CPU waits for each copy of an index to a GPU."""
    adapters = adapted()
    packed(adapters, [*["a"] * 20, "b", *["c"] * 20])
    made, index = [], stacked_products._index
    monkeypatch.setattr(stacked_products, "_index", lambda *args: made.append(args) or index(*args))
    packed(adapters, [*["a"] * 20, "b", *["d"] * 20])
    assert stacked_layers(adapters) == 14
    assert len(made) == 4  # for each of two products, the rows that it reads and its slots


@pytest.mark.parametrize("limit", [0, 60_000])
def test_stacks_of_limited_size(monkeypatch, limit: int) -> None:
    """The other layers compute one adapter after the other."""
    monkeypatch.setattr(stacks, "LARGEST_STACKS", limit)
    monkeypatch.setattr(stacks, "SHARE", 0)
    adapters = adapted()
    batches = compositions(4)
    found = in_one_batch(adapters, batches)
    assert (0 < stacked_layers(adapters) < 14) == (limit > 0)
    torch.testing.assert_close(found, alone(adapters, batches))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_stacks_that_were_built_in_part_are_dropped(
    monkeypatch, error: type[BaseException]
) -> None:
    adapters = adapted()
    allocate, layers = Stack.allocate, []

    def fail(stack: Stack, slots: int) -> None:
        layers.append(slots)
        if slots > 2 and len(layers) > 3:
            raise error("CUDA out of memory.")
        allocate(stack, slots)

    def stacked(*tokens: AdapterChoice) -> int:
        found = packed(adapters, tokens)
        with layer_by_layer():
            torch.testing.assert_close(found, packed(adapters, tokens))
        return stacked_layers(adapters)

    stacked("a", "b")
    assert stacked("a", "b") == 14
    monkeypatch.setattr(Stack, "allocate", fail)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            stacked("a", "b", "c")
    else:
        assert stacked("a", "b", "c") == 0
    assert stacked("a", "b") == 14


def test_stacks_grow_with_the_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of a large model exceed every fixed size, and have their slots nevertheless."""
    monkeypatch.setattr(stacks, "LARGEST_STACKS", 0)
    adapters = adapted()
    batches: Sequence[Rows] = [["a", "b", None, None], ["a", "b", "d", None], ["a", "b", "c", "d"]]
    found = in_one_batch(adapters, batches)
    assert stacked_layers(adapters) == 14
    torch.testing.assert_close(found, alone(adapters, batches))


def used_stacks(adapters: Adapters) -> Stacks:
    found = adapters._activation.decoding._stacks
    assert found is not None
    return found


@pytest.mark.parametrize("limit", [2**30, 60_000])
def test_a_blend_of_many_ranks_slows_no_later_step(monkeypatch, limit: int) -> None:
    """Its ranks are not computed once it has left, and its memory is free some compositions later."""
    monkeypatch.setattr(stacks, "LARGEST_STACKS", limit)
    monkeypatch.setattr(stacks, "SHARE", 0)
    monkeypatch.setattr(stacks, "PERIOD", 6)
    adapters = adapted(methods=METHODS | {"wide": LoRA(rank=16, alpha=4, targets="all-linear")})
    for tokens in (["a", "d"], ["a", "d"], ["a", "wide"], ["a", "d"]):
        found = packed(adapters, tokens)
    with layer_by_layer():
        torch.testing.assert_close(found, packed(adapters, ["a", "d"]))
    arrangement = used_stacks(adapters)._arrangement
    assert arrangement is not None
    assert {part.matrices[0][0].shape[-1] for part in arrangement.parts.values()} == {2}
    assert bool(used_stacks(adapters)._left_out) == (limit < 2**30)

    for tokens in (["a", "d"], ["d", "a"]) * 6:
        packed(adapters, tokens)
    assert {stack.rank for stack in used_stacks(adapters)._of_layer.values()} == {2}
    assert stacked_layers(adapters) == 14


def test_stacks_that_are_needed_now_and_then_stay(monkeypatch) -> None:
    monkeypatch.setattr(stacks, "PERIOD", 6)
    adapters = adapted()
    for _ in range(2):
        packed(adapters, ["a", "b", "c", "d"])
    built = []
    build = Stacks._build
    monkeypatch.setattr(Stacks, "_build", lambda *a, **k: (built.append(a), build(*a, **k)))
    for _ in range(6):
        for tokens in (["a", "b", "c", "d"], ["a"], ["d", "c"]):
            packed(adapters, tokens)
    assert not built


def test_adapters_with_another_effect() -> None:
    """DoRA and trained copies are no low-rank products, so their layers compute one adapter after the other."""
    methods = METHODS | {
        "dora": LoRA(rank=2, dora=True, targets="attention.qv"),
        "copies": LoRA(rank=2, targets="mlp", train_modules=("model.layers.0.self_attn.o_proj",)),
    }
    adapters = adapted(methods=methods)
    batches: Sequence[Rows] = [["a", "dora", None, "copies", "b", "d"]] * 3
    found = in_one_batch(adapters, batches)
    assert 0 < stacked_layers(adapters) < 14
    torch.testing.assert_close(found, alone(adapters, batches))


def test_bfloat16_rounds_no_more_than_segments() -> None:
    adapters = adapted()
    batches = [["a", None, "b", "c", "d", {"a": 0.5, "b": -2.0}]] * 4
    exact = in_one_batch(adapters, batches)
    adapters.model.to(torch.bfloat16)
    for module in adapters.model.modules():
        if hasattr(module, "lora_A"):
            module.float()
    error = (in_one_batch(adapters, batches).double() - exact).norm()
    assert stacked_layers(adapters) == 14
    with layer_by_layer():
        assert error < 2 * (in_one_batch(adapters, batches).double() - exact).norm()


def test_a_base_of_a_wider_dtype_than_the_adapters() -> None:
    adapters = adapted()
    adapters.model.float()
    for _ in range(2):
        packed(adapters, ["a", "b"])
    adapters.model.double()
    for module in adapters.model.modules():
        if hasattr(module, "lora_A"):
            module.float()
    found = packed(adapters, ["a", "b"])
    with layer_by_layer():
        torch.testing.assert_close(found, packed(adapters, ["a", "b"]))


def test_inference_mode() -> None:
    adapters = adapted()
    batches = compositions(3)
    expected = alone(adapters, batches)
    with torch.inference_mode():
        found = in_one_batch(adapters, batches)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(in_one_batch(adapters, batches), expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(beams: int) -> None:
    adapters = adapted("llama")
    model: Any = adapters.model
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "num_beams": beams,
        "do_sample": False,
        "pad_token_id": 0,
    }
    rows: Rows = ["a", None, "c", "a"]
    prompts = ids(4, 5)
    with adapters.per_sample(rows):
        found = model.generate(prompts, **options)
    assert stacked_layers(adapters) == 14
    for row, choice in enumerate(rows):
        adapters.activate(choice)
        assert torch.equal(found[row], model.generate(prompts[row : row + 1], **options)[0])


def test_an_encoder_decoder_model() -> None:
    adapters = adapted("t5", {n: METHODS[n] for n in "ad"})
    model: Any = adapters.model
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with adapters.per_sample(["a", None, "d"]):
        found = model.generate(ids(3, 5), **options)
        assert stacked_layers(adapters) == 18  # those of the decoder
        with layer_by_layer():
            assert torch.equal(found, model.generate(ids(3, 5), **options))


# --- isolation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("unit", ["row", "token"])
def test_nan_of_one_adapter_reaches_no_other_token(value: float, unit: str) -> None:
    adapters = adapted()
    rows: Rows = ["a", "b", None, "c", "b", "a"]

    def compute() -> Tensor:
        if unit == "row":
            return in_one_batch(adapters, [rows] * 3)[-1]
        results = []
        for _ in range(2):  # rows of one token, because attention mixes the tokens of a row
            with torch.no_grad(), adapters.per_token([(choice, 1) for choice in rows]):
                results.append(adapters.model(input_ids=ids(6, 1), use_cache=False).logits)  # type: ignore[operator]
        return results[-1][:, 0]

    expected = compute()
    with torch.no_grad():
        for parameter in adapters.trainable_parameters("b"):
            parameter.fill_(value)
    found = compute()
    assert stacked_layers(adapters) == 14
    for i, name in enumerate(rows):
        assert torch.equal(found[i], expected[i]) == (name != "b")
        assert bool(found[i].isnan().all()) == (name == "b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_adapters_keeps_the_output_of_the_base(dtype: torch.dtype) -> None:
    adapters = adapted()
    adapters.model.to(dtype)
    rows: Sequence[Rows] = [["a", None, "b", None, "c", "d"]] * 4
    found = in_one_batch(adapters, rows)
    assert stacked_layers(adapters) == 14
    base = in_one_batch(adapters, [[None] * 6] * 4)
    assert torch.equal(found[:, [1, 3]], base[:, [1, 3]])


def test_a_request_does_not_depend_on_its_neighbours() -> None:
    adapters = adapted()
    adapters.model.float()
    results = []
    for others in (["b"] * 5, ["a"] * 5, [None] * 5, [{"c": 1.0, "d": 1.0}, "d", "a", "b", "c"]):
        results.append(in_one_batch(adapters, [["a", *others]] * 3)[:, 0])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_threads_with_different_adapters() -> None:
    """The stacks serve one of two steps that run at the same time. The other computes adapter by adapter."""
    adapters = adapted()
    work = [compositions(8, seed=seed) for seed in range(3)]
    with layer_by_layer():
        expected = [in_one_batch(adapters, batches) for batches in work]
    found: dict[int, Tensor] = {}

    def decode(number: int) -> None:
        for _ in range(3):
            found[number] = in_one_batch(adapters, work[number])

    threads = [threading.Thread(target=decode, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, result in enumerate(expected):
        torch.testing.assert_close(found[number], result)


def test_a_step_inside_another_threads_step() -> None:
    """It must not change the matrices that the other step still reads."""
    adapters = adapted()
    layers: Any = adapters.model.model.layers  # type: ignore[union-attr]
    ours, theirs = ["a", "b", "c"], ["d", "d", "b"]
    with layer_by_layer():
        expected = packed(adapters, ours), packed(adapters, theirs)
    inside: list[Tensor] = []

    def interrupt(*_: Any) -> None:
        handle.remove()
        thread = threading.Thread(target=lambda: inside.append(packed(adapters, theirs)))
        thread.start()
        thread.join()

    for _ in range(2):
        packed(adapters, ours)
    handle = layers[1].register_forward_pre_hook(interrupt)
    found = packed(adapters, ours)
    torch.testing.assert_close((found, inside[0]), expected)


# --- a change between two steps ----------------------------------------------------------------------


def edit_a(adapters: Adapters) -> None:
    with torch.no_grad():
        for parameter in adapters.trainable_parameters("a"):
            parameter.mul_(-1.5)


def optimizer_step_of_a(adapters: Adapters) -> None:
    parameters = adapters.trainable_parameters("a")
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.1)
    torch.optim.AdamW(parameters, lr=0.3, fused=True).step()


def remove_and_attach(adapters: Adapters) -> None:
    adapters.remove("a")
    attach(adapters.model, METHODS["d"], name="a", seed=9)
    randomise(adapters, "a", seed=9)
    adapters.model.double()


@pytest.mark.parametrize(
    "change",
    [
        edit_a,
        optimizer_step_of_a,
        load_state_dict,
        assign_state_dict,
        there_and_back,
        new_parameter,
        new_scaling,
        remove_and_attach,
    ],
)
@pytest.mark.parametrize("unit", ["row", "token"])
def test_a_change_acts_in_the_next_step(change: Callable[[Adapters], None], unit: str) -> None:
    def steps(adapters: Adapters) -> list[Tensor]:
        rows: Rows = ["b", "a", None, {"a": 0.5}]
        act = lambda step: change(adapters) if step == 3 else None  # noqa: E731
        if unit == "row":
            return [*in_one_batch(adapters, [rows] * 6, act)]
        results = []
        for step in range(6):
            act(step)
            results.append(packed(adapters, rows)[0])
        return results

    methods = {n: METHODS[n] for n in "ab"}
    found = steps(adapted(methods=methods))
    with layer_by_layer():
        expected = steps(adapted(methods=methods))
    torch.testing.assert_close(found, expected)
    assert (found[3] - found[2]).abs().max() > 1e-3


def test_an_adapter_for_more_layers_joins() -> None:
    adapters = adapted(methods={"b": METHODS["b"]})
    for _ in range(3):
        packed(adapters, ["b", None])
    assert stacked_layers(adapters) == 4
    attach(adapters.model, METHODS["a"], name="a")
    randomise(adapters, "a")
    adapters.model.double()
    found = [packed(adapters, ["b", "a"]) for _ in range(3)]
    assert stacked_layers(adapters) == 14
    with layer_by_layer():
        torch.testing.assert_close(found, [packed(adapters, ["b", "a"])] * 3)


def test_a_new_request_writes_one_slot(monkeypatch) -> None:
    adapters = adapted()
    for rows in (["a", "b", "c"],) * 2:
        packed(adapters, rows)
    written = []
    write = Stacks._write
    monkeypatch.setattr(Stacks, "_write", lambda *args: (written.append(args[2]), write(*args)))
    packed(adapters, ["a", "d", "c"])
    packed(adapters, ["c", "d", "a"])
    packed(adapters, ["c", None, "a"])
    packed(adapters, ["c", "d", "a"])
    assert written == [(("d", 1.0),)]


def test_a_removed_adapter_is_freed() -> None:
    adapters = adapted()
    for _ in range(3):
        packed(adapters, ["a", "b", {"a": 0.5, "c": 1.0}])
    tensors = [weakref.ref(parameter) for parameter in adapters.trainable_parameters("a")]
    adapters.remove("a")
    gc.collect()
    assert all(tensor() is None for tensor in tensors)


def test_a_detached_handle_keeps_no_stacks() -> None:
    adapters = adapted()
    for _ in range(2):
        packed(adapters, ["a", "b"])
    adapters.detach()
    assert adapters._activation.decoding._stacks is None


def test_the_tensors_of_few_blends_are_kept(monkeypatch) -> None:
    monkeypatch.setattr(stacks, "MAX_CACHED_BLENDS", 2)
    adapters = adapted()
    for weight in range(1, 9):
        packed(adapters, ["b", {"a": weight / 4}])
    found = adapters._activation.decoding._stacks
    assert found is not None
    assert [*found._factors] == [(("b", 1.0),), (("a", 2.0),)]


def test_blends_that_come_and_go_compute_what_they_compute_alone() -> None:
    """Slots are the first ones, so a blend moves when others leave; no row may read another blend's slot."""
    adapters = adapted()
    rows: list[Rows] = [
        ["a", "b", "c", "d"],
        ["d", None, "c"],
        ["d", "d", "a"],
        ["b"] * 9 + ["d", "c"],
        ["c", "a", "b"],
        [{"a": 0.5}, "c"],
        ["a", "b", "c", "d", {"a": 0.5}, {"b": 2.0}],
        ["c"] * 12 + ["a"] * 10 + ["b", "d"],
        [None, "d"],
    ]
    for tokens in rows:
        for _ in range(2):
            found = packed(adapters, tokens)
        with layer_by_layer():
            expected = packed(adapters, tokens)
        torch.testing.assert_close(found, expected)


def test_unchanged_adapters_are_not_checked_again() -> None:
    """The promise saves the check of every tensor. Without it, an edit acts at once."""
    adapters = adapted()
    rows: Rows = ["a", "b"]

    def logits(**options: bool) -> Tensor:
        with torch.no_grad(), adapters.per_token([(r, 1) for r in rows], **options):
            return adapters.model(input_ids=ids(1, 2), use_cache=False).logits  # type: ignore[operator]

    for _ in range(2):
        before = logits(unchanged=True)
    with torch.no_grad():
        for parameter in adapters.trainable_parameters("a"):
            parameter.mul_(2)
    assert torch.equal(logits(unchanged=True), before)
    assert not torch.allclose(logits(), before)


def test_loading_and_unloading_leaves_nothing_behind() -> None:
    adapters = adapted(methods={"b": METHODS["b"]})
    sizes = []
    for _ in range(4):
        attach(adapters.model, METHODS["a"], name="a")
        adapters.model.double()
        for _ in range(2):
            packed(adapters, ["b", "a"])
        adapters.remove("a")
        packed(adapters, ["b", None])
        found = adapters._activation.decoding._stacks
        assert found is not None
        sizes.append((len(found._input_dtypes), len(found._of_layer)))
    assert sizes[1:-1] == sizes[2:]


def test_a_prompt_discards_the_stacks_unless_it_is_packed() -> None:
    """An edit through `tensor.data` acts from the next prompt on; a packed prompt is part of serving."""
    adapters = adapted()
    rows: Rows = ["a", "b"]
    for _ in range(3):
        packed(adapters, rows)
    long: Rows = ["a"] * (decoding.FEW_MIXED_TOKENS + 1)
    packed(adapters, long)
    assert stacked_layers(adapters) == 14
    with torch.no_grad():
        adapters.model(input_ids=ids(2, 5))  # type: ignore[operator]
    assert stacked_layers(adapters) == 0

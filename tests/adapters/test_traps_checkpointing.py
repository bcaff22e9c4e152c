"""Gradient checkpointing runs a block again in backward: with the adapters of the first run, or an error.

PyTorch compares shapes only, so gradients of another adapter would come out without a word.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
import tiny_models
import torch
from random_adapters import randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lorakit.adapters import Adapters, attach
from lorakit.errors import AdapterStateError
from lorakit.methods.lora.method import LoRA

IDS = torch.arange(3, 17).view(2, 7)
METHOD = LoRA(rank=2, alpha=3, targets="all-linear")

Gradients = list[Tensor | None]


def build(
    method: LoRA = METHOD, use_reentrant: bool | None = None
) -> tuple[PreTrainedModel, Adapters]:
    """A llama in training mode with adapters a and b; use_reentrant None disables checkpointing."""
    model = tiny_models.build("llama")
    adapters = attach(model, method, name="a", seed=1)
    attach(model, method, name="b", seed=2)
    randomise(adapters)
    model.train()
    if use_reentrant is not None:
        # transformers 5 renamed it.
        rename = "activation_checkpointing_enable"
        enable = getattr(model, rename, None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()  # a reentrant block without it has no gradient at all
    return model, adapters


def loss(model: PreTrainedModel) -> Tensor:
    return model(IDS, labels=IDS, use_cache=False).loss


def gradients(adapters: Adapters) -> Gradients:
    return [p.grad for name in adapters.names for p in adapters.trainable_parameters(name)]


def assert_same(actual: Gradients, expected: Gradients) -> None:
    assert any(gradient is not None for gradient in expected)
    for left, right in zip(actual, expected, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-4)


def unchanged(model: PreTrainedModel, adapters: Adapters) -> None:
    adapters.activate("a")
    loss(model).backward()


def another_adapter(model: PreTrainedModel, adapters: Adapters) -> None:
    adapters.activate("a")
    value = loss(model)
    adapters.activate("b")
    value.backward()


def base(model: PreTrainedModel, adapters: Adapters) -> None:
    adapters.activate({"a": 0.7, "b": -1.5})
    value = loss(model)
    adapters.activate(None)
    value.backward()


def end_of_per_sample(model: PreTrainedModel, adapters: Adapters) -> None:
    with adapters.per_sample(["a", "b"]):
        value = loss(model)
    value.backward()


def other_rows(model: PreTrainedModel, adapters: Adapters) -> None:
    with adapters.per_sample(["a", None]):
        value = loss(model)
    with adapters.per_sample([None, "b"]):
        value.backward()


def two_forwards(model: PreTrainedModel, adapters: Adapters) -> None:
    adapters.activate("a")
    value = loss(model)
    with adapters.per_sample(["b", None]):
        value = value + 2 * loss(model)
    adapters.activate("b")
    value = value + 3 * loss(model)
    value.backward()


CHANGES: list[Callable[[PreTrainedModel, Adapters], None]] = [
    another_adapter,
    base,
    end_of_per_sample,
    other_rows,
    two_forwards,
]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("step", [unchanged, *CHANGES])
def test_gradients_are_those_without_checkpointing(
    step: Callable[[PreTrainedModel, Adapters], None], use_reentrant: bool
) -> None:
    model, adapters = build()
    step(model, adapters)
    expected = gradients(adapters)
    model, adapters = build(use_reentrant=use_reentrant)
    step(model, adapters)
    assert_same(gradients(adapters), expected)


def test_dropout_is_the_same_in_both_runs() -> None:
    expected: Gradients = []
    for use_reentrant in (None, False, True):
        model, adapters = build(LoRA(rank=2, targets="all-linear", dropout=0.5), use_reentrant)
        torch.manual_seed(3)
        another_adapter(model, adapters)
        expected = expected or gradients(adapters)
    assert_same(gradients(adapters), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "change", [Adapters.merge, lambda adapters: adapters.remove("a")], ids=["merge", "remove"]
)
def test_merge_or_removal_before_backward_is_refused(
    change: Callable[[Adapters], None], use_reentrant: bool
) -> None:
    model, adapters = build(use_reentrant=use_reentrant)
    adapters.activate("a")
    value = loss(model)
    change(adapters)
    with pytest.raises(AdapterStateError, match="backward"):
        value.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_unmerge_before_backward_is_refused(use_reentrant: bool) -> None:
    model, adapters = build(use_reentrant=use_reentrant)
    adapters.merge("a")
    model.enable_input_require_grads()
    value = loss(model)
    adapters.unmerge()
    with pytest.raises(AdapterStateError, match="backward"):
        value.backward()


@pytest.mark.parametrize("outer_reentrant", [False, True])
@pytest.mark.parametrize("inner_reentrant", [False, True])
def test_nested_checkpoints(outer_reentrant: bool, inner_reentrant: bool) -> None:
    """The inner checkpoint of the recomputation is new; the record of the outer one has the first run's adapters."""

    def step(nested: bool) -> Gradients:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        adapters = attach(model, LoRA(rank=2, targets="0"), name="a")
        attach(model, LoRA(rank=2, targets="0"), name="b")
        randomise(adapters)
        x = torch.randn(3, 8, requires_grad=True)

        def inner(y: Tensor) -> Tensor:
            return model[1](model[0](y).tanh())

        def outer(y: Tensor) -> Tensor:
            return checkpoint(inner, y, use_reentrant=inner_reentrant).tanh()

        adapters.activate("a")
        out = checkpoint(outer, x, use_reentrant=outer_reentrant) if nested else inner(x).tanh()
        adapters.activate("b")
        out.sum().backward()
        return gradients(adapters)

    assert_same(step(nested=True), step(nested=False))


# --- changes between the forward and the backward pass -------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("only_one", [False, True], ids=["", "only one choice ever"])
def test_detach_before_backward_is_refused(use_reentrant: bool, only_one: bool) -> None:
    """The recomputation would run the base: all gradients would be zero, without a word."""
    model, adapters = build(use_reentrant=use_reentrant)
    if only_one:
        adapters.remove("a")
    value = loss(model)
    adapters.detach()
    with pytest.raises(AdapterStateError, match="between the forward and the backward"):
        value.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_backward_pass_in_another_thread_reads_the_record(use_reentrant: bool) -> None:
    """As on a GPU, whose backward pass runs in a thread of its own with an empty context."""

    def step(use_reentrant: bool | None) -> Gradients:
        model, adapters = build(use_reentrant=use_reentrant)
        with adapters.per_sample(["a", "b"]):
            value = loss(model)
            backward = threading.Thread(target=value.backward)
            backward.start()
            backward.join()
        return gradients(adapters)

    assert_same(step(use_reentrant), step(None))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_rows_with_trained_copies_are_right_or_refused(use_reentrant: bool) -> None:
    method = LoRA(rank=2, targets="mlp.down", train_modules=("input_layernorm", "q_proj"))

    def step(use_reentrant: bool | None) -> Gradients:
        model, adapters = build(method, use_reentrant)
        adapters.activate(None)
        with adapters.per_sample(["a", "b"]):
            value = loss(model)
        value.backward()
        return gradients(adapters)

    assert_same(step(use_reentrant), step(None))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_the_model_keeps_its_rows(use_reentrant: bool) -> None:
    """The backward pass may run inside a block for another batch."""

    def step(use_reentrant: bool | None) -> Gradients:
        torch.manual_seed(0)
        model, adapters = build()

        def block(embeddings: Tensor) -> Tensor:
            return model(inputs_embeds=embeddings, use_cache=False).logits.tanh().sum()

        x = torch.randn(2, 7, 32, requires_grad=True)
        with adapters.per_sample(["a", "b"]):
            run = block if use_reentrant is None else partial(checkpoint, block)
            options = {} if use_reentrant is None else {"use_reentrant": use_reentrant}
            value = run(x, **options)
        with adapters.per_sample(["b"] * 5):
            value.backward()
        return gradients(adapters)

    assert_same(step(use_reentrant), step(None))

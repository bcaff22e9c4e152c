"""In-place operations on the outputs and inputs of adapted layers, and outputs that other code holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import tiny_models
import torch
from random_adapters import randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

from lorakit.adapters import Adapters, attach
from lorakit.methods import (
    BottleneckAdapter,
    FullFineTuning,
    LoRA,
    Method,
    PrefixEmbedding,
    PrefixLayer,
)


def adapted(model: nn.Module, method: Method, dtype: torch.dtype = torch.float32) -> Adapters:
    adapters = attach(model.train(), method, dtype=dtype)
    randomise(adapters)
    return adapters


def gradients(adapters: Adapters, output: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output.sin().sum(), adapters.trainable_parameters())


def assert_equal_out_of_place(
    model: nn.Module, adapters: Adapters, x: Tensor, modify: Callable[..., Tensor]
) -> None:
    """Assert that an in-place operation on the model's output gives the gradients of the same one on a copy."""
    expected = gradients(adapters, modify(model(x).clone()))
    assert min(gradient.abs().max() for gradient in expected) > 1e-5
    torch.testing.assert_close(gradients(adapters, modify(model(x))), expected)


# --- operations on the output -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8,), (5, 8), (3, 5, 8), (2, 3, 5, 8)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "hooked"])
def test_relu_in_place_after_a_linear_layer(
    shape: tuple[int, ...], bias: bool, dora: bool, kind: str
) -> None:
    layer = Conv1D(8, 8) if kind == "conv1d" else nn.Linear(8, 8, bias=bias)
    if kind == "hooked":
        layer.register_forward_hook(lambda module, args, output: None)
    model = nn.Sequential(layer, nn.ReLU(inplace=True), nn.Linear(8, 1))
    adapters = adapted(model, LoRA(rank=1, targets=("0", "2"), dora=dora))
    x = torch.randn(shape)
    actual = model(x)
    twin = nn.Sequential(model[0], nn.ReLU(), model[2])
    torch.testing.assert_close(actual, twin(x))
    torch.testing.assert_close(gradients(adapters, actual), gradients(adapters, twin(x)))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_relu_in_place_after_a_convolution_and_batch_norm(dora: bool) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    adapters = adapted(model, LoRA(rank=2, targets="0", dora=dora))
    x = torch.randn(2, 4, 6, 6)
    assert_equal_out_of_place(model, adapters, x, nn.ReLU(inplace=True))
    assert_equal_out_of_place(model[:1], adapters, x, nn.ReLU(inplace=True))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_product_in_place_after_an_embedding(dora: bool) -> None:
    model = nn.Sequential(nn.Embedding(12, 8))
    adapters = adapted(model, LoRA(rank=2, targets="0", dora=dora))
    ids = torch.arange(6).view(2, 3)
    assert_equal_out_of_place(model, adapters, ids, lambda x: x.mul_(2))


METHODS = {
    "lora": LoRA(rank=2, targets="all-linear"),
    "dora": LoRA(rank=2, targets="all-linear", dora=True),
    "pissa": LoRA(rank=2, targets="attention.qv", init="pissa"),
    "embedding": LoRA(rank=2, targets="embedding"),
    "full": FullFineTuning(),
    **{
        kind: BottleneckAdapter(kind=kind, size=4)  # type: ignore[arg-type]
        for kind in ("houlsby", "lin", "pfeiffer")
    },
    "prefix-embedding": PrefixEmbedding(prefix_length=2),
    "prefix-layer": PrefixLayer(prefix_length=2),
}


@pytest.mark.parametrize(
    "arch",
    [
        "Falcon",
        pytest.param("Falcon with grouped heads", marks=pytest.mark.slow),
        pytest.param("Falcon with all heads", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_falcon_trains(arch: str, method: Method) -> None:
    """Falcon adds its attention's output to its MLP's in place: the gradients are those of a sum in a copy."""
    model = tiny_models.build(arch, "causal-lm")
    adapters = adapted(model, method)
    rows = [adapters.virtual_tokens.place(row) for row in torch.arange(3, 17).view(2, 7).tolist()]

    def logits() -> Tensor:
        return model(torch.tensor(rows), use_cache=False).logits

    actual = gradients(adapters, logits())
    for block in model.get_submodule("transformer.h").children():
        block.get_submodule("mlp").register_forward_hook(
            lambda module, args, output: output.clone()
        )
    expected = gradients(adapters, logits())
    assert min(gradient.abs().max() for gradient in expected) > 1e-5
    torch.testing.assert_close(actual, expected)


# --- operations on the input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: (nn.Linear(8, 4), torch.randn(5, 8)),
        lambda: (nn.Linear(8, 4), torch.randn(2, 5, 8)),
        lambda: (nn.Linear(8, 4), torch.randn(2, 8, 5).transpose(1, 2)),
        lambda: (Conv1D(4, 8), torch.randn(2, 5, 8)),
        lambda: (nn.Embedding(20, 4), torch.arange(6)),
        lambda: (nn.Conv1d(8, 4, 3), torch.randn(2, 8, 5)),
    ],
    ids=["linear", "linear 3-D", "linear transposed", "conv1d", "embedding", "convolution"],
)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_input_modified_after_the_layer_gives_an_error_or_the_right_gradient(
    make: Callable[[], tuple[nn.Module, Tensor]], dora: bool
) -> None:
    layer, x = make()
    model = nn.Sequential(layer)
    adapters = adapted(model, LoRA(rank=2, targets="0", dora=dora))
    expected = gradients(adapters, model(x))
    output = model(x)
    x.mul_(3)
    try:
        actual = gradients(adapters, output)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(actual, expected)


# --- outputs that other code holds --------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False], ids=["training", "no_grad"])
@pytest.mark.parametrize("where", ["before", "after", "global", "forward", "first"])
@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)], ids=str)
def test_a_captured_output_is_not_written_into(
    where: str, shape: tuple[int, ...], grad: bool
) -> None:
    layer = nn.Linear(8, 4, bias=False)
    model = nn.Sequential(layer)
    x = torch.randn(shape)
    base = layer(x).detach()
    captured: list[Tensor] = []

    def capture(module: nn.Module, args: tuple, output: Tensor) -> None:
        captured.append(output)

    def forward(x: Tensor) -> Tensor:
        captured.append(nn.Linear.forward(layer, x))
        return captured[-1]

    handle = None
    if where == "before":
        layer.register_forward_hook(capture)
    if where == "global":
        handle = nn.modules.module.register_module_forward_hook(capture)
    if where == "forward":
        layer.forward = forward  # type: ignore[method-assign]
    attach(model, LoRA(rank=2, targets="0"), name="a")
    adapters = attach(model, LoRA(rank=2, targets="0"), name="b")
    randomise(adapters)
    adapters.activate({"a": 0.5, "b": 2.0})
    if where in ("after", "first"):
        layer.register_forward_hook(capture, prepend=where == "first")
    captured.clear()  # the trial of a replaced forward method
    try:
        with torch.set_grad_enabled(grad):
            output = model(x)
    finally:
        if handle is not None:
            handle.remove()
    assert (output - base).abs().max() > 1e-2
    seen = output if where == "after" else base
    assert torch.equal(captured[0].detach(), seen.detach())


def test_outputs_that_a_selective_checkpoint_caches_are_not_written_into() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    attach(model, LoRA(rank=2, targets=("0", "2")))
    policy = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    x = torch.randn(3, 4, requires_grad=True)
    checkpoint(model, x, use_reentrant=False, context_fn=policy).sum().backward()
    gradient, x.grad = x.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(gradient, x.grad)

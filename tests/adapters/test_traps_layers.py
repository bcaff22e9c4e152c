"""Difficult layers: PiSSA's base, grouped convolutions, unequal slices, outputs that are views, autocast."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from random_adapters import randomise
from tiny_models import assert_same_tensors
from torch import Tensor, nn

from lorakit.adapters import attach
from lorakit.methods.lora.method import LoRA


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if ".adapters." not in name
    }


# --- PiSSA changes no base weight -----------------------------------------------------------------


@pytest.mark.parametrize(
    "arch", ["llama", "gpt2", "phi3"], ids=["linear", "conv1d", "fused slices"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pissa_keeps_the_base(arch: str, dtype: torch.dtype) -> None:
    model = tiny_models.build(arch).to(dtype)
    ids = torch.arange(3, 17).view(2, 7)
    base, before = model(ids).logits.detach(), base_tensors(model)
    adapters = attach(model, LoRA(rank=4, targets="attention.qv", init="pissa"))
    for module in adapters.modules().values():
        A, B = module.lora_A, module.lora_B
        assert A.abs().max() > 1e-2  # initialised from W's main directions, not zero
        assert B.abs().max() > 1e-2
        assert module.delta_matrix().abs().max() < 1e-6
    assert_same_tensors(base_tensors(model), before)
    tolerance = {"atol": 1e-4, "rtol": 0} if dtype == torch.float32 else {"atol": 0.3, "rtol": 0}
    torch.testing.assert_close(model(ids).logits, base, **tolerance)

    optimizer = torch.optim.SGD(adapters.trainable_parameters(), lr=1.0)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert (model(ids).logits - base).abs().max() > 0.5
    assert_same_tensors(base_tensors(model), before)
    adapters.merge()
    adapters.detach()
    assert torch.equal(model(ids).logits, base)


# --- convolutions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.Conv1d, {"kernel_size": 3, "groups": 2, "padding": 1}),
        (nn.Conv2d, {"kernel_size": (3, 2), "groups": 4, "stride": (2, 1)}),
        (nn.Conv2d, {"kernel_size": 3, "groups": 8, "dilation": 2, "padding": "same"}),
        (
            nn.Conv3d,
            {"kernel_size": (1, 2, 3), "groups": 2, "padding_mode": "circular", "padding": 1},
        ),
    ],
    ids=["1d", "2d", "depthwise", "3d"],
)
def test_grouped_convolution_in_float64(kind: type[nn.Conv1d], options: dict) -> None:
    """Each group is an ungrouped convolution with ``W_g + scaling * sum_r B_g[:, r] A_g[r]``."""
    groups, rank = options["groups"], 8
    layer = kind(8, 16, **options).double()
    model = nn.Sequential(layer)
    dimensions = layer.weight.ndim - 2
    x = torch.randn(2, 8, *(6, 7, 5)[:dimensions], dtype=torch.float64)
    adapters = attach(model, LoRA(rank=rank, alpha=3, targets="0"), dtype=torch.float64)
    randomise(adapters)
    module = adapters.modules()["0"]
    base = layer.forward(x)
    outputs = []
    for g in range(groups):
        A_g = module.lora_A[g * rank // groups : (g + 1) * rank // groups]
        B_g = module.lora_B[g * 16 // groups : (g + 1) * 16 // groups].flatten(1)
        W_g = layer.weight[g * 16 // groups : (g + 1) * 16 // groups]
        one = kind(8 // groups, 16 // groups, **(options | {"groups": 1})).double()
        state = {
            "weight": W_g + 3 / rank * torch.einsum("or,r...->o...", B_g, A_g),
            "bias": layer.bias[g * 16 // groups : (g + 1) * 16 // groups],
        }
        x_g = x[:, g * 8 // groups : (g + 1) * 8 // groups]
        outputs.append(torch.func.functional_call(one, state, (x_g,)))
    expected = torch.cat(outputs, dim=1)
    actual = model(x)
    assert (actual - base).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected)
    parameters = adapters.trainable_parameters()
    torch.testing.assert_close(
        torch.autograd.grad(actual.tanh().sum(), parameters),
        torch.autograd.grad(expected.tanh().sum(), parameters),
    )
    adapters.merge()
    torch.testing.assert_close(model(x), expected)


# --- fused projections with slices of unequal width -----------------------------------------------


def test_two_unequal_slices_have_a_rank_each() -> None:
    model = tiny_models.build("phi3")
    layer = model.model.layers[0].self_attn.qkv_proj
    x = torch.randn(2, 3, 32)
    base = layer(x)
    adapters = attach(model, LoRA(rank=2, alpha=3, targets="attention.qv"))
    randomise(adapters)
    module = adapters.modules()["model.layers.0.self_attn.qkv_proj"]
    A_q, A_v = module.lora_A.split(2)
    B_q, B_v = module.lora_B.split([32, 16])
    zero = torch.zeros(2, 3, 16)
    delta = torch.cat([x @ A_q.T @ B_q.T, zero, x @ A_v.T @ B_v.T], dim=-1)
    torch.testing.assert_close(layer(x), base + 1.5 * delta)
    assert delta.abs().max() > 1e-2


# --- outputs that must not be written into --------------------------------------------------------


class PackedProduct(torch.autograd.Function):
    """Multiplies in a padded buffer and returns a view of it, like quantised kernels."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        padded = x @ F.pad(weight, (0, 0, 0, 3)).T
        return padded[..., : weight.shape[0]]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight, None


class PackedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return PackedProduct.apply(x, self.weight)


class CachedLinear(nn.Linear):
    """Stores its last output, which must not change."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class ChunkLinear(nn.Linear):
    """Returns a view of a larger result, like two projections computed in one product."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), x], dim=-1)[..., : self.out_features]


@pytest.mark.parametrize("kind", [nn.Linear, PackedLinear, CachedLinear, ChunkLinear])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["inner layer", "first layer"])
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8)], ids=str)
def test_outputs_that_are_views(
    kind: type[nn.Linear], bias: bool, first: bool, shape: tuple[int, ...]
) -> None:
    before: nn.Module = nn.Identity() if first else nn.Linear(8, 8)
    model = nn.Sequential(before, kind(8, 4, bias=bias), nn.Tanh())
    if kind is PackedLinear:
        model[1].bias = None
    x = torch.randn(shape)
    layer = model[1]
    adapters = attach(model, LoRA(rank=2, alpha=3, targets="1"))
    randomise(adapters)
    module = adapters.modules()["1"]
    hidden = model[0](x)
    base = F.linear(hidden, layer.weight, layer.bias)
    expected = (base + 1.5 * hidden @ module.lora_A.T @ module.lora_B.T).tanh()
    actual = model(x)
    assert (actual - base.tanh()).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected)
    if kind is CachedLinear:
        torch.testing.assert_close(layer.last, base)
    parameters = adapters.trainable_parameters()
    torch.testing.assert_close(
        torch.autograd.grad(actual.sum(), parameters),
        torch.autograd.grad(expected.sum(), parameters),
    )
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)


def test_a_hook_of_the_user_keeps_what_it_saw() -> None:
    """An earlier hook captures the base layer's output, without the adapter's effect."""
    model = nn.Sequential(nn.Linear(8, 4))
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(3, 8)
    base = model(x).detach()
    adapters = attach(model, LoRA(rank=2, targets="0"))
    randomise(adapters)
    assert (model(x) - base).abs().max() > 1e-2
    torch.testing.assert_close(seen[-1].detach(), base)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_autocast_gives_the_output_the_dtype_that_the_base_has(
    dora: bool, kind: str, bias: bool
) -> None:
    is_linear = kind == "linear"
    layer = nn.Linear(8, 8, bias=bias) if is_linear else nn.Conv2d(8, 8, 3, bias=bias)
    model = nn.Sequential(layer)
    adapters = attach(model, LoRA(rank=2, targets="0", dora=dora))
    randomise(adapters)
    x = torch.randn(2, 8) if is_linear else torch.randn(2, 8, 5, 5)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, atol=0.1, rtol=0.02)

"""nn.MultiheadAttention reads its weights without calling a layer, so no hook inside it runs."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from random_adapters import randomise
from torch import Tensor, nn
from torch.func import functional_call

from lorakit.adapters import Adapters, attach, handle_of
from lorakit.errors import AdapterStateError, ConfigurationError, LorakitError
from lorakit.methods.lora.method import LoRA

EMBED = 16
TARGETS = ("attn", "attention.q", "attention.k", "attention.v", "attention.qv", "attention.o")


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(EMBED, 4, batch_first=True, **options)
        self.out = nn.Linear(EMBED, 3)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        return self.out(self.attn(x, y, y)[0])


def example(batch: int = 2) -> Tensor:
    return torch.randn(batch, 5, EMBED)


def effective_weights(model: nn.Module, weights: dict[str, float]) -> dict[str, Tensor]:
    """W + weight * scaling * B A by parameter name, differentiable, from the adapters' tensors only."""
    handle = handle_of(model)
    assert handle is not None
    effective: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for path, module in handle.modules(name).items():
            key = f"{path}.in_proj_weight" if path == "attn" else f"{path}.weight"
            W = effective.get(key, model.get_parameter(key))
            A, B = module.lora_A, module.lora_B
            if not module.slices:
                delta = B @ A
            else:  # rank 2 for each of the adapted projections, stacked
                delta = torch.zeros_like(W)
                starts = [s.offset for s in module.slices]
                for i, start in enumerate(starts):
                    block = B[i * EMBED : (i + 1) * EMBED] @ A[2 * i : 2 * i + 2]
                    rows = F.pad(block, (0, 0, start, W.shape[0] - start - EMBED))
                    delta = delta + rows
            effective[key] = W + weight * module.scaling * delta
    return effective


def without_adapters(model: nn.Module, weights: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    """The same module class with these weights as parameters, without lorakit."""
    plain = Model()
    state = {
        name: tensor for name, tensor in model.state_dict().items() if ".adapters." not in name
    }
    plain.load_state_dict(state)
    return functional_call(plain, weights, inputs)


def assert_nothing_left(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        assert "in_proj_weight" not in vars(module)
        assert "weight" not in vars(module)


def adapted(target: str | tuple[str, ...], **options) -> tuple[Model, Adapters]:
    model = Model()
    adapters = attach(model, LoRA(rank=2, alpha=3, targets=target, **options))
    randomise(adapters)
    return model, adapters


@pytest.mark.parametrize("target", TARGETS)
def test_effect_and_gradients_are_those_of_the_effective_weight(target: str) -> None:
    model, adapters = adapted(target)
    x, y = example(), example()
    base = without_adapters(model, {}, x, y)
    expected = without_adapters(model, effective_weights(model, {"default": 1.0}), x, y)
    actual = model(x, y)
    assert (actual - base).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected)

    parameters = adapters.trainable_parameters()
    expected_gradients = torch.autograd.grad(expected.tanh().sum(), parameters)
    assert min(gradient.abs().max() for gradient in expected_gradients) > 1e-5
    torch.testing.assert_close(
        torch.autograd.grad(actual.tanh().sum(), parameters), expected_gradients
    )

    adapters.merge()
    torch.testing.assert_close(model(x, y), expected)
    adapters.detach()
    assert torch.equal(model(x, y), base)
    assert_nothing_left(model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_dora_and_its_magnitude() -> None:
    model, adapters = adapted("attn", dora=True)
    x = example()
    actual = model(x)
    assert (actual - without_adapters(model, {}, x)).abs().max() > 1e-2
    gradients = torch.autograd.grad(actual.tanh().sum(), adapters.trainable_parameters())
    assert len(gradients) == 6
    assert min(gradient.abs().max() for gradient in gradients) > 1e-5
    adapters.merge()
    torch.testing.assert_close(model(x), actual)


def test_the_fast_path_of_inference_sees_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    native = torch._native_multi_head_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return native(*args, **kwargs)

    monkeypatch.setattr(torch, "_native_multi_head_attention", counted)
    model, adapters = adapted("attn")
    x = example()
    expected = model(x)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        assert len(calls) == 1
        adapters.activate(None)
        assert (model(x) - expected).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("target", ["attention", "mlp", "all-linear"])
def test_transformer_encoder_in_inference(target: str) -> None:
    """The encoder has a fast path, which packs a padded batch into a nested tensor."""
    layer = nn.TransformerEncoderLayer(EMBED, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x = example()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    base = model(x)
    adapters = attach(model, LoRA(rank=2, targets=target))
    randomise(adapters)
    expected = model(x)
    padded = model(x, src_key_padding_mask=padding)
    assert (expected - base).abs().max() > 1e-2
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        actual = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(actual[~padding], padded[~padding])
        adapters.merge()
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_dropout_is_refused_and_nothing_attached(target: str) -> None:
    model = Model()
    keys = list(model.state_dict())
    with pytest.raises(ConfigurationError, match=r"(?i)dropout"):
        attach(model, LoRA(rank=2, targets=target, dropout=0.1))
    assert list(model.state_dict()) == keys
    assert handle_of(model) is None
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        *({"targets": target} for target in TARGETS),
        {"targets": "out", "bias": "all"},  # trains the biases of in_proj and out_proj
        {"targets": "out", "train_modules": "attn"},
        {"targets": "out", "train_modules": "out_proj"},
    ],
    ids=str,
)
def test_per_sample_is_refused(options: dict) -> None:
    model = Model()
    adapters = attach(model, LoRA(rank=2, **options))
    randomise(adapters)
    x = example()
    expected = model(x)
    with (
        pytest.raises(AdapterStateError, match="per_sample"),
        adapters.per_sample(["default", None]),
    ):
        model(x)
    assert_nothing_left(model.modules())
    assert torch.equal(model(x), expected)


def test_per_sample_without_an_adapter_on_the_attention() -> None:
    model, adapters = adapted("attn")
    attach(model, LoRA(rank=2, targets="out"), name="linear")
    randomise(adapters, "linear")
    x = example()
    expected = model(x)
    base = without_adapters(model, {}, x)
    with adapters.per_sample(["linear", None]):
        actual = model(x)
    torch.testing.assert_close(actual, torch.stack([expected[0], base[1]]))
    assert (actual[0] - base[0]).abs().max() > 1e-2


def test_separate_projections_are_refused() -> None:
    model = Model(kdim=8)
    with pytest.raises(LorakitError, match="kdim"):
        attach(model, LoRA(rank=2, targets="attn"))
    assert handle_of(model) is None

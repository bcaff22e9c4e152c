"""A compiled model follows its adapters: torch.compile otherwise skips hooks attached after compilation."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_models
import torch
from random_adapters import randomise
from torch import Tensor, nn

from lorakit.adapters import attach
from lorakit.methods.lora.method import LoRA

IDS = torch.arange(3, 17).view(2, 7)
METHOD = LoRA(rank=2, alpha=3, targets=("attention.q", "mlp.down"))


# Dynamo of torch 2.13 instantiates every custom autograd function that it traces.
pytestmark = pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning",
)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Compile with PyTorch's default, which `attach` in an earlier test may have changed."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        yield
    torch._dynamo.reset()


def logits(model: nn.Module) -> Tensor:
    return model(IDS, use_cache=False).logits


def compiled_llama(backend: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The model, its compiled twin after a first call, and the base's logits."""
    # Frozen already, so that `attach` changes nothing else that Dynamo guards on.
    model = tiny_models.build("llama", num_hidden_layers=1).requires_grad_(False)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    base = logits(compiled).detach()
    return model, compiled, base


@pytest.mark.slow
def test_attach_detach_attach_and_gradients_after_compilation() -> None:
    model, compiled, base = compiled_llama("aot_eager")
    adapters = attach(model, METHOD)
    randomise(adapters)
    first = logits(compiled)
    assert (first - base).abs().max() > 1e-2
    torch.testing.assert_close(first, logits(model))

    adapters.detach()
    torch.testing.assert_close(logits(compiled), base)

    adapters = attach(model, METHOD, name="other")
    randomise(adapters, seed=1)
    second = logits(compiled)
    assert (second - base).abs().max() > 1e-2
    assert (second - first).abs().max() > 1e-2
    torch.testing.assert_close(second, logits(model))

    parameters = adapters.trainable_parameters()
    expected = torch.autograd.grad(model(IDS, labels=IDS, use_cache=False).loss, parameters)
    actual = torch.autograd.grad(compiled(IDS, labels=IDS, use_cache=False).loss, parameters)
    assert min(gradient.abs().max() for gradient in expected) > 1e-4
    torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_choice_rows_and_merge_after_compilation() -> None:
    model, compiled, base = compiled_llama("eager")
    adapters = attach(model, METHOD, name="a")
    attach(model, METHOD, name="b")
    randomise(adapters)
    for choice in ("a", None, {"a": 0.5, "b": 2.0}, "b"):
        adapters.activate(choice)
        expected = logits(model)
        torch.testing.assert_close(logits(compiled), expected)
        assert ((expected - base).abs().max() > 1e-2) == (choice is not None)

    adapters.activate("a")
    adapted = logits(model)
    with adapters.per_sample(["a", None]):
        torch.testing.assert_close(logits(compiled), torch.stack([adapted[0], base[1]]))
    with adapters.per_sample([None, "a"]):
        torch.testing.assert_close(logits(compiled), torch.stack([base[0], adapted[1]]))
    adapters.merge()
    torch.testing.assert_close(logits(compiled), adapted, atol=1e-4, rtol=0)
    adapters.unmerge()
    torch.testing.assert_close(logits(compiled), adapted)


@pytest.mark.slow
def test_trained_modules_and_rows_under_compilation() -> None:
    model, compiled, base = compiled_llama("aot_eager")
    adapters = attach(model, LoRA(rank=2, targets="attention.q", train_modules="lm_head"))
    randomise(adapters)
    adapted = logits(model)
    assert (adapted - base).abs().max() > 1e-2
    torch.testing.assert_close(logits(compiled), adapted)
    adapters.activate(None)
    torch.testing.assert_close(logits(compiled), base)
    adapters.activate("default")
    torch.testing.assert_close(logits(compiled), adapted)
    for rows in (["default", None], [None, "default"]):
        expected = [adapted[i] if row else base[i] for i, row in enumerate(rows)]
        with adapters.per_sample(rows):
            torch.testing.assert_close(logits(compiled), torch.stack(expected))


@pytest.mark.slow
def test_multihead_attention_under_compilation() -> None:
    model = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model.requires_grad_(False)
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(2, 5, 16)
    base = compiled(x).detach()
    adapters = attach(model, LoRA(rank=2, targets="attention"))
    randomise(adapters)
    adapted = model(x)
    assert (adapted - base).abs().max() > 1e-2
    torch.testing.assert_close(compiled(x), adapted)
    adapters.activate(None)
    torch.testing.assert_close(compiled(x), base)
    adapters.detach()
    torch.testing.assert_close(compiled(x), base)


@pytest.mark.slow
def test_inductor() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.GELU(), nn.Linear(16, 8)).requires_grad_(
        False
    )
    x = torch.randn(2, 3, 8)
    compiled = torch.compile(model, fullgraph=True)
    try:
        base = compiled(x).detach()
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"inductor finds no working compiler here: {error}")
    adapters = attach(model, LoRA(rank=2, targets=("0", "2")))
    randomise(adapters)
    adapted = model(x)
    assert (adapted - base).abs().max() > 1e-2
    actual = compiled(x)
    torch.testing.assert_close(actual, adapted)
    parameters = adapters.trainable_parameters()
    torch.testing.assert_close(
        torch.autograd.grad(actual.tanh().sum(), parameters),
        torch.autograd.grad(adapted.tanh().sum(), parameters),
        atol=1e-4,
        rtol=1e-4,
    )
    adapters.detach()
    torch.testing.assert_close(compiled(x), base)


@pytest.mark.slow
def test_blocks_of_threads_under_compilation() -> None:
    """A graph sees the blocks of its own thread; beside those of others it cannot tell, and raises an error."""
    model, compiled, base = compiled_llama("eager")
    adapters = attach(model, METHOD)
    randomise(adapters)
    adapted = logits(model)
    with ThreadPoolExecutor(1) as other:
        with adapters.per_sample(["default", None]):
            with pytest.raises(Exception, match="another thread or an asyncio task"):
                other.submit(logits, compiled).result()
            torch.testing.assert_close(logits(compiled), torch.stack([adapted[0], base[1]]))
        torch.testing.assert_close(other.submit(logits, compiled).result(), adapted)

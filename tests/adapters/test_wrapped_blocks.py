"""Parts of a model in the wrappers of `torch.compile` and `checkpoint_wrapper`: paths and files are as without them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
from random_adapters import randomise
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lorakit.adapters import Adapters, attach, from_peft, load
from lorakit.adapters.summary import count_parameters
from lorakit.methods import BitFit, BottleneckAdapter, FullFineTuning, LoRA, Method, PrefixLayer
from lorakit.models.blocks import blocks_of, stacks
from lorakit.models.listing import targets
from lorakit.models.tree import is_of_adapter, without_wrappers

IDS = torch.arange(3, 17).view(2, 7)
METHOD = LoRA(rank=2, targets=("attention.qv", "mlp.down"), train_modules="lm_head")
compiled = partial(torch.compile, backend="eager")

# Dynamo of torch 2.13 instantiates every custom autograd function that it traces.
pytestmark = pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # by PEFT
)

Wrap = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(
    params=[compiled, checkpoint_wrapper, lambda block: compiled(checkpoint_wrapper(block))],
    ids=["compile", "checkpoint_wrapper", "both"],
)
def wrap(request: pytest.FixtureRequest) -> Wrap:
    return request.param


def base(wrap: Wrap | None = None) -> Any:
    """A tiny Llama, with each block wrapped by `wrap`."""
    model: Any = tiny_models.build("llama")
    return model if wrap is None else wrapped(model, wrap)


def wrapped(model: Any, wrap: Wrap) -> Any:
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = wrap(block)
    return model


def adapted(wrap: Wrap, order: str, method: Method = METHOD) -> Adapters:
    """A random adapter on a model whose blocks are wrapped before or after it is attached."""
    adapters = attach(base(wrap if order == "before" else None), method)
    randomise(adapters)
    if order == "after":
        wrapped(adapters.model, wrap)
    return adapters


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def assert_adapted(model: Any, expected: Tensor, **tolerance: float) -> None:
    assert (expected - logits(base())).abs().max() > 1e-2
    torch.testing.assert_close(logits(model), expected, **tolerance)


in_both_orders = pytest.mark.parametrize("order", ["before", "after"])


@in_both_orders
def test_a_saved_adapter_loads(wrap: Wrap, order: str, tmp_path: Path) -> None:
    adapters = adapted(wrap, order)
    expected = logits(adapters.model)
    folder = adapters.save(tmp_path / "adapter")
    keys = load_file(folder / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert all(key == without_wrappers(key) for key in keys)
    for model in (base(), base(wrap)):
        loaded = load(model, folder)
        assert_adapted(model, expected)
        assert loaded.modules().keys() == adapters.modules().keys()
    assert_adapted(peft.PeftModel.from_pretrained(base(), folder), expected)


@in_both_orders
def test_save_pretrained(wrap: Wrap, order: str, tmp_path: Path) -> None:
    adapters = adapted(wrap, order)
    model = adapters.model
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert_adapted(loaded, expected, atol=1e-4, rtol=0)
    # A training resumes from this file, whose keys are those of the model without wrappers.
    for resumed in (base(wrap), base()):
        attach(resumed, METHOD)
        result = resumed.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
        assert result.unexpected_keys == []
        assert_adapted(resumed, expected)


def test_ddp_ignores_constant_buffers(wrap: Wrap) -> None:
    model: Any = base(wrap)
    adapters = attach(model, LoRA(rank=2, train_modules="layers.0.mlp"))
    named = {name for name, _ in model.named_buffers() if is_of_adapter(name)}
    assert len(named) == 6  # of three layers: the mark, and the base's weight
    assert named <= model._ddp_params_and_buffers_to_ignore
    adapters.detach()
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


@in_both_orders
@pytest.mark.parametrize(
    ("arch", "method"),
    [
        ("gpt2", LoRA(rank=2, targets="all-linear", bias="all", dora=True)),
        ("llama", LoRA(rank=2, targets=("embedding", "head"))),
        ("llama", FullFineTuning()),
        ("gpt2", BitFit()),
        ("llama", BottleneckAdapter(kind="houlsby", size=2)),
        ("llama", PrefixLayer(prefix_length=2)),
    ],
    ids=lambda one: one if isinstance(one, str) else type(one).__name__,
)
def test_every_method_as_without_wrappers(arch: str, method: Method, order: str) -> None:
    def wrap_blocks(model: nn.Module) -> None:
        for path in itertools.chain(*stacks(model).values()):
            model.set_submodule(path, checkpoint_wrapper(model.get_submodule(path)))

    def flags(model: nn.Module) -> dict[str, bool]:
        return {without_wrappers(n): p.requires_grad for n, p in model.named_parameters()}

    plain, model = tiny_models.build(arch), tiny_models.build(arch)
    for one in (plain, model):
        next(blocks_of(one)[0].parameters()).requires_grad_(False)
    before, frozen = tiny_models.tensors_of(model), flags(model)
    if order == "before":
        wrap_blocks(model)
        assert count_parameters(model, method) == count_parameters(plain, method)
        assert str(targets(model)) == str(targets(plain))
    adapters, expected = attach(model, method, seed=0), attach(plain, method, seed=0)
    if order == "after":
        wrap_blocks(model)
    assert {p: type(m) for p, m in adapters.modules().items()} == {
        p: type(m) for p, m in expected.modules().items()
    }
    assert adapters.summary().counts == expected.summary().counts
    assert adapters.base_record() == expected.base_record()
    for handle in (adapters, expected):
        randomise(handle)
    if not isinstance(method, PrefixLayer):
        torch.testing.assert_close(logits(model), logits(plain))
        adapters.activate(None)
        assert not torch.equal(logits(model), logits(plain))

    adapters.detach()
    tiny_models.assert_same_tensors(model.state_dict(), before)
    assert flags(model) == frozen
    hooks = {n for n, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks}
    assert hooks == set()
    assert not any("save_pretrained" in module.__dict__ for module in model.modules())


@in_both_orders
def test_wrapped_layers(order: str, tmp_path: Path) -> None:
    def with_wrapped_layers(model: Any) -> Any:
        model.lm_head = checkpoint_wrapper(model.lm_head)
        model.model.embed_tokens = checkpoint_wrapper(model.model.embed_tokens)
        attention = model.model.layers[0].self_attn
        attention.q_proj = checkpoint_wrapper(attention.q_proj)
        return model

    method = LoRA(rank=2, targets=("all-linear", "embedding", "head"))
    model = tiny_models.build("llama")
    if order == "before":
        with_wrapped_layers(model)
    adapters = attach(model, method, seed=0)
    randomise(adapters)
    if order == "after":
        with_wrapped_layers(model)
    expected = logits(model)
    other = base()
    load(other, adapters.save(tmp_path / "adapter"))
    assert_adapted(other, expected)
    adapters.merge()
    assert_adapted(model, expected, atol=1e-3, rtol=0)
    adapters.unmerge()
    with adapters.per_sample(["default", None]):
        rows = logits(model)
    torch.testing.assert_close(
        rows, torch.stack([expected[0], logits(base())[1]]), atol=2e-4, rtol=0
    )
    adapters.merge(keep_base=False)
    assert_adapted(model, expected, atol=1e-3, rtol=0)


def test_adapters_of_peft_on_wrapped_blocks(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft_model = peft.get_peft_model(base(compiled), config).eval()
    expected = logits(peft_model)
    peft_model.save_pretrained(tmp_path)
    assert_adapted(load(base(), tmp_path).model, expected)
    converted = from_peft(peft_model)
    assert_adapted(converted.model, expected)
    assert "model.layers.0.self_attn.q_proj" in converted.modules()

"""A layer that is not linear, or whose output a hook changes before the adapter adds to it, is not merged into."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from random_adapters import randomise
from tiny_models import tensors_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

from lorakit.adapters import Adapters, attach
from lorakit.errors import AdapterStateError
from lorakit.methods import LoRA
from lorakit.models.quantising import quantise

# --- layers that compute something else -----------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Bounded(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-5, 5)


class Residual(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input


class ScalesItsInput(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.mul_(2))


class NeedsAMask(nn.Linear):
    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        return super().forward(input)


class Standardised(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        W = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, W, self.bias)


class Normalised(GemmaTextScaledWordEmbedding):
    def forward(self, input_ids: Tensor) -> Tensor:
        return F.normalize(super().forward(input_ids), dim=-1)


def doubles(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)  # type: ignore[method-assign]
    return layer


IDS = torch.tensor([[1, 2, 3]])
OTHERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "scale": (lambda: Doubled(8, 8), torch.ones(2, 8)),
    "bound": (lambda: Bounded(8, 8), torch.ones(2, 8)),
    "residual": (lambda: Residual(8, 8), torch.ones(2, 8)),
    "input in place": (lambda: ScalesItsInput(8, 8), torch.ones(2, 8)),
    "bfloat16": (lambda: Doubled(8, 8).bfloat16(), torch.ones(2, 8).bfloat16()),
    "instance": (lambda: doubles(nn.Linear(8, 8)), torch.ones(2, 8)),
    "convolution": (lambda: Standardised(4, 4, 3), torch.ones(2, 4, 5, 5)),
    "embedding": (lambda: Normalised(9, 8, 0, 2.0), IDS),
}


def adapted(layer: nn.Module) -> Adapters:
    adapters = attach(nn.Sequential(layer), LoRA(rank=2, alpha=3, targets="0"))
    randomise(adapters)
    return adapters


def assert_refused(adapters: Adapters, x: Tensor | None, says: str) -> None:
    """Assert that a merge is refused with a message, and changes neither weights nor outputs."""
    model = adapters.model
    before = tensors_of(model)
    output = None if x is None else model(x.clone())
    for merge in (adapters.merge, adapters.require_mergeable):
        with pytest.raises(AdapterStateError, match=says):
            merge()
    assert adapters.active == {"default": 1.0}
    assert not adapters.merged
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    if x is not None:
        assert torch.equal(model(x.clone()), output)


def assert_merges(adapters: Adapters, *args: Tensor) -> None:
    model = adapters.model
    adapted = model(*args)
    adapters.merge()
    torch.testing.assert_close(model(*args), adapted)
    adapters.unmerge()
    torch.testing.assert_close(model(*args), adapted)


@pytest.mark.parametrize(("make", "x"), OTHERS.values(), ids=OTHERS)
def test_a_layer_that_computes_something_else_is_refused_by_name(
    make: Callable[[], nn.Module], x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    layer = make()
    adapters = adapted(layer)
    reason = (
        rf"the forward method of '0' \({type(layer).__name__}\) does not compute what \w+ computes"
    )
    assert re.search(rf"'default' can be used, but not merged: {reason}", caplog.text)
    assert_refused(adapters, x, rf"'default' cannot be merged: {reason}\. Use it unmerged")


@pytest.mark.parametrize("kind", [Doubled, Bounded, Residual])
def test_unmerged_the_adapter_adds_to_the_output(kind: type[nn.Linear]) -> None:
    layer, x = kind(8, 8), torch.randn(3, 8)
    base = layer(x)
    module: Any = adapted(layer).modules()["0"]
    torch.testing.assert_close(layer(x), base + 1.5 * x @ module.lora_A.T @ module.lora_B.T)


def test_a_layer_that_cannot_be_tried_is_refused() -> None:
    adapters = adapted(NeedsAMask(8, 8))
    says = r"the forward method of '0' \(NeedsAMask\) raises AssertionError on a trial input"
    assert_refused(adapters, None, says)


def test_a_forward_method_replaced_after_attach_is_found() -> None:
    layer = nn.Linear(8, 8)
    adapters = adapted(layer)
    doubles(layer)
    assert_refused(adapters, torch.ones(2, 8), "the forward method of '0'")


# --- layers that compute the formula --------------------------------------------------------------------------


class Counts(nn.Linear):
    """Counts its calls in an attribute and in a buffer, keeps its output, and drops out in training."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls = 0
        self.register_buffer("total", torch.zeros(()))
        self.inner = nn.Dropout(0.5)

    def forward(self, mask: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        self.calls += 1
        self.total += 1
        self.last = self.inner(super().forward(hidden))
        return self.last


class SameConvolution(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class WithBias(nn.Linear):
    """Returns its bias beside its output."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(input), self.bias


def watched(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: None)
    return layer


def aligned(layer: nn.Module) -> nn.Module:
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return layer


FORMULAS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "falcon": (lambda: FalconLinear(8, 8), (torch.ones(2, 3, 8),)),
    "accelerate": (lambda: aligned(nn.Linear(8, 8)), (torch.ones(2, 8),)),
    "tuple": (lambda: watched(WithBias(8, 8)), (torch.ones(2, 8),)),
    "scaled embedding": (lambda: GemmaTextScaledWordEmbedding(9, 8, 0, 3.0), (IDS,)),
    "convolution": (
        lambda: SameConvolution(4, 4, (3, 1), padding=(2, 1), dilation=2, padding_mode="circular"),
        (torch.ones(2, 4, 9, 9),),
    ),
    "same padding": (lambda: SameConvolution(4, 4, 3, padding="same"), (torch.ones(2, 4, 9, 9),)),
}


@pytest.mark.parametrize(("make", "args"), FORMULAS.values(), ids=FORMULAS)
def test_a_layer_with_the_right_formula_merges(
    make: Callable[[], nn.Module], args: tuple[Tensor, ...], caplog: pytest.LogCaptureFixture
) -> None:
    adapters = adapted(make())
    assert not caplog.records
    assert_merges(adapters, *args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_no_difference(dtype: torch.dtype) -> None:
    layer = FalconLinear(512, 64).to(dtype)
    adapters = adapted(layer)
    adapters.merge()
    assert adapters.merged


def test_a_trial_changes_nothing() -> None:
    layer = Counts(8, 8)
    generator = torch.get_rng_state()
    adapters = attach(nn.Sequential(layer).train(), LoRA(rank=2, targets="0"), seed=0)
    adapters.merge()
    assert torch.equal(torch.get_rng_state(), generator)
    assert layer.calls == 0
    assert layer.total == 0
    assert not hasattr(layer, "last")
    assert layer.training
    assert layer.inner.training


def test_a_layer_of_a_known_type_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.adapters.linearity.trial_input", None)
    for layer in (nn.Linear(8, 8), nn.Embedding(9, 8), nn.Conv1d(4, 4, 3)):
        adapters = adapted(layer)
        layer.register_forward_hook(lambda module, args, output: 2 * output)  # after the adapter's
        adapters.merge()
        assert adapters.merged


def test_a_layer_without_values_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.adapters.linearity.trial_input", None)
    attach(nn.Sequential(Doubled(8, 8, device="meta")), LoRA(rank=2, targets="0"))


# --- hooks ----------------------------------------------------------------------------------------------------


def double(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return 2 * output


def double_in_place(module: nn.Module, args: tuple, output: Tensor) -> None:
    with torch.no_grad():
        output.mul_(2)


def double_with_keywords(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    assert isinstance(kwargs, dict)
    return 2 * output


def bound(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output.clamp(-6, 6)


@pytest.mark.parametrize("hook", [double, double_in_place, bound, double_with_keywords])
@pytest.mark.parametrize(
    "quantised", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float", "nf4"]
)
def test_a_hook_that_changes_the_output_before_the_adapter(
    hook: Callable[..., Any], quantised: bool
) -> None:
    model = tiny_models.build("llama") if quantised else nn.Sequential(nn.Linear(8, 8))
    if quantised:
        quantise(model, "nf4")  # type: ignore[arg-type]
    path = "model.layers.0.mlp.up_proj" if quantised else "0"
    layer = model.get_submodule(path)
    layer.register_forward_hook(hook, with_kwargs=hook is double_with_keywords)
    adapters = attach(model, LoRA(rank=2, targets=path))
    randomise(adapters)
    says = (
        rf"the forward hook {hook.__name__} on '{path}', which runs before the adapter's, changes"
    )
    with pytest.raises(AdapterStateError, match=says):
        adapters.merge()
    if not quantised:
        assert_refused(adapters, torch.ones(2, 8), says)


def test_a_hook_put_first_after_attach_is_found() -> None:
    layer = nn.Linear(8, 8)
    adapters = adapted(layer)
    handle = layer.register_forward_hook(double, prepend=True)
    assert_refused(adapters, torch.ones(2, 8), "the forward hook double on '0'")
    handle.remove()
    assert_merges(adapters, torch.ones(2, 8))


@pytest.fixture
def global_hook() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: 2 * output if isinstance(module, nn.Linear) else None
    )
    yield
    handle.remove()


@pytest.mark.usefixtures("global_hook")
def test_a_global_hook_is_found() -> None:
    assert_refused(adapted(nn.Linear(8, 8)), torch.ones(2, 8), "the forward hook .*lambda.* on '0'")


def test_a_hook_that_fails_on_the_trial_is_refused() -> None:
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda module, args, output: output.view(7, 9))
    says = "the forward hook .*lambda.* on '0' raises RuntimeError on a trial input"
    assert_refused(adapted(layer), None, says)


def test_a_hook_that_only_reads_is_called_once_by_a_merge_and_not_by_attach() -> None:
    layer = nn.Linear(8, 8)
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    adapters = adapted(layer)
    assert not outputs
    adapters.merge()
    assert len(outputs) == 1
    assert not outputs[0].requires_grad


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_hook_keeps_its_place_when_the_adapter_is_unmerged(training: bool) -> None:
    layer, x = nn.Linear(8, 8), torch.randn(3, 8)
    layer.register_forward_hook(lambda module, args, output: None)
    adapters = adapted(layer.train(training))
    adapters.model.train(training)
    layer.register_forward_hook(double)
    assert_merges(adapters, x)


def test_a_hook_added_while_merged_runs_after_the_adapter() -> None:
    layer, x = nn.Linear(8, 8).eval(), torch.randn(3, 8)
    adapters = adapted(layer)
    adapters.model.eval()
    adapters.merge()
    layer.register_forward_hook(double)
    merged = layer(x)
    adapters.unmerge()
    torch.testing.assert_close(layer(x), merged)


# --- save_pretrained ------------------------------------------------------------------------------------------


def test_save_pretrained_writes_no_folder_that_loads_as_another_function(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    model.get_submodule("model.layers.0.mlp.up_proj").register_forward_hook(double)
    randomise(attach(model, LoRA(rank=2, targets="mlp")))
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match="the adapter 'default' is no part of the weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path)

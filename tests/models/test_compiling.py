"""Compiled blocks compute the same numbers; no block is compiled unless configured."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny_models
import torch
from random_adapters import randomise
from torch import nn

from lorakit import LoRA, attach
from lorakit.compute.mode import evaluating
from lorakit.errors import ConfigurationError
from lorakit.models import faster
from lorakit.models.compiling import _require_compiler, compile_blocks

pytestmark = pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # dynamo inspects its inputs
)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batches() -> list[torch.Tensor]:
    return [
        torch.arange(3, 3 + rows * length).view(rows, length) % 40
        for rows, length in ((2, 7), (3, 5))
    ]


def count_compiled(model: nn.Module) -> int:
    return sum(module._compiled_call_impl is not None for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "backend"), [("llama", "eager"), ("bert", "aot_eager")])
def test_compiled_blocks_compute_the_same_gradients(arch: str, backend: str) -> None:
    results = []
    for compiled in (False, True):
        model = tiny_models.build(arch, num_hidden_layers=1)  # each block takes seconds to compile
        model.set_attn_implementation("sdpa")
        keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
        if compiled:
            compile_blocks(model, backend=backend)
            assert count_compiled(model) == 1
            assert (list(model.state_dict()), [type(m) for m in model.modules()]) == (keys, kinds)
        adapters = attach(model, LoRA(rank=2, alpha=3, targets="attention.qv"), seed=0)
        randomise(adapters)
        faster.make_faster(model)
        model.eval()  # no dropout: its random bits differ
        for ids in batches():
            mask = torch.ones_like(ids)
            mask[-1, -2:] = 0
            output = model(input_ids=ids, attention_mask=mask)[0]
            output.float().square().sum().backward()
        results.append([p.grad for p in adapters.trainable_parameters()])
    assert min(gradient.abs().max() for gradient in results[0]) > 1e-4
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_evaluation_runs_the_uncompiled_blocks() -> None:
    model = tiny_models.build("llama")
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    compile_blocks(model, backend=backend)  # type: ignore[arg-type]
    assert count_compiled(model) == 2
    ids = batches()[0]
    with evaluating(model):
        first = model(ids).logits
    assert not compiled
    torch.testing.assert_close(model(ids).logits, first)
    assert compiled


def test_a_model_without_blocks_is_rejected() -> None:
    with pytest.raises(ConfigurationError, match="no list of blocks"):
        compile_blocks(nn.Sequential(nn.Linear(2, 2)), backend="eager")


def test_a_missing_compiler_is_named_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigurationError, match="no-such-compiler, clang"):
        compile_blocks(tiny_models.build("llama"))


def test_windows_compiler_is_cl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr("shutil.which", {"g++": "g++", "clang++": "clang++"}.get)
    with pytest.raises(ConfigurationError, match=r"\(cl\).*Build Tools for Visual Studio"):
        _require_compiler(torch.device("cpu"))
    monkeypatch.setattr("shutil.which", {"cl": "cl"}.get)
    _require_compiler(torch.device("cpu"))


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.models.compiling.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="triton is not installed"):
        _require_compiler(torch.device("cuda"))

"""Quantised projections store the values of their format and compute with them."""

from __future__ import annotations

import copy
import sys
import threading
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from tiny_runs import save_base
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorakit.errors import AdapterStateError, BaseModelError, ConfigurationError
from lorakit.models import digests, loading, quantising
from lorakit.models.dtype_choice import compute_dtype
from lorakit.models.loading import load_base
from lorakit.models.quantised import (
    QuantisedWeight,
    quantised_weight,
    quantised_weights,
    require_exact_layers,
)
from lorakit.models.quantised_layers import Int8Linear, NF4Linear
from lorakit.models.quantising import projections_as_stored, quantise

KINDS = ("nf4", "int8")
WIDE = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
"""Settings of a tiny Llama whose layer widths are all multiples of NF4's block size."""
LAYERS = {"nf4": NF4Linear, "int8": Int8Linear}


def linear(dtype: torch.dtype = torch.float32, bias: bool = True, width: int = 96) -> nn.Linear:
    layer = nn.Linear(width, 64, bias=bias)
    nn.init.normal_(layer.weight, std=0.1)
    return layer.to(dtype)


def weight_of(layer: nn.Module) -> QuantisedWeight:
    weight = quantised_weight(layer)
    assert weight is not None
    return weight


def whole_twin(layer: nn.Module) -> nn.Linear:
    """An ordinary layer with the dequantised weight."""
    twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    twin.weight = nn.Parameter(weight_of(layer).dequantised(), requires_grad=False)
    twin.bias = None if layer.bias is None else copy.deepcopy(layer.bias)
    return twin


# --- the numbers ----------------------------------------------------------------------------------

# QLoRA (Dettmers et al. 2023), appendix E.
NF4_LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [128, 96, 7], ids="width{}".format)
def test_nf4_numbers(dtype: torch.dtype, width: int) -> None:
    """Also if a block of 64 continues in the next row, or is not full."""
    layer = linear(dtype, width=width)
    W = layer.weight.detach().double().numpy().ravel()
    blocks = np.pad(W, (0, -W.size % 64)).reshape(-1, 64)
    scales = np.abs(blocks).max(1, keepdims=True)
    levels = np.abs((blocks / scales)[..., None] - NF4_LEVELS).argmin(-1)
    expected = (NF4_LEVELS[levels] * scales).ravel()[: W.size].reshape(64, width)
    quantised = weight_of(NF4Linear(layer))
    # A level times a scale, both in float32.
    np.testing.assert_allclose(quantised.matrix().numpy(), expected, rtol=2**-22)
    assert quantised.matrix().dtype == torch.float32
    assert quantised.dequantised().equal(quantised.matrix().to(dtype))
    assert (quantised.kind, quantised.dtype, quantised.numel()) == ("nf4", dtype, 64 * width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_numbers(dtype: torch.dtype) -> None:
    layer = linear(dtype)
    W = layer.weight.detach().double()
    quantised = weight_of(Int8Linear(layer))
    W_q = quantised.matrix().double()
    step = W.abs().amax(1, keepdim=True) / 127
    # bitsandbytes divides in float16: its 11 bits change a scale by up to 2^-12, which can round a number
    # of up to 127 steps to the other neighbour.
    torch.testing.assert_close(W_q / step, (W_q / step).round(), rtol=2**-11, atol=1e-6)
    assert ((W_q - W).abs() / step).max() < 0.5 + 127 * 2**-11
    assert (quantised.kind, quantised.dtype, quantised.shape) == ("int8", dtype, W.shape)


# --- one layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128,), (5, 128), (2, 5, 128), (2, 5, 96)], ids=str)
def test_a_layer_equals_its_dequantised_twin(kind, dtype, shape) -> None:
    layer = LAYERS[kind](linear(dtype, width=shape[-1]))
    twin = whole_twin(layer)
    upstream = torch.randn(*shape[:-1], 64).to(dtype)
    x, x_twin = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    x_twin.data.copy_(x.data)
    y, y_twin = layer(x), twin(x_twin)
    y.backward(upstream)
    y_twin.backward(upstream)
    # The same products of the same numbers; another order of the scales changes the last bit of W_q.
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=0, atol=2**-5)
    torch.testing.assert_close(y, y_twin, **tolerance)
    torch.testing.assert_close(x.grad, x_twin.grad, **tolerance)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad, **tolerance)
    assert layer.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_compute_the_same(kind) -> None:
    layer = LAYERS[kind](linear(torch.bfloat16))
    x = torch.randn(4, 96).bfloat16()
    trained = layer.train()(x)
    with torch.no_grad():
        assert layer.eval()(x).equal(trained)
    with torch.inference_mode():
        assert layer(x).equal(trained)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_passes_after_an_evaluation(kind) -> None:
    layer = LAYERS[kind](linear(torch.bfloat16)).eval()
    x = torch.randn(4, 96).bfloat16()
    with torch.no_grad():
        layer(x)
    x.requires_grad_()
    layer.train()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.count_nonzero() == x.grad.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_bias_keeps_its_precision(kind) -> None:
    layer = LAYERS[kind](linear(torch.bfloat16))
    layer.bias = nn.Parameter(torch.randn(64))
    layer(torch.randn(4, 96).bfloat16()).float().sum().backward()
    assert layer.bias.dtype == torch.float32
    torch.testing.assert_close(layer.bias.grad, torch.full((64,), 4.0))


@pytest.mark.parametrize("kind", KINDS)
def test_neither_input_nor_dequantised_weight_is_saved_for_the_backward_pass(kind) -> None:
    layer = LAYERS[kind](linear(bias=False))
    saved: list[torch.Tensor] = []
    x = torch.randn(4, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert all(tensor.dtype in (torch.uint8, torch.int8) or tensor.ndim == 1 for tensor in saved)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_and_another_dtype_compute_the_same(kind) -> None:
    layer = LAYERS[kind](linear(bias=False))
    x = torch.randn(4, 96)
    expected = layer(x)
    assert copy.deepcopy(layer)(x).equal(expected)
    assert layer.to(torch.float64)(x).equal(expected)  # packed numbers and scales are not cast


def test_scales_follow_their_weight_to_another_device() -> None:
    layer = Int8Linear(linear())
    layer.weight.SCB = layer.weight.SCB.to("meta")  # as if only the weight were on the CPU
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        layer.to("cpu")


# --- whole models ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", [*tiny_models.ARCHITECTURES, "M2M100", "ModernBert", "UMT5"])
def test_a_model_equals_its_dequantised_twin(arch: str, kind) -> None:
    model, twin = tiny_models.build(arch), tiny_models.build(arch)
    batch = tiny_models.example_batch(arch, model)
    count = quantise(model, kind)
    weights = dict(quantised_weights(model))
    assert count == len(weights) >= 2
    with torch.no_grad():
        for path, weight in weights.items():
            twin.get_submodule(path).weight.copy_(weight.dequantised())
        # float32: the maximum error of two layers of width 32.
        torch.testing.assert_close(model(**batch)[0], twin(**batch)[0], rtol=1e-4, atol=1e-4)
    kept = {n: p for n, p in model.named_parameters() if n.removesuffix(".weight") not in weights}
    assert all(p.equal(twin.get_parameter(n)) for n, p in kept.items())
    assert all(p.ndim < 2 or "embed" in n or p.shape[0] >= 3 for n, p in kept.items())


def test_which_layers_are_quantised() -> None:
    model = tiny_models.build("llama", "sequence-classification")
    quantise(model, "nf4")
    paths = [path for path, _ in quantised_weights(model)]
    assert len(paths) == 14
    assert all(path.startswith("model.layers.") for path in paths)
    assert type(model.score) is nn.Linear
    names = {path.rpartition(".")[2] for path in paths}
    assert names == {*("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}


def test_layers_whose_weight_other_modules_read_are_not_quantised() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16)
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
            self.tied = nn.Linear(8, 8)
            self.down.weight = self.tied.weight
            self.again = self.up

    model = nn.ModuleDict({"blocks": nn.ModuleList([Block()])})
    assert quantise(model, "nf4") == 1
    block = model["blocks"][0]
    assert block.again is block.up
    assert type(block.up) is NF4Linear
    assert type(block.down) is type(block.tied) is type(block.encoder.linear1) is nn.Linear


def test_a_quantised_mamba_runs() -> None:
    """It multiplies by the weight of dt_proj itself, and its kernel by those of x_proj and out_proj."""
    settings = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 50, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**settings)).eval()
    assert quantise(model, "nf4") == 1
    assert type(model.get_submodule("backbone.layers.0.mixer.in_proj")) is NF4Linear
    assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_the_layer_whose_dtype_t5_reads_is_not_quantised() -> None:
    model = tiny_models.build("t5")
    quantise(model, "nf4")
    assert type(model.encoder.block[0].layer[1].DenseReluDense.wo) is nn.Linear


def test_conv1d_keeps_its_layout() -> None:
    model = tiny_models.build("gpt2")
    shapes = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, Conv1D)}
    quantise(model, "nf4")
    assert {path: weight.shape for path, weight in quantised_weights(model)} == shapes


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_a_half_or_a_quarter(kind) -> None:
    layer = linear(torch.bfloat16, bias=False)
    stored = weight_of(LAYERS[kind](layer)).packed.nbytes
    assert stored == layer.weight.nbytes // (4 if kind == "nf4" else 2)


# --- loading --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return save_base(tmp_path / "tiny", **WIDE)


@pytest.mark.parametrize("kind", KINDS)
def test_load_base(folder: str, kind) -> None:
    base = load_base(folder, dtype=kind)
    expected = load_base(folder, dtype=compute_dtype(kind)).model
    quantise(expected, kind)
    ids = torch.tensor([[3, 4, 5, 6]])
    assert base.model(ids).logits.equal(expected(ids).logits)
    assert not base.model.training
    (notice,) = base.notices
    assert f"14 projections are quantised to {kind}" in notice


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stored", "computed"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_projections_are_cast_one_at_a_time(tmp_path, monkeypatch, kind, stored, computed) -> None:
    """With the same bits as those of a base that is cast whole."""
    model = tiny_models.build("llama", **WIDE).to(getattr(torch, stored))
    model.model.norm.float()  # as in some checkpoints
    model.save_pretrained(tmp_path)
    whole = load_base(tmp_path, dtype=computed).model
    quantise(whole, kind)
    monkeypatch.setattr(loading, "compute_dtype", lambda *_: getattr(torch, computed))
    before: list[dict[str, torch.dtype]] = []

    def spy(model: nn.Module, *arguments) -> int:
        before.append({name: p.dtype for name, p in model.named_parameters()})
        return quantise(model, *arguments)

    monkeypatch.setattr(quantising, "quantise", spy)
    model = load_base(tmp_path, dtype=kind).model
    weights = dict(quantised_weights(model))
    assert before[0] == {
        name: getattr(torch, stored if name.removesuffix(".weight") in weights else computed)
        for name in before[0]
    }
    assert len(weights) == 14
    for path, weight in quantised_weights(whole):
        assert weights[path].digests() == weight.digests()
        assert weights[path].dtype == weight.dtype == getattr(torch, computed)
    for name, parameter in whole.named_parameters():
        assert model.get_parameter(name).equal(parameter)


def test_models_that_other_threads_load_are_cast_whole(tmp_path) -> None:
    half = tmp_path / "half"
    tiny_models.build("llama").bfloat16().save_pretrained(half)
    loaded = []
    thread = threading.Thread(target=lambda: loaded.append(load_base(half, dtype="float32").model))
    with projections_as_stored() as dtypes:
        thread.start()
        thread.join()
        assert not dtypes
    assert {p.dtype for p in loaded[0].parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_rounded_form_is_hashed(monkeypatch, kind) -> None:
    layer, hashed = linear(), []
    monkeypatch.setattr(digests, "_bytes", lambda chunk: hashed.append(chunk.dtype) or b"")
    LAYERS[kind](layer)
    assert hashed == [torch.bfloat16]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_does_not_map_its_checkpoint(tmp_path, monkeypatch, kind) -> None:
    folder = save_base(tmp_path / "base")
    monkeypatch.setattr(loading, "compute_dtype", lambda *_: torch.float32)  # the file's
    maps = Path("/proc/self/maps")
    model = load_base(folder, dtype=kind).model
    assert folder not in maps.read_text()
    plain = load_base(folder).model
    assert folder in maps.read_text()
    assert model.get_input_embeddings().weight.equal(plain.get_input_embeddings().weight)


def test_load_base_says_that_stacked_experts_are_not_quantised(tmp_path: Path) -> None:
    model = tiny_models.build("mixtral", num_local_experts=8)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    model.save_pretrained(tmp_path)
    _, notice, *_ = load_base(tmp_path, dtype="nf4").notices
    share = f"{experts / model.num_parameters():.0%}"
    assert f"The experts of this model, {share} of its weights, are not quantised" in notice


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_a_quantised_base_that_was_saved(folder, tmp_path, kind) -> None:
    model = load_base(folder, dtype=kind).model
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ours, theirs = dict(quantised_weights(model)), dict(quantised_weights(again))
    assert theirs.keys() == ours.keys()
    for path, weight in ours.items():
        assert theirs[path].kind == kind
        assert theirs[path].matrix().equal(weight.matrix())


def test_a_checkpoint_that_is_already_quantised(folder, tmp_path) -> None:
    load_base(folder, dtype="nf4").model.save_pretrained(tmp_path / "saved")
    with pytest.raises(BaseModelError, match=r"quantised in its checkpoint already.*at auto"):
        load_base(tmp_path / "saved", dtype="nf4")
    model = load_base(tmp_path / "saved").model
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer) is bnb.nn.Linear4bit
    assert not layer.support_avx512bf16_for_cpu  # otherwise an evaluation would block its gradient


def test_an_unknown_kind(folder: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"'nf5' is not one of .*int8.*Did you mean 'nf4'\?"
    ):
        load_base(folder, dtype="nf5")  # type: ignore[arg-type]
    with pytest.raises(
        ConfigurationError, match="'fp4' is not a kind of quantisation; choose one of nf4, int8"
    ):
        quantise(nn.Linear(2, 2), "fp4")  # type: ignore[arg-type]


def test_without_the_library(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "transformers.utils.import_utils.is_bitsandbytes_available"
    monkeypatch.setattr(name, lambda version: False)
    with pytest.raises(ConfigurationError, match=r'pip install "lorakit\[quantised\]"'):
        load_base(folder, dtype="nf4")


def test_a_model_without_projections() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 4))
    with pytest.raises(BaseModelError, match="Sequential has no linear layer in numbered blocks"):
        quantise(model, "int8")


# --- bitsandbytes' own layers ---------------------------------------------------------------------


def own_layers(**settings: int) -> PreTrainedModel:
    """Return the layers that transformers creates for a BitsAndBytesConfig."""
    model = tiny_models.build("llama", **settings)
    for path, module in list(model.model.named_modules()):
        if type(module) is nn.Linear:
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, quant_type="nf4"
            )
            layer.weight = bnb.nn.Params4bit(module.weight.data, quant_type="nf4", module=layer)
            model.model.set_submodule(path, layer.to("cpu"))
    return model


def test_nested_scales_are_dequantised() -> None:
    layer = own_layers(**WIDE).model.layers[0].mlp.up_proj
    assert layer.weight.quant_state.nested
    x = torch.randn(3, 64)
    whole = weight_of(layer).matrix()
    torch.testing.assert_close(layer(x), F.linear(x, whole), rtol=1e-5, atol=1e-5)


def test_a_repacked_layer_is_rejected() -> None:
    model = own_layers(**WIDE)
    layer = model.model.layers[1].mlp.up_proj
    require_exact_layers(model)
    layer.weight.quant_state.packing_format_for_cpu = True  # as after an evaluation on a CPU
    with pytest.raises(AdapterStateError, match=r"layers\.1\.mlp\.up_proj.*no gradient"):
        require_exact_layers(model)


def test_layers_that_use_the_scales_of_other_blocks_are_rejected() -> None:
    model = own_layers()
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    if layer(x).allclose(F.linear(x, weight_of(layer).matrix()), atol=1e-3):
        require_exact_layers(model)  # a bitsandbytes without the bug
    else:
        with pytest.raises(
            AdapterStateError, match=r"q_proj' has 32 inputs.*scales of other blocks"
        ):
            require_exact_layers(model)


def test_no_layer_is_quantised_without_an_import_of_bitsandbytes(monkeypatch) -> None:
    layer = NF4Linear(linear())
    assert quantised_weight(layer) is not None
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    assert quantised_weight(layer) is None
    require_exact_layers(layer)

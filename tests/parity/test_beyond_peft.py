"""Features that PEFT cannot express, compared with the formulas in float64.

If possible, a test also shows the limitation in PEFT itself.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import arithmetic
import peft
import peft_models
import pytest
import tiny_models
import torch
from arithmetic import TIGHT, float64_model, inputs
from covering_array import fresh_model
from layouts import expected_targets
from logits import assert_differ, assert_same, randomise
from torch import Tensor, nn

from lorakit import Adapters, LoRA, attach, load
from lorakit.errors import AdapterFileError, ConfigurationError

RANK, ALPHA = 2, 3.0
SCALING = ALPHA / RANK
EXACT = 1e-12
"""Tolerance if everything computes in float64."""

NOT_IN_PEFT = {
    "dora on nn.MultiheadAttention": "PEFT raises an error when it creates the adapter",
    "dora on a grouped convolution": "PEFT divides by the norm of a different weight",
    "dora on a row of zeros": "PEFT divides zero by zero",
    "merging a grouped convolution": "PEFT's A uses all input channels, and PEFT rejects the merge",
    "dilated convolution": "PEFT's A is not dilated, so its output has a different size",
    "padding mode of a convolution": "PEFT's A pads with zeros, so its output differs at the borders",
    "two scalings in one nn.MultiheadAttention": "PEFT has one alpha for both projections",
    "one layer at two places": "PEFT replaces the layer at one of the places",
    "slices of a fused projection": "PEFT has no slices; the file contains the equivalent full-width adapter",
    "pissa over the untouched base": "PEFT changes the base; the file contains the equivalent adapter of rank 2r",
    "tie_head": "PEFT's file contains a second adapter for the head",
}
"""Each has tests in a section below, or in test_pissa. The last three have an equivalent in PEFT's
format, which test_peft_files and test_layer_kinds load with PEFT; here they are compared with the formula."""


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def random_adapter(model: nn.Module, **settings) -> Adapters:
    handle = attach(model, LoRA(rank=RANK, alpha=ALPHA, **settings), dtype=torch.float64, seed=1)
    randomise(handle.trainable_parameters(), seed=2)
    return handle


def effective(W: Tensor, module: nn.Module, slices: tuple = (), scaling: float = SCALING) -> Tensor:
    """Return the adapted matrix W by the formula."""
    W = W + arithmetic.low_rank(module.lora_A, module.lora_B, scaling, len(W), slices)
    return W if module.magnitude is None else arithmetic.rescaled(W, module.magnitude, slices)


def check_own_folder(handle: Adapters, fresh: nn.Module, x: Tensor, folder: Path) -> None:
    """Check that the folder is in lorakit's format only (PEFT would compute something else) and loads exactly."""
    expected = handle.model(x)
    handle.save(folder)
    assert not (folder / "adapter_config.json").exists()
    load(fresh, folder)
    assert torch.equal(fresh(x), expected)


# --- slices of a fused projection ----------------------------------------------------------------

FUSED = [
    *((a, f"attention.{x}") for a in ("gpt2", "gpt-neox", "bloom", "phi3") for x in "qkv"),
    *((a, f"attention.{x}") for a in ("gpt2", "gpt-neox", "bloom", "phi3") for x in ("qv", "qkv")),
    *(("phi3", role) for role in ("mlp.gate", "mlp.up", "mlp")),
]


@pytest.mark.parametrize("option", ["plain", "dora", "pissa"])
@pytest.mark.parametrize(("arch", "role"), FUSED, ids=lambda value: value)
def test_slices_of_a_fused_projection(arch: str, role: str, option: str):
    """Single and combined slices, contiguous and interleaved, of equal and (Phi-3) unequal widths."""
    model, oracle = float64_model(arch), float64_model(arch)
    batch = inputs(arch, model)
    base = model(**batch).logits
    settings = {"plain": {}, "dora": {"dora": True}, "pissa": {"init": "pissa"}}[option]
    handle = random_adapter(model, targets=role, **settings)
    targets = expected_targets(arch, tiny_models.natural_head(arch), (role,))
    assert any(target.slices for target in targets.values())
    for path, target in targets.items():
        W = arithmetic.matrix_of(oracle.get_submodule(path))
        if option == "pissa":
            W = W - arithmetic.principal(W, RANK, target.slices)
        W = effective(W, handle.modules()[path], target.slices)
        arithmetic.set_matrix(oracle.get_submodule(path), W)

    adapted = model(**batch).logits
    assert_differ(adapted, base)
    assert_same(adapted, oracle(**batch).logits, TIGHT)
    handle.merge()
    for path in targets:
        merged, expected = (arithmetic.matrix_of(m.get_submodule(path)) for m in (model, oracle))
        assert_same(merged, expected, EXACT)


@pytest.mark.parametrize("role", ["q", "k", "v"])
@pytest.mark.parametrize("arch", ["gpt2", "gpt-neox", "bloom", "phi3"])
def test_a_slice_changes_no_other_rows(arch: str, role: str):
    model = float64_model(arch)
    head = tiny_models.natural_head(arch)
    (path, own), *_ = expected_targets(arch, head, (f"attention.{role}",)).items()
    layer = model.get_submodule(path)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    base = layer(x)
    random_adapter(model, targets=f"attention.{role}")
    changed = (layer(x) - base).abs().amax(dim=(0, 1))
    rows = torch.zeros(len(changed), dtype=torch.bool)
    rows[list(own.slices[0])] = True
    assert (changed[rows] > 0).all()
    assert (changed[~rows] == 0).all()


# --- tie_head ------------------------------------------------------------------------------------

TIED = ("gpt2", "opt", "bloom", "gemma", "gemma2", "gemma3", "smollm3")


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
@pytest.mark.parametrize("arch", TIED)
def test_a_tied_head_uses_the_adapter_of_the_embedding(arch: str, init: str):
    model, oracle, untied = (float64_model(arch) for _ in range(3))
    batch = inputs(arch, model)
    base = model(**batch).logits
    handle = random_adapter(model, targets="embedding", tie_head=True, init=init)
    table = oracle.get_input_embeddings()
    W = arithmetic.matrix_of(table)
    if init == "pissa":
        W = W - arithmetic.principal(W, RANK)
    W = effective(W, next(iter(handle.modules().values())))
    table.weight.copy_(W.T)  # in place: the head shares this tensor
    adapted = model(**batch).logits
    assert_differ(adapted, base)
    assert_same(adapted, oracle(**batch).logits, TIGHT)

    arithmetic.set_matrix(untied.get_input_embeddings(), W)
    assert_differ(adapted, untied(**batch).logits)
    handle.merge()
    assert_same(model.get_input_embeddings().weight, W.T, EXACT)
    assert_same(model.get_output_embeddings().weight, W.T, EXACT)
    assert_same(model(**batch).logits, adapted, TIGHT)


def test_a_tied_head_cannot_use_dora():
    """A head with the table's delta but without its magnitudes is no longer tied to it."""
    model = fresh_model("gpt2", "causal-lm")
    with pytest.raises(ConfigurationError, match=r"dora.*tie_head|tie_head.*dora"):
        attach(model, LoRA(rank=RANK, targets="embedding", tie_head=True, dora=True))


@pytest.mark.parametrize("arch", TIED)
def test_tied_head_in_peft(arch: str, tmp_path: Path):
    model = fresh_model(arch, "causal-lm")
    batch = tiny_models.example_batch(arch, model)
    base = model(**batch).logits
    handle = attach(model, LoRA(rank=RANK, alpha=ALPHA, targets="embedding", tie_head=True))
    randomise(handle.trainable_parameters(), seed=2)
    expected = model(**batch).logits
    assert_differ(expected, base)
    folder = handle.save(tmp_path / "adapter")
    assert_same(peft_models.load(fresh_model(arch, "causal-lm"), folder)(**batch).logits, expected)
    again = fresh_model(arch, "causal-lm")
    load(again, folder)
    assert torch.equal(again(**batch).logits, expected)


class TwoEmbeddings(nn.Module):
    """Two embeddings and the head share one table."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(8, 4), nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        table = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
        self.first.weight = self.second.weight = self.head.weight = nn.Parameter(table)

    def get_input_embeddings(self) -> nn.Module:
        return self.first

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.first(ids) + self.second(ids))


def test_a_head_tied_to_one_of_two_adapted_embeddings_in_peft(tmp_path: Path):
    model, ids = TwoEmbeddings(), torch.arange(4)[None]
    handle = attach(model, LoRA(rank=RANK, targets=("first", "second"), tie_head=True))
    randomise(handle.trainable_parameters(), seed=2)
    folder = handle.save(tmp_path / "adapter")
    assert_same(peft_models.load(TwoEmbeddings(), folder)(ids), model(ids))


# --- nn.MultiheadAttention -----------------------------------------------------------------------


class SelfAttention(nn.Module):
    """One self-attention layer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x)[0]


def attention_input() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("role", ["q", "k", "v", "o", "qv", "qkvo"])
def test_dora_on_multihead_attention(role: str, tmp_path: Path):
    config = peft.LoraConfig(target_modules=["mha"], use_dora=True)
    with pytest.raises(ValueError, match="does not support DoRA"):
        peft.get_peft_model(SelfAttention(), config)

    model, oracle, x = SelfAttention(), SelfAttention(), attention_input()
    base = model(x)
    handle = random_adapter(model, targets=f"attention.{role}", dora=True)
    modules = handle.modules()
    inside = tuple(tuple(range(8 * i, 8 * i + 8)) for i, x in enumerate("qkv") if x in role)
    assert ("mha" in modules) == bool(inside)
    assert ("mha.out_proj" in modules) == ("o" in role)
    for path, module in modules.items():
        layer = oracle.get_submodule(path)
        W = effective(arithmetic.matrix_of(layer), module, inside if path == "mha" else ())
        arithmetic.set_matrix(layer, W)
    assert_differ(model(x), base)
    assert_same(model(x), oracle(x), EXACT)
    check_own_folder(handle, SelfAttention(), x, tmp_path / "adapter")
    handle.merge()
    assert_same(model(x), oracle(x), EXACT)


def test_two_scalings_in_one_multihead_attention(tmp_path: Path):
    patterns = {"alpha_pattern": {"out_proj": 7.0}}
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["mha"], **patterns)
    with pytest.warns(RuntimeWarning, match=r"did not match any targeted module.*out_proj"):
        theirs = peft.get_peft_model(SelfAttention(), config).base_model.model.mha
    assert theirs.base_layer.out_proj.scaling == theirs.scaling

    model, oracle, x = SelfAttention(), SelfAttention(), attention_input()
    base = model(x)
    handle = random_adapter(model, targets="mha", **patterns)
    for path, scaling in (("mha", SCALING), ("mha.out_proj", 7.0 / RANK)):
        layer = oracle.get_submodule(path)
        W = effective(arithmetic.matrix_of(layer), handle.modules()[path], scaling=scaling)
        arithmetic.set_matrix(layer, W)
    assert_differ(model(x), base)
    assert_same(model(x), oracle(x), EXACT)
    check_own_folder(handle, SelfAttention(), x, tmp_path / "adapter")


# --- convolutions --------------------------------------------------------------------------------


def convolution(**settings) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, 3, **settings)).double().eval()


def image() -> Tensor:
    return torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def peft_convolution(*, dora: bool = False, **settings) -> peft.PeftModel:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=dora)
    return peft_models.adapt(convolution(**settings), config)


def check_convolution(model: nn.Module, handle: Adapters, x: Tensor) -> Tensor:
    """Check that an adapted convolution equals a plain one with the formula's kernel, merged or not."""
    handle.activate(None)
    base = model(x)
    handle.activate("default")
    adapted, layer, module = model(x), model[0], handle.modules()["0"]
    W = layer.weight + arithmetic.convolution(
        module.lora_A, module.lora_B, SCALING, groups=layer.groups
    )
    if module.magnitude is not None:
        W = arithmetic.rescaled(W.flatten(1), module.magnitude).view(W.shape)
    assert_differ(adapted, base)
    assert_same(adapted, layer._conv_forward(x, W, layer.bias), EXACT)
    handle.merge()
    assert_same(layer.weight, W, EXACT)
    assert_same(model(x), adapted, EXACT)
    handle.unmerge()
    return adapted


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_dilated_convolution(dora: bool, tmp_path: Path):
    with pytest.raises(RuntimeError, match="size of tensor"):
        peft_convolution(dilation=2)(image())
    model, x = convolution(dilation=2), image()
    handle = random_adapter(model, targets="0", dora=dora)
    check_convolution(model, handle, x)
    check_own_folder(handle, convolution(dilation=2), x, tmp_path / "adapter")


@pytest.mark.parametrize(
    "settings",
    [
        *({"padding": 1, "padding_mode": mode} for mode in ("circular", "reflect", "replicate")),
        {"padding": "same", "dilation": 2},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_padding_mode_of_a_convolution(settings: dict, tmp_path: Path):
    """PEFT computes a different function here, so lorakit neither writes nor reads PEFT's format."""
    model, x = convolution(**settings), image()
    handle = random_adapter(model, targets="0")
    adapted = check_convolution(model, handle, x)
    theirs = peft_convolution(**settings)
    layer = theirs.base_model.model[0]
    layer.lora_A["default"].weight.copy_(handle.modules()["0"].lora_A)
    layer.lora_B["default"].weight.copy_(handle.modules()["0"].lora_B)
    assert_differ(theirs(x), adapted)
    check_own_folder(handle, convolution(**settings), x, tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match=r"padding_mode|dilation"):
        load(convolution(**settings), peft_models.save(theirs, tmp_path / "peft"))


def test_merging_a_grouped_convolution():
    with (
        peft_models.expected_peft_warnings(),
        pytest.raises(NotImplementedError, match="groups > 1"),
    ):
        peft_convolution(groups=2).merge_adapter()
    model = convolution(groups=2)
    check_convolution(model, random_adapter(model, targets="0"), image())


@pytest.mark.parametrize(
    ("layer", "valid"),
    [
        (nn.Conv2d(8, 8, 1, groups=4), (4, 8)),
        (nn.Conv2d(6, 6, 3, groups=6), (6,)),
        (nn.Conv1d(4, 12, 3, groups=2), (2, 4, 6, 8, 10, 12)),
    ],
    ids=["two channels", "depthwise", "wide"],
)
def test_the_ranks_of_a_grouped_convolution(layer: nn.Module, valid: tuple[int, ...]):
    """Every rank is accepted, or refused with one that is accepted."""
    for rank in range(1, 15):
        model = nn.Sequential(copy.deepcopy(layer))
        if rank in valid:
            attach(model, LoRA(rank=rank, targets="0"))
            continue
        says = rf"Rank {rank} does not fit '0'.* rank_pattern={{'0': (\d+)}}"
        with pytest.raises(ConfigurationError, match=says) as error:
            attach(model, LoRA(rank=rank, targets="0"))
        assert int(re.search(says, str(error.value))[1]) in valid


def test_dora_on_a_grouped_convolution(tmp_path: Path):
    theirs, x = peft_convolution(groups=2, dora=True), image()
    layer = theirs.base_model.model[0]
    A, B, m = (
        getattr(layer, name)["default"].weight
        for name in ("lora_A", "lora_B", "lora_magnitude_vector")
    )
    W = arithmetic.convolution(A, B, SCALING, groups=2)
    for group in (0, 1):
        rows, channels = slice(3 * group, 3 * group + 3), slice(2 * group, 2 * group + 2)
        W[rows, channels] += layer.base_layer.weight[rows]
    W = arithmetic.rescaled(W.flatten(1), m.flatten()).view(W.shape)
    assert_differ(theirs(x), nn.functional.conv2d(x, W, layer.base_layer.bias))
    with pytest.raises(AdapterFileError, match="grouped"):
        load(convolution(groups=2), peft_models.save(theirs, tmp_path / "peft"))

    model = convolution(groups=2)
    handle = random_adapter(model, targets="0", dora=True)
    check_convolution(model, handle, x)
    check_own_folder(handle, convolution(groups=2), x, tmp_path / "adapter")


# --- a row of zeros -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding"])
def test_dora_on_a_row_of_zeros(kind: str):
    """PEFT divides the magnitude 0 by the norm 0. Here the row has the factor 1 until B changes it."""
    if kind == "convolution":
        layer, x = convolution()[0], image()
    elif kind == "linear":
        layer, x = nn.Linear(8, 6).double(), attention_input()
    else:
        layer, x = nn.Embedding(6, 8).double(), torch.tensor([[0, 1, 5]])
    (layer.weight[:, 2] if kind == "embedding" else layer.weight[2]).zero_()
    model = nn.Sequential(layer)
    config = peft.LoraConfig(r=RANK, target_modules=["0"], use_dora=True)
    assert peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)(x).isnan().any()

    base = model(x)
    handle = attach(model, LoRA(rank=RANK, targets="0", dora=True), dtype=torch.float64)
    assert_same(model(x), base, EXACT)
    handle.merge()
    assert_same(model(x), base, EXACT)
    handle.unmerge()
    with torch.enable_grad():
        model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in handle.trainable_parameters())
    randomise(handle.trainable_parameters(), seed=2)
    adapted = model(x)
    handle.merge()
    assert_same(model(x), adapted, EXACT)


# --- one layer at two places ---------------------------------------------------------------------


class Twice(nn.Module):
    """A network that calls one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Linear(8, 8).double()
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def test_one_layer_at_two_places(tmp_path: Path):
    config = peft.LoraConfig(target_modules=["first"])
    theirs = peft.get_peft_model(Twice(), config).base_model.model
    assert theirs.first is not theirs.second

    model, oracle, x = Twice(), Twice(), attention_input()
    base = model(x)
    handle = random_adapter(model, targets="first")
    W = effective(oracle.first.weight, handle.modules()["first"])
    arithmetic.set_matrix(oracle.first, W)
    assert_differ(model(x), base)
    assert_same(model(x), oracle(x), EXACT)
    check_own_folder(handle, Twice(), x, tmp_path / "adapter")
    handle.merge()
    assert model.first is model.second
    assert_same(model(x), oracle(x), EXACT)

"""loralib files: the published one, every layout of the official examples, and writing."""

from __future__ import annotations

import math
from pathlib import Path

import loralib
import pytest
import torch
from at_rest import (
    adapter,
    contiguous,
    convolution,
    delta,
    embedding,
    experts,
    fused,
    interleaved,
    linear,
    numbers,
    same_bits,
    with_dora,
    with_start,
)
from safetensors.torch import save_file
from torch import Tensor, nn

import lorakit
from lorakit.adapters import formats
from lorakit.adapters.formats import read_loralib, write_loralib
from lorakit.errors import AdapterFileError, ConfigurationError

# FACTS: Frobenius norms of the unscaled B A in microsoft/LoRA's roberta_base_lora_mnli.bin, by layer.
QUERY_NORMS = "4.8136 3.8974 3.7993 4.4383 4.6199 4.7180 5.1077 6.1256 6.1628 6.9218 7.2132 6.3886"
VALUE_NORMS = "2.6345 2.9949 3.4656 3.6176 3.9071 4.1771 4.6856 4.7225 4.2059 3.7409 2.9935 2.7187"


def saved(tensors: object, path: Path) -> Path:
    torch.save(tensors, path)
    return path


# --- the published file ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(shared) -> Path:
    return shared / "checkpoints" / "roberta_base_lora_mnli.bin"


def test_the_published_file(published):
    stored = read_loralib(published, alpha=16)
    assert len(stored.layers) == 24
    for role, norms in (("query", QUERY_NORMS), ("value", VALUE_NORMS)):
        for i, norm in enumerate(norms.split()):
            layer = stored.layers[f"roberta.encoder.layer.{i}.attention.self.{role}"]
            assert (layer.kind, layer.rank, layer.alpha, layer.scaling) == ("linear", 8, 16.0, 2.0)
            found = torch.linalg.norm(layer.B.double() @ layer.A.double())
            assert found.item() == pytest.approx(float(norm), abs=1e-4)
            assert torch.equal(delta(layer), 2.0 * (layer.B.double() @ layer.A.double()))
    assert {name: tuple(t.shape) for name, t in stored.trained.items()} == {
        "classifier.dense.weight": (768, 768),
        "classifier.dense.bias": (768,),
        "classifier.out_proj.weight": (3, 768),
        "classifier.out_proj.bias": (3,),
    }
    assert stored.num_parameters == 294_912 + 592_899
    assert stored.method == lorakit.LoRA(
        rank=8, alpha=16, targets=("query", "value"), train_modules=("classifier",)
    )


def test_the_published_file_to_peft_and_back(published, tmp_path):
    original = torch.load(published, map_location="cpu", weights_only=True)
    formats.write(read_loralib(published, alpha=16), tmp_path / "adapter")
    read_back = (formats.read(tmp_path / "adapter"), formats.read_peft(tmp_path / "adapter"))
    for stored, name in zip(read_back, ("again.bin", "again.safetensors"), strict=True):
        write_loralib(stored, tmp_path / name)
        again = read_loralib(tmp_path / name, alpha=16)
        assert again.layers.keys() == stored.layers.keys()
    final = torch.load(tmp_path / "again.bin", weights_only=True)
    assert final.keys() == original.keys()
    for key, tensor in original.items():
        same_bits(final[key], tensor, key)


def test_alpha_must_be_given(published):
    with pytest.raises(ConfigurationError, match=r"does not record alpha.*16 for RoBERTa"):
        formats.read(published)
    for alpha in (0, 0.0, math.nan, math.inf, True):
        with pytest.raises(ConfigurationError, match="alpha is"):
            formats.read(published, alpha=alpha)


# --- the layouts ----------------------------------------------------------------------------------


def deberta(names: str) -> dict[str, Tensor]:
    start = "deberta.encoder.layer.{}.attention.self."
    state = {}
    for i in range(2):
        for role in ("query", "value"):
            for letter, shape in (("A", (2, 6)), ("B", (6, 2))):
                key = names.format(role=role, upper=letter, lower=letter.lower())
                state[start.format(i) + key] = numbers(*shape, seed=i + ord(role[0]))
    head = {"pooler.dense.weight": numbers(6, 6), "pooler.dense.bias": numbers(6)}
    return {**state, **head, "classifier.weight": numbers(3, 6), "classifier.bias": numbers(3)}


@pytest.mark.parametrize(
    "names", ["{role}_proj.lora_{upper}", "{role}_lora_{lower}.weight"], ids=["new", "old"]
)
def test_deberta(tmp_path, names):
    stored = read_loralib(saved(deberta(names), tmp_path / "a.bin"), alpha=32)
    paths = [
        f"deberta.encoder.layer.{i}.attention.self.{role}_proj"
        for i in range(2)
        for role in ("query", "value")
    ]
    assert list(stored.layers) == paths
    same_bits(stored.layers[paths[3]].A, numbers(2, 6, seed=1 + ord("v")))
    same_bits(stored.layers[paths[0]].B, numbers(6, 2, seed=ord("q")))
    assert isinstance(stored.method, lorakit.LoRA)
    assert stored.method.targets == ("query_proj", "value_proj")
    assert stored.method.train_modules == ("pooler", "classifier")
    assert stored.layers[paths[0]].scaling == 16.0


def gpt2_delta(A: Tensor, B: Tensor, enabled: list[bool]) -> Tensor:
    """The delta that loralib adds to c_attn, transposed from (in, out) to (out, in)."""
    layer = loralib.MergedLinear(
        A.shape[1], 3 * A.shape[1], r=B.shape[1], lora_alpha=1, enable_lora=enabled
    )
    layer.lora_A.data, layer.lora_B.data = A, B
    return layer.merge_AB()


@pytest.mark.parametrize("enabled", [[True, False, True], [True, True, True]], ids=["qv", "qkv"])
def test_gpt2(tmp_path, enabled):
    """The format of the official training script: a nested dictionary, keys with the prefix ``module.``."""
    count, d, rank = sum(enabled), 6, 2
    A, B = numbers(count * rank, d), numbers(count * d, rank)
    key = "module.transformer.h.0.attn.c_attn.lora_"
    path = saved({"model_state_dict": {f"{key}A": A, f"{key}B": B}}, tmp_path / "model.pt")
    stored = read_loralib(path, alpha=32)
    (place,) = stored.layers
    assert place == "transformer.h.0.attn.c_attn"
    layer = stored.layers[place]
    assert (layer.rank, layer.scaling, layer.transposed) == (2, 16.0, True)
    assert layer.slices == contiguous(d, *(i for i, flag in enumerate(enabled) if flag))
    torch.testing.assert_close(delta(layer).float(), 16.0 * gpt2_delta(A, B, enabled))
    assert isinstance(stored.method, lorakit.LoRA)
    names = [n for n, flag in zip("qkv", enabled, strict=True) if flag]
    assert stored.method.targets == tuple(f"attention.{n}" for n in names)


def test_gpt2_of_the_first_release(tmp_path):
    state = {
        f"transformer.h.0.attn.{letter}_proj_adapter{number}.weight": numbers(
            *shape, seed=ord(letter)
        )
        for letter in "qv"
        for number, shape in ((1, (2, 6)), (2, (6, 2)))
    }
    layer = read_loralib(saved(state, tmp_path / "a.bin"), alpha=4).layers[
        "transformer.h.0.attn.c_attn"
    ]
    assert layer.slices == contiguous(6, 0, 2)
    expected = torch.zeros(18, 6, dtype=torch.float64)
    for letter, row in (("q", 0), ("v", 12)):
        A, B = numbers(2, 6, seed=ord(letter)), numbers(6, 2, seed=ord(letter))
        expected[row : row + 6] = 2.0 * B.double() @ A.double()
    assert torch.equal(delta(layer), expected)
    del state["transformer.h.0.attn.v_proj_adapter2.weight"]
    with pytest.raises(AdapterFileError, match="c_attn' has no lora_Bv"):
        read_loralib(saved(state, tmp_path / "b.bin"), alpha=4)


def test_a_fused_layer_of_another_model_is_refused(tmp_path):
    state = {"a.qkv.lora_A": numbers(4, 6), "a.qkv.lora_B": numbers(10, 2)}
    with pytest.raises(AdapterFileError, match=r"'a\.qkv' is a fused layer with 2 adapted slices"):
        read_loralib(saved(state, tmp_path / "a.bin"), alpha=1)


# --- files that loralib wrote ------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, lora: bool = True) -> None:
        super().__init__()
        options = {"r": 2, "lora_alpha": 3} if lora else {}
        kinds = loralib if lora else nn
        self.table = kinds.Embedding(10, 6, **options)
        self.fc = kinds.Linear(6, 6, **options)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 2)


def random_net(lora: bool = True) -> Net:
    net = Net(lora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


@pytest.mark.parametrize(
    ("bias", "names"),
    [
        ("none", set()),
        ("lora_only", {"fc.bias"}),
        ("all", {"fc.bias", "norm.bias", "out.bias"}),
    ],
)
def test_what_loralib_saves(tmp_path, bias, names):
    net = random_net()
    stored = read_loralib(saved(loralib.lora_state_dict(net, bias), tmp_path / "a.bin"), alpha=3)
    assert set(stored.layers) == {"table", "fc"}
    assert stored.trained.keys() == names
    assert isinstance(stored.method, lorakit.LoRA)
    assert stored.method.bias == bias
    # Only the model distinguishes an embedding from a linear layer.
    formats.check_targets(stored, random_net(lora=False))
    kinds = {path: layer.kind for path, layer in stored.layers.items()}
    assert kinds == {"table": "embedding", "fc": "linear"}
    before = {name: p.clone() for name, p in net.named_parameters()}
    net.eval()  # loralib merges now
    for path, weight in (("table", "table.weight"), ("fc", "fc.weight")):
        change = (net.get_parameter(weight) - before[weight]).double()
        ours = delta(stored.layers[path])
        torch.testing.assert_close(ours.T if path == "table" else ours, change, rtol=0, atol=1e-5)
        assert stored.layers[path].rank == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": numbers(6, 6)}, "'fc', so it is the file of a whole model.*lora_state_dict"),
        ({"conv.lora_A": numbers(2, 3), "conv.lora_B": numbers(4, 2)}, "'conv', which is a Conv2d"),
    ],
)
def test_what_is_not_read(tmp_path, change, message):
    state = loralib.lora_state_dict(random_net()) | change
    model = random_net(lora=False)
    model.conv = nn.Conv2d(1, 4, kernel_size=3)
    with pytest.raises(AdapterFileError, match=message):
        lorakit.load(model, saved(state, tmp_path / "a.bin"), alpha=3)


# --- writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".safetensors"])
def test_there_and_back(tmp_path, suffix):
    layers = {
        "a": linear(),
        "b": linear(rank=2),
        "transformer.h.0.c_attn": fused(*contiguous(4, 0, 2)),
    }
    stored = adapter(layers, trained={"a.bias": numbers(8), "head.weight": numbers(3, 8)})
    write_loralib(stored, tmp_path / f"file{suffix}")
    found = read_loralib(tmp_path / f"file{suffix}", alpha=3)
    for path, layer in layers.items():
        same_bits(found.layers[path].A, layer.A)
        same_bits(found.layers[path].B, layer.B)
        assert found.layers[path].slices == layer.slices
        assert found.layers[path].scaling == layer.scaling
    assert found.trained.keys() == stored.trained.keys()


def test_loralib_loads_what_was_written(tmp_path):
    net = random_net()
    layers = {
        "fc": with_start(linear(6, 6, rank=1, alpha=1.5)),
        "table": embedding(10, 6, rank=2),
    }
    write_loralib(adapter(layers), tmp_path / "a.bin")
    result = net.load_state_dict(torch.load(tmp_path / "a.bin", weights_only=True), strict=False)
    assert not result.unexpected_keys
    before = net.fc.weight.clone()
    net.eval()
    torch.testing.assert_close(
        (net.fc.weight - before).double(), delta(layers["fc"]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"a": with_dora(linear())}, "'a': loralib has no DoRA"),
        ({"a": embedding(tied_head="lm_head")}, "'a': loralib has no tied head"),
        ({"a": linear(4, 12, kind="attention")}, "no factors of kind 'attention'"),
        ({"a": experts()}, "no factors of kind 'experts'"),
        ({"a": convolution()}, "no factors of kind 'conv'"),
        ({"a": fused(*interleaved(2, 3, 0))}, "no slices other than of equal width"),
        ({"a": fused(*reversed(contiguous(4, 0, 2)))}, "no slices other than"),
        (
            {"a": linear(alpha=3.0), "b": linear(alpha=4.0)},
            "one alpha for all layers, .* need 3, 4",
        ),
    ],
)
def test_what_loralib_cannot_say(tmp_path, layers, message):
    with pytest.raises(AdapterFileError, match=message):
        write_loralib(adapter(layers), tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()


# --- damaged files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "holds no lora_A and lora_B"),
        ({"head.weight": numbers(2, 2)}, "holds no lora_A and lora_B"),
        ({"a.lora_A": numbers(2, 6)}, "'a' has no lora_B"),
        ({"a.lora_B": numbers(2, 6)}, "'a' has no lora_A"),
        ({"a.lora_A": numbers(2, 6), "a.lora_B": numbers(6, 3)}, r"lora_A has shape \(2, 6\)"),
        ({"a.lora_A": numbers(2, 6), "a.lora_B": numbers(6)}, "'a': lora_A has shape"),
        ({"a.lora_A": numbers(2, 6), "a.lora_B": torch.empty(6, 0)}, "'a': lora_A has shape"),
        ({"a.lora_A": numbers(2, 6) * math.nan, "a.lora_B": numbers(6, 2)}, "'a': A holds 12 values"),
        ({"a.lora_A.weight": numbers(2, 6)}, "'a.lora_A.weight' is not a name of loralib"),
        ({"a.lora_A": numbers(2, 6).int(), "a.lora_B": numbers(6, 2)}, "'a': A holds int32"),
        ([numbers(2)], "holds a list"),
        ({"a.lora_A": 3}, "holds a int under 'a.lora_A'"),
        ({3: numbers(2)}, "holds a Tensor under 3"),
        (
            {"x_lora_a.weight": numbers(2, 6), "a.x_lora_a.weight": numbers(2, 6),
             "a.x_proj.lora_A": numbers(2, 6)},
            "is not a name of loralib|under two names",
        ),
    ],
)  # fmt: skip
def test_files_that_do_not_fit(tmp_path, state, message):
    path = saved(state, tmp_path / "file.bin")
    with pytest.raises(AdapterFileError, match=message) as caught:
        formats.read(path, alpha=1)
    assert str(path) in str(caught.value)


def test_safetensors_with_loralibs_names(tmp_path):
    save_file({"a.lora_A": numbers(2, 6), "a.lora_B": numbers(8, 2)}, tmp_path / "a.safetensors")
    assert formats.read(tmp_path / "a.safetensors", alpha=3).layers["a"].scaling == 1.5

"""save_pretrained and state_dict of an adapted model never contain the base without the adapter."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny_models
import torch
from random_adapters import randomise
from safetensors.torch import load_file
from tiny_models import assert_same_tensors, logits, tensors_of
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.adapters import Adapters, attach
from lorakit.errors import AdapterStateError
from lorakit.methods import BitFit
from lorakit.methods.full import FullFineTuning
from lorakit.methods.lora.method import LoRA
from lorakit.methods.method import Method

CASES: dict[str, tuple[str, Method]] = {
    "lora": ("llama", LoRA(rank=2, alpha=3, targets="all-linear")),
    "conv1d": ("gpt2", LoRA(rank=2, alpha=3, targets="all-linear")),
    "slices": ("phi3", LoRA(rank=2, targets=("attention.qv", "mlp.up"))),
    "experts": ("mixtral", LoRA(rank=2, targets="attention")),
    "dora": ("llama", LoRA(rank=2, targets="all-linear", dora=True)),
    "pissa": ("llama", LoRA(rank=2, targets="attention.qv", init="pissa")),
    "bias": ("gpt2", LoRA(rank=2, targets="attention.qv", bias="all")),
    "classification head": ("bert", LoRA(rank=2, train_modules=("classifier", "pooler"))),
    "convolution": ("vit", LoRA(rank=2, targets="projection", train_modules="classifier")),
    "tied embedding": ("gpt2", LoRA(rank=2, targets=("embedding", "mlp"))),
    "tied embedding in full": ("gpt2", LoRA(rank=2, train_modules="wte")),
    "two of four tied in full": ("t5", LoRA(rank=2, train_modules="embed_tokens")),
    "three of four tied in full": ("bart", LoRA(rank=2, train_modules=("embed_tokens", "lm_head"))),
    "full": ("llama", FullFineTuning()),
    "full, tied": ("t5", FullFineTuning()),
    "top layers": ("gpt2", FullFineTuning(top_layers=1)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Method]:
    arch, method = CASES[request.param]
    return tiny_models.build(arch), method


def load(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return type(model).from_pretrained(folder, attn_implementation="eager")


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)


# --- save_pretrained ------------------------------------------------------------------------------


def test_saved_folder_computes_what_the_model_computes(
    case: tuple[PreTrainedModel, Method], tmp_path: Path
) -> None:
    model, method = case
    base = logits(model)
    adapters = attach(model, method)
    randomise(adapters)
    adapted = logits(model)
    assert (adapted - base).abs().max() > 1e-2

    before = tensors_of(model)
    model.save_pretrained(tmp_path / "active")
    assert_same_tensors(tensors_of(model), before)
    assert_close(logits(load(model, tmp_path / "active")), adapted)

    adapters.merge()
    model.save_pretrained(tmp_path / "merged")
    assert_close(logits(load(model, tmp_path / "merged")), adapted)
    adapters.unmerge()

    adapters.activate(None)
    model.save_pretrained(tmp_path / "inactive")
    assert_close(logits(load(model, tmp_path / "inactive")), base)

    adapters.activate("default")
    adapters.merge(keep_base=False)
    model.save_pretrained(tmp_path / "exported")
    assert_close(logits(load(model, tmp_path / "exported")), adapted)
    held = load_file(tmp_path / "exported" / "model.safetensors")
    assert not any("adapters" in name for name in held)


def test_adapters_mixed_by_weight_are_saved_so(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    adapters = attach(model, LoRA(rank=2, targets="attention"), name="a")
    attach(model, LoRA(rank=2, targets="mlp"), name="b")
    randomise(adapters)
    expected = []
    for choice in ("a", {"a": 0.5, "b": -2.0}):
        adapters.activate(choice)
        expected.append(logits(model))
        model.save_pretrained(tmp_path)
        assert_close(logits(load(model, tmp_path)), expected[-1])
    assert (expected[0] - expected[1]).abs().max() > 1e-2


def test_shards_and_half_precision(tmp_path: Path) -> None:
    model = tiny_models.build("llama").to(torch.bfloat16)
    base = logits(model)
    randomise(attach(model, LoRA(rank=2, targets="all-linear")))
    assert (logits(model) - base).abs().max() > 1
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = load(model, tmp_path)
    assert loaded.dtype == torch.bfloat16
    torch.testing.assert_close(logits(loaded), logits(model), atol=0.3, rtol=0)


def test_saving_inside_per_sample_is_refused(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    adapters = attach(model, LoRA(rank=2))
    with (
        adapters.per_sample(["default", None]),
        pytest.raises(AdapterStateError, match="per_sample"),
    ):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_a_model_is_saved_with_the_adapters_of_its_parts(tmp_path: Path) -> None:
    model = tiny_models.build("bart")
    twin, base = copy.deepcopy(model), logits(model)
    parts = (model.model.encoder, model.model.decoder)
    handles = [attach(part, LoRA(rank=2, targets="attention.qv")) for part in parts]
    for handle in handles:
        randomise(handle)
    handles[0].merge()
    adapted = logits(model)
    assert (adapted - base).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    assert_close(logits(load(model, tmp_path)), adapted)

    for part in (twin.model.encoder, twin.model.decoder):
        attach(part, LoRA(rank=2, targets="attention.qv"))
    twin.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert_close(logits(twin), adapted)


# --- state_dict -----------------------------------------------------------------------------------


def adapted_twin(
    model: PreTrainedModel, method: Method
) -> tuple[PreTrainedModel, Tensor, Adapters]:
    """A fresh model with a fresh adapter, the base's logits, and the handle."""
    twin = copy.deepcopy(model)
    return twin, logits(twin), attach(twin, method)


@pytest.mark.parametrize("loaded_into", ["active", "inactive"])
def test_saved_tensors_load_into_an_adapted_model(
    case: tuple[PreTrainedModel, Method], loaded_into: str, tmp_path: Path
) -> None:
    """As Trainer resumes: the file's base keys contain the adapter, which must not be applied twice."""
    model, method = case
    twin, base, handle = adapted_twin(model, method)
    adapters = attach(model, method)
    randomise(adapters)
    adapted = logits(model)
    model.save_pretrained(tmp_path)
    handle.activate("default" if loaded_into == "active" else None)
    result = twin.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    assert not result.unexpected_keys
    assert {key for key in result.missing_keys if ".adapters." not in key} <= tied
    handle.activate("default")
    assert_close(logits(twin), adapted)
    handle.activate(None)
    assert torch.equal(logits(twin), base)


TRAINED = {
    "head": ("llama", LoRA(rank=2, train_modules="lm_head")),
    "tied": ("gpt2", LoRA(rank=2, train_modules="lm_head")),
    "biases": ("gpt2", LoRA(rank=2, bias="all")),
}


@pytest.mark.parametrize("loaded_into", ["active", "inactive"])
@pytest.mark.parametrize(("arch", "method"), TRAINED.values(), ids=TRAINED)
def test_the_trainable_parameters_load_into_an_adapted_model(
    arch: str, method: Method, loaded_into: str
) -> None:
    """`named_parameters` names a trained copy by the base's key."""
    model = tiny_models.build(arch)
    twin, base, handle = adapted_twin(model, method)
    randomise(attach(model, method))
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    handle.activate("default" if loaded_into == "active" else None)
    assert not twin.load_state_dict(trained, strict=False).unexpected_keys
    handle.activate("default")
    assert torch.equal(logits(twin), logits(model))
    handle.detach()
    assert torch.equal(logits(twin), base)


def test_load_with_assign_while_a_trained_copy_is_active_is_refused() -> None:
    model = tiny_models.build("llama")
    adapters = attach(model, LoRA(rank=2, train_modules="lm_head"))
    state = tensors_of(model)
    with pytest.raises(AdapterStateError, match="assign"):
        model.load_state_dict(state, assign=True)
    assert adapters.trainable_parameters()[0].requires_grad


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}], ids=str)
def test_a_checkpoint_does_not_load_into_a_base_that_came_from_it(
    options: dict, tmp_path: Path
) -> None:
    """The adapter would act twice."""
    method = LoRA(rank=2, **options)
    model = tiny_models.build("llama")
    adapters = attach(model, method)
    model.save_pretrained(tmp_path / "new")
    randomise(adapters)
    model.save_pretrained(tmp_path / "trained")
    # An adapter without an effect is not in the base.
    base = load(model, tmp_path / "new")
    attach(base, method)
    base.load_state_dict(load_file(tmp_path / "new" / "model.safetensors"), strict=False)

    twice = load(model, tmp_path / "trained")
    attach(twice, method)
    before = tensors_of(twice)
    with pytest.raises(AdapterStateError, match=r"would act twice\. Load the original base"):
        twice.load_state_dict(load_file(tmp_path / "trained" / "model.safetensors"), strict=False)
    assert_same_tensors(tensors_of(twice), before)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "partial"])
@pytest.mark.parametrize("of_base", [True, False], ids=["base", "adapters"])
def test_load_state_dict_into_a_merged_model_is_refused(of_base: bool, strict: bool) -> None:
    """Base weights would overwrite the merged ones, and new factors would not match them. Nothing is changed."""
    model = tiny_models.build("gpt2")
    adapters = attach(model, LoRA(rank=2, targets="attention.qv"))
    randomise(adapters)
    state = {
        key: tensor + 1
        for key, tensor in model.state_dict().items()
        if ("adapters." in key) != of_base
    }
    adapters.merge()
    before = tensors_of(model)
    with pytest.raises(AdapterStateError, match=r"Call unmerge\(\) before load_state_dict"):
        model.load_state_dict(state, strict=strict)
    assert_same_tensors(tensors_of(model), before)


STRANGERS: dict[str, tuple[Method, str, Method]] = {
    "other name": (LoRA(rank=2), "other", LoRA(rank=2)),
    "other layer": (LoRA(rank=2, targets="mlp"), "default", LoRA(rank=2)),
    "biases": (BitFit(), "default", LoRA(rank=2)),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_adapter_tensors_that_the_model_lacks_are_refused(stranger: str) -> None:
    """With strict=False PyTorch would leave them out."""
    theirs, name, ours = STRANGERS[stranger]
    source, model = tiny_models.build("gpt2"), tiny_models.build("gpt2")
    randomise(attach(source, theirs, name=name))
    attach(model, ours)
    before = tensors_of(model)
    with pytest.raises(AdapterStateError, match="this layer of the model has no such tensor"):
        model.load_state_dict(source.state_dict(), strict=False)
    assert_same_tensors(tensors_of(model), before)


def test_a_checkpoint_of_a_method_that_does_not_merge_resumes_and_does_not_load(
    tmp_path: Path,
) -> None:
    method = LoRA(rank=2, targets="attention.qv", lora_bias=True)
    model, resumed = tiny_models.build("llama"), tiny_models.build("llama")
    for one in (model, resumed):
        attach(one, method)
        one.model.norm.weight.requires_grad_(True)  # the user trains it beside the adapter
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no part of the weights"):
        load(model, tmp_path)
    result = resumed.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not result.unexpected_keys
    assert torch.equal(logits(resumed), logits(model))
    with pytest.raises(AdapterStateError, match="The pushed folder would not load"):
        model.save_pretrained(tmp_path, push_to_hub=True)


# --- base weights into an adapted model -----------------------------------------------------------

MERGED = {
    "lora": LoRA(rank=2, targets="all-linear"),
    "trained head": LoRA(rank=2, train_modules="lm_head"),
    "biases": BitFit(),
    "tied embedding": LoRA(rank=2, targets="embedding"),
}


@pytest.mark.parametrize("method", MERGED.values(), ids=MERGED)
def test_weights_of_a_merged_model_do_not_load_into_the_adapted_one(
    method: Method, tmp_path: Path
) -> None:
    """As a trainer loads them that builds a second model from its checkpoint; the adapter would act twice."""
    model = tiny_models.build("gpt2")
    randomise(attach(model, method))
    model.save_pretrained(tmp_path)
    merged = load(model, tmp_path).state_dict()
    before = tensors_of(model)
    outer = nn.ModuleDict({"model": model})
    inside = {f"model.{key}": tensor for key, tensor in merged.items()}
    for module, state in ((model, merged), (outer, inside)):
        with pytest.raises(AdapterStateError, match="the adapter would act twice"):
            module.load_state_dict(state, strict=False)
    assert_same_tensors(tensors_of(model), before)


def test_base_weights_never_overwrite_a_trained_copy() -> None:
    model = tiny_models.build("gpt2")
    base = tensors_of(model)
    adapters = attach(model, LoRA(rank=2, targets="attention.qv", train_modules="ln_f"))
    randomise(adapters)
    expected = logits(model)
    model.load_state_dict(base, strict=False)  # the base's own weights change nothing
    assert torch.equal(logits(model), expected)

    other = {name: tensor + 1 for name, tensor in base.items()}
    trained = model.transformer.ln_f.weight.detach().clone()
    adapters.activate(None)
    model.load_state_dict(other, strict=False)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in other.items())
    adapters.activate("default")
    assert torch.equal(model.transformer.ln_f.weight, trained)

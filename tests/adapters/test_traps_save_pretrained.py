"""save_pretrained and state_dict of an adapted model never contain the base without the adapter."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from random_adapters import randomise
from safetensors.torch import load_file
from tiny_models import assert_same_tensors, logits, tensors_of
from torch import Tensor, nn
from transformers import PreTrainedModel, modeling_utils
from transformers.trainer_utils import load_sharded_checkpoint

from lorakit.adapters import Adapters, attach
from lorakit.errors import AdapterStateError
from lorakit.methods import BitFit, BottleneckAdapter, PrefixLayer
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


def test_detached_model_saves_as_before(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    base = logits(model)
    adapters = attach(model, LoRA(rank=2))
    randomise(adapters)
    adapters.detach()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(model, tmp_path)), base)


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


def test_a_model_with_a_part_that_cannot_be_merged_does_not_load(tmp_path: Path) -> None:
    model = tiny_models.build("bart")
    inactive = attach(model.model.encoder, BottleneckAdapter(size=2))
    inactive.activate(None)
    attach(model.model.decoder, LoRA(rank=2, targets="attention.qv"))  # also named "default"
    model.save_pretrained(tmp_path)
    assert_close(logits(load(model, tmp_path)), logits(model))
    inactive.activate("default")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'default' is no part of the weights"):
        load(model, tmp_path)


@pytest.mark.slow
def test_an_adapted_model_that_another_process_unpickles_is_saved_with_its_adapter(
    tmp_path: Path,
) -> None:
    model = tiny_models.build("llama")
    randomise(attach(model.model, LoRA(rank=2)))
    torch.save(model, tmp_path / "model.pt")
    code = "import sys, torch; torch.load(sys.argv[1], weights_only=False).save_pretrained(sys.argv[2])"
    arguments = (tmp_path / "model.pt", tmp_path / "saved")
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    assert_close(logits(load(model, tmp_path / "saved")), logits(model))


# --- state_dict -----------------------------------------------------------------------------------


def adapted_twin(
    model: PreTrainedModel, method: Method
) -> tuple[PreTrainedModel, Tensor, Adapters]:
    """A fresh model with a fresh adapter, the base's logits, and the handle."""
    twin = copy.deepcopy(model)
    return twin, logits(twin), attach(twin, method)


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["active", "inactive", "merged"])
@pytest.mark.parametrize("loaded_into", ["active", "inactive"])
def test_state_dict_round_trip(
    case: tuple[PreTrainedModel, Method], saved: str, loaded_into: str
) -> None:
    model, method = case
    twin, base, handle = adapted_twin(model, method)
    adapters = attach(model, method)
    randomise(adapters)
    adapted = logits(model)
    if saved == "merged":
        adapters.merge()
    elif saved == "inactive":
        adapters.activate(None)
    state = tensors_of(model)

    handle.activate("default" if loaded_into == "active" else None)
    twin.load_state_dict(state)
    handle.activate("default")
    assert_close(logits(twin), adapted)
    handle.activate(None)
    assert torch.equal(logits(twin), base)
    handle.detach()
    assert torch.equal(logits(twin), base)


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


PARTS: dict[str, tuple[str, bool]] = {
    "model": ("", True),
    "block": ("transformer.h.1", True),
    "adapted layer": ("transformer.h.1.attn.c_attn", True),
    "adapters": ("", False),
}
"""A module that loads a state dict, and whether the dict holds the base's keys (else the adapters')."""


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "partial"])
@pytest.mark.parametrize("part", PARTS)
def test_load_state_dict_into_a_merged_model_is_refused(part: str, strict: bool) -> None:
    """Base weights would overwrite the merged ones, and new factors would not match them. Nothing is changed."""
    path, of_base = PARTS[part]
    model = tiny_models.build("gpt2")
    adapters = attach(model, LoRA(rank=2, targets="attention.qv"))
    randomise(adapters)
    module = model.get_submodule(path)
    state = {
        key: tensor + 1
        for key, tensor in module.state_dict().items()
        if ("adapters." in key) != of_base
    }
    adapters.merge()
    before = tensors_of(model)
    with pytest.raises(AdapterStateError, match=r"Call unmerge\(\) before load_state_dict"):
        module.load_state_dict(state, strict=strict)
    assert_same_tensors(tensors_of(model), before)
    adapters.unmerge()
    module.load_state_dict(state, strict=False)
    assert all(torch.equal(module.state_dict()[key], tensor) for key, tensor in state.items())


def test_other_parts_of_a_merged_model_can_be_loaded() -> None:
    model = tiny_models.build("gpt2")
    adapters = attach(model, LoRA(rank=2, targets="attention.qv"))
    adapters.merge()
    norm = model.transformer.ln_f
    norm.load_state_dict({"weight": norm.weight + 1, "bias": norm.bias + 2})
    assert norm.bias.abs().max() >= 1
    outer = nn.ModuleDict({"model": model, "head": nn.Linear(2, 2)})
    outer.load_state_dict({"head.weight": torch.ones(2, 2)}, strict=False)
    assert torch.equal(outer["head"].weight, torch.ones(2, 2))


@pytest.mark.parametrize("path", ["", "transformer", "transformer.ln_f"])
def test_base_weights_never_overwrite_a_trained_copy(path: str) -> None:
    model = tiny_models.build("gpt2")
    module = model.get_submodule(path)
    base = tensors_of(module)
    adapters = attach(model, LoRA(rank=2, targets="attention.qv", train_modules="ln_f"))
    randomise(adapters)
    expected = logits(model)
    module.load_state_dict(base, strict=False)  # the base's own weights change nothing
    assert torch.equal(logits(model), expected)

    key = (
        f"{'transformer.' if not path else ''}{'ln_f.' if path != 'transformer.ln_f' else ''}weight"
    )
    other = {name: tensor + 1 for name, tensor in base.items()}
    before = tensors_of(model)
    with pytest.raises(AdapterStateError, match=rf"'{key}' differs.*call activate\(None\)"):
        module.load_state_dict(other, strict=False)
    assert_same_tensors(tensors_of(model), before)

    adapters.activate(None)
    module.load_state_dict(other, strict=False)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in other.items())
    adapters.activate("default")
    assert torch.equal(model.transformer.ln_f.weight, before["transformer.ln_f.weight"])


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


@pytest.mark.parametrize("loaded_into", ["active", "inactive"])
def test_the_trainable_parameters_load_beside_another_copy_of_the_head(loaded_into: str) -> None:
    model, method = tiny_models.build("llama"), LoRA(rank=2, train_modules="lm_head")
    twin = copy.deepcopy(model)
    for seed, name in enumerate(("other", "default")):
        adapters, handle = (attach(m, method, name=name) for m in (model, twin))
        randomise(adapters, name, seed=seed)
    adapters.activate("default")
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    handle.activate("default" if loaded_into == "active" else None)
    twin.load_state_dict(trained, strict=False)
    handle.activate("default")
    assert torch.equal(logits(twin), logits(model))
    handle.detach()
    assert torch.equal(logits(twin), logits(tiny_models.build("llama")))


@pytest.mark.parametrize("loaded_into", ["active", "inactive"])
@pytest.mark.parametrize("path", ["transformer", "transformer.h.0.attn.c_attn", "transformer.ln_f"])
def test_state_dict_of_a_part_round_trip(path: str, loaded_into: str) -> None:
    """As for the whole model: the base keys of the part contain the adapter."""
    method = LoRA(rank=2, targets="attention.qv", bias="all", train_modules="ln_f")
    model = tiny_models.build("gpt2")
    twin, base, handle = adapted_twin(model, method)
    adapters = attach(model, method)
    randomise(adapters)
    part = model.get_submodule(path)
    expected = tensors_of(part)
    handle.activate("default" if loaded_into == "active" else None)
    twin.get_submodule(path).load_state_dict(part.state_dict())
    handle.activate("default")
    assert_same_tensors(tensors_of(twin.get_submodule(path)), expected)
    handle.activate(None)
    assert torch.equal(logits(twin), base)


STRANGERS: dict[str, tuple[Method, str, Method]] = {
    "other name": (LoRA(rank=2), "other", LoRA(rank=2)),
    "other layer": (LoRA(rank=2, targets="mlp"), "default", LoRA(rank=2)),
    "other tensors": (LoRA(rank=2, init="pissa"), "default", LoRA(rank=2)),
    "virtual tokens": (PrefixLayer(prefix_length=2), "default", LoRA(rank=2)),
    "biases": (BitFit(), "default", LoRA(rank=2)),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_adapter_tensors_that_the_model_lacks_are_refused(stranger: str) -> None:
    """With strict=False PyTorch would leave them out."""
    theirs, name, ours = STRANGERS[stranger]
    source, model = tiny_models.build("gpt2"), tiny_models.build("gpt2")
    randomise(attach(source, theirs, name=name))
    attach(model, ours)
    before = logits(model)
    with pytest.raises(AdapterStateError, match="this layer of the model has no such tensor"):
        model.load_state_dict(source.state_dict(), strict=False)
    assert torch.equal(logits(model), before)


def test_a_layer_at_two_places_loads_its_adapter() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    randomise(attach(model, LoRA(rank=2, targets="0")))
    saved = tensors_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(saved)
    assert all(torch.equal(tensor, saved[key]) for key, tensor in model.state_dict().items())


def test_detach_removes_the_hooks_of_load_state_dict() -> None:
    model = tiny_models.build("gpt2")
    adapters = attach(model, LoRA(rank=2, targets="attention.qv"))
    attach(model, LoRA(rank=2, targets="mlp"), name="mlp")
    layer = model.transformer.h[0].mlp.c_fc
    assert layer._load_state_dict_pre_hooks
    adapters.remove("mlp")
    assert not layer._load_state_dict_pre_hooks
    assert model.transformer.h[0].attn._load_state_dict_pre_hooks
    adapters.detach()
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())


def test_state_dict_of_a_detached_model_is_the_base() -> None:
    model = tiny_models.build("gpt2")
    before = tensors_of(model)
    adapters = attach(model, LoRA(rank=2, bias="all", train_modules="wte"))
    randomise(adapters)
    adapters.merge()
    adapters.detach()
    assert_same_tensors(tensors_of(model), before)
    model.load_state_dict(before)


def test_save_pretrained_of_the_user_is_called_and_kept(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    folders = []

    def own(folder: Path, **settings) -> None:
        folders.append(folder)
        type(model).save_pretrained(model, folder, **settings)

    model.save_pretrained = own
    adapters = attach(model, LoRA(rank=2))
    randomise(adapters)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert folders == [tmp_path]
    assert_close(logits(load(model, tmp_path)), expected)
    adapters.detach()
    assert model.save_pretrained is own


@pytest.mark.parametrize("arguments", [(False,), ()], ids=["positional", "keyword"])
def test_only_the_main_process_writes(arguments: tuple, tmp_path: Path) -> None:
    """The configuration of a folder with virtual tokens is not the model's."""
    model = tiny_models.build("llama")
    attach(model, PrefixLayer(prefix_length=2))
    config = tmp_path / "config.json"
    config.write_text("{}")
    model.save_pretrained(tmp_path, *arguments, **({} if arguments else {"is_main_process": False}))
    assert config.read_text() == "{}"


def test_a_folder_without_the_adapter_never_loads_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed then leaves the folder so; the second save overwrites the first."""
    model = tiny_models.build("llama")
    attach(model, PrefixLayer(prefix_length=2))
    write, writes = modeling_utils.safe_save_file, []

    def save_file(*args, **kwargs) -> None:
        for step in (lambda: None, lambda: write(*args, **kwargs)):
            step()
            with pytest.raises(ValueError, match="'default' is no part of the weights"):
                load(model, tmp_path)
        writes.append(args)

    monkeypatch.setattr(modeling_utils, "safe_save_file", save_file)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert len(writes) == 2
    assert "to_json_file" not in vars(model.config)


def test_a_save_pretrained_set_while_adapted_is_kept(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    adapters = attach(model, LoRA(rank=2))
    replaced, folders = model.save_pretrained, []

    def own(folder: Path) -> None:
        folders.append(folder)
        replaced(folder)

    model.save_pretrained = own
    adapters.detach()
    assert model.save_pretrained is own
    model.save_pretrained(tmp_path)
    assert folders == [tmp_path]
    assert_close(logits(load(model, tmp_path)), logits(model))


def test_the_backbone_is_saved_with_its_adapter(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    adapters = attach(model, LoRA(rank=2, targets="all-linear"))
    randomise(adapters)
    ids = torch.arange(3, 17).view(2, 7)
    expected = model.model(ids).last_hidden_state
    model.model.save_pretrained(tmp_path)
    loaded = type(model.model).from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(loaded(ids).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


def test_load_with_assign_while_a_trained_copy_is_active_is_refused() -> None:
    model = tiny_models.build("llama")
    adapters = attach(model, LoRA(rank=2, train_modules="lm_head"))
    state = tensors_of(model)
    with pytest.raises(AdapterStateError, match="assign"):
        model.load_state_dict(state, assign=True)
    assert adapters.trainable_parameters()[0].requires_grad


def test_a_bias_of_b_without_a_bias_of_the_layer_is_checkpointed(tmp_path: Path) -> None:
    """It cannot be merged, so the folder resumes a training and loads as no model."""
    method = LoRA(rank=2, targets="attention.qv", lora_bias=True)
    model, resumed = tiny_models.build("llama"), tiny_models.build("llama")
    randomise(attach(model, method))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no part of the weights"):
        load(model, tmp_path)
    attach(resumed, method)
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(logits(resumed), logits(model))


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


@pytest.mark.parametrize("case", ["embedding", "inactive", "weight 0", "trained copy", "rounded"])
def test_a_checkpoint_of_an_adapter_without_effect_is_resumed(case: str, tmp_path: Path) -> None:
    """Its base weights are those of the base, though lora_B is not zero."""
    model = tiny_models.build("llama")
    if case == "embedding":
        attach(model, LoRA(rank=2, targets="embedding"))
    else:
        adapters = attach(model, LoRA(rank=2), name="one")
        randomise(adapters)
    if case == "inactive":
        attach(model, LoRA(rank=2), name="two")
    elif case == "weight 0":
        adapters.activate({"one": 0.0})
    elif case == "trained copy":
        attach(model, FullFineTuning(), name="two")
    elif case == "rounded":
        model.bfloat16()
        for parameter in adapters.trainable_parameters():
            parameter.data.mul_(1e-4)
    before = tensors_of(model)
    model.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert_same_tensors(tensors_of(model), before)


def test_a_change_that_is_rounded_away_at_one_layer_does_not_refuse_a_checkpoint(
    tmp_path: Path,
) -> None:
    """The training goes on in bfloat16, where the base's weight of that layer equals the merged one."""
    method = LoRA(rank=2, targets="attention.q")
    model, resumed = tiny_models.build("llama"), tiny_models.build("llama").bfloat16()
    for one in (model, resumed):
        one.model.layers[0].self_attn.q_proj.weight.data.fill_(1)
    randomise(attach(model, method))
    layer = model.model.layers[0].self_attn.q_proj.adapters["default"]
    for factor in (layer.lora_A, layer.lora_B):
        factor.data.fill_(0.01)
    model.save_pretrained(tmp_path)
    attach(resumed, method)
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    loaded = resumed.model.layers[0].self_attn.q_proj.adapters["default"]
    assert torch.equal(loaded.lora_B, layer.lora_B)


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
        with pytest.raises(AdapterStateError, match="of a merged model, the adapter would act"):
            module.load_state_dict(state, strict=False)
    assert_same_tensors(tensors_of(model), before)


def test_a_checkpoint_in_shards_loads_into_the_adapted_model(tmp_path: Path) -> None:
    """As a Trainer resumes a large model, one shard after the other."""
    model, method = tiny_models.build("llama"), LoRA(rank=2, targets="all-linear")
    twin, base, handle = adapted_twin(model, method)
    randomise(attach(model, method))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 3
    load_sharded_checkpoint(twin, tmp_path, strict=False)
    torch.testing.assert_close(logits(twin), logits(model))
    handle.detach()
    assert torch.equal(logits(twin), base)


def test_merged_weights_in_16_bits_do_not_load_into_an_adapted_model_in_32(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    short = copy.deepcopy(model).bfloat16()
    randomise(attach(short, LoRA(rank=2)))
    short.save_pretrained(tmp_path)
    attach(model, LoRA(rank=2))
    with pytest.raises(AdapterStateError, match="adapter would act twice"):
        model.load_state_dict(load(short, tmp_path).state_dict(), strict=False)


def test_weights_of_a_merged_model_load_while_no_adapter_is_active(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    adapters = attach(model, LoRA(rank=2))
    randomise(adapters)
    model.save_pretrained(tmp_path)
    merged = load(model, tmp_path)
    adapters.activate(None)
    model.load_state_dict(merged.state_dict(), strict=False)
    assert torch.equal(logits(model), logits(merged))


def test_weights_of_another_base_load_into_an_adapted_model() -> None:
    model, other = tiny_models.build("gpt2"), tiny_models.build("gpt2")
    for parameter in (other.transformer.wpe.weight, other.transformer.h[0].attn.c_attn.weight):
        parameter.data.add_(1)
    base = tensors_of(other)
    attach(model, LoRA(rank=2, targets="attention"))
    model.load_state_dict(base, strict=False)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in base.items())

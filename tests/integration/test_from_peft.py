"""`from_peft` converts a live PEFT model: same logits, the base's modules and keys, and training continues."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import tiny_models
import torch
from tiny_models import logits
from torch import nn

import lorakit
from lorakit.errors import AdapterStateError, LorakitError

pytestmark = [
    # PEFT uses a name that transformers deprecates.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT warns that it saves the frozen embedding together with an adapter on it.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

TARGETS = ["q_proj", "v_proj", "down_proj"]


def peft_model(**settings) -> peft.PeftModel:
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, **settings)
    model = peft.get_peft_model(tiny_models.build("llama"), config).eval()
    randomise(model)
    return model


def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 8}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_taken_over(settings: dict) -> None:
    base = tiny_models.build("llama")
    config = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS} | settings
    model = peft.get_peft_model(tiny_models.build("llama"), peft.LoraConfig(**config)).eval()
    randomise(model)
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 1e-2

    adapters = lorakit.from_peft(model)
    taken = adapters.model
    assert type(taken) is type(base)
    assert adapters.active == {"default": 1.0}
    torch.testing.assert_close(logits(taken), expected, atol=1e-5, rtol=0)
    own = {name: type(module) for name, module in taken.named_modules() if ".adapters" not in name}
    assert own == {name: type(module) for name, module in base.named_modules()}
    assert [n for n in taken.state_dict() if ".adapters." not in n] == list(base.state_dict())
    adapters.detach()
    assert torch.equal(logits(taken), logits(base))
    assert all(torch.equal(t, base.state_dict()[n]) for n, t in taken.state_dict().items())


def test_training_goes_on() -> None:
    model = peft_model()
    ids = torch.arange(3, 17).view(2, 7)
    theirs = [p for p in model.parameters() if p.requires_grad]
    before = model(ids, labels=ids).loss
    expected = torch.autograd.grad(before, theirs)
    adapters = lorakit.from_peft(model)
    ours = adapters.trainable_parameters()
    assert sorted(p.shape for p in ours) == sorted(p.shape for p in theirs)
    found = torch.autograd.grad(adapters.model(ids, labels=ids).loss, ours)
    for left, right in zip(
        sorted(found, key=lambda g: (g.shape, g.norm().item())),
        sorted(expected, key=lambda g: (g.shape, g.norm().item())),
        strict=True,
    ):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-3)


def test_an_adapter_loaded_for_inference_stays_frozen(tmp_path: Path) -> None:
    peft_model().save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(tiny_models.build("llama"), tmp_path)
    assert not any(p.requires_grad for p in lorakit.from_peft(model).model.parameters())


def test_several_adapters_keep_their_names_and_the_active_one() -> None:
    model = peft_model()
    model.add_adapter("other", peft.LoraConfig(r=4, lora_alpha=1, target_modules=["up_proj"]))
    randomise(model, seed=1)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = logits(model)
    adapters = lorakit.from_peft(model)
    assert adapters.names == ("default", "other")
    assert adapters.active == {"other": 1.0}
    for name, value in expected.items():
        adapters.activate(name)
        torch.testing.assert_close(logits(adapters.model), value, atol=1e-5, rtol=0)


def test_what_cannot_be_taken_over() -> None:
    with pytest.raises(AdapterStateError, match="is no PeftModel with an adapter"):
        lorakit.from_peft(tiny_models.build("llama"))
    config = peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    other = peft.get_peft_model(tiny_models.build("llama"), config)
    before = logits(other)
    with pytest.raises(LorakitError, match="IA3"):
        lorakit.from_peft(other)
    assert torch.equal(logits(other), before)


# --- what is refused leaves the PEFT model as it was -------------------------------------------------


def assert_refused(model: peft.PeftModel, error: type[LorakitError], message: str) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        lorakit.from_peft(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert dict(model.named_modules()) == modules
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_of_which_peft_saves_a_part() -> None:
    """PEFT leaves out `.mlp.down_proj` of one adapter, because another is named `mlp`."""
    model = peft_model()
    model.add_adapter("mlp", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert_refused(model, AdapterStateError, "only a part of the adapter 'default'")


def test_active_adapters_that_cannot_be_mixed() -> None:
    model = peft_model()
    model.add_adapter("dora", peft.LoraConfig(r=2, target_modules=TARGETS, use_dora=True))
    model.base_model.set_adapter(["default", "dora"])
    with pytest.raises(AdapterStateError, match=r"'dora' .* not linear in a weight"):
        lorakit.from_peft(model)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_scaling_that_was_changed(use_rslora: bool) -> None:
    model = peft_model(use_rslora=use_rslora)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    layer.set_scale("default", 0.5)
    message = r"'default' has the scaling .* on '.*layers\.1\.mlp\.down_proj'.*activate\(\{'default': 0\.5\}\)"
    assert_refused(model, AdapterStateError, message)
    layer.set_scale("default", 1)
    expected = logits(model)
    torch.testing.assert_close(logits(lorakit.from_peft(model).model), expected, atol=1e-5, rtol=0)


def test_adapters_that_are_disabled_on_some_layers() -> None:
    model = peft_model()
    model.base_model.model.model.layers[1].mlp.down_proj.enable_adapters(False)
    assert_refused(model, AdapterStateError, "disabled on some layers only")


# --- the state of the PEFT model ---------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_disabled_adapters_stay_disabled(settings: dict) -> None:
    model = peft_model(**settings)
    active = logits(model)
    model.base_model.disable_adapter_layers()
    expected = logits(model)
    adapters = lorakit.from_peft(model)
    assert adapters.active == {}
    torch.testing.assert_close(logits(adapters.model), expected, atol=1e-5, rtol=0)
    adapters.activate("default")
    torch.testing.assert_close(logits(adapters.model), active, atol=1e-5, rtol=0)


def test_names_that_lorakit_cannot_use_are_changed(caplog: pytest.LogCaptureFixture) -> None:
    """`layout` is an attribute of the module that holds a layer's adapters."""
    model = peft_model()
    for seed, name in enumerate(("layout", "a b", "a_b")):
        model.add_adapter(name, peft.LoraConfig(r=2, target_modules=["up_proj"]))
        randomise(model, seed)
    model.set_adapter("layout")
    expected = logits(model)
    adapters = lorakit.from_peft(model)
    assert adapters.names == ("default", "layout_adapter", "a_b_2", "a_b")
    assert adapters.active == {"layout_adapter": 1.0}
    torch.testing.assert_close(logits(adapters.model), expected, atol=1e-5, rtol=0)
    notices = [record.getMessage() for record in caplog.records]
    assert (
        "layout: lorakit cannot use this name, so the adapter is named 'layout_adapter'." in notices
    )
    assert sum("cannot use this name" in notice for notice in notices) == 2


def test_a_frozen_adapter_named_like_a_module_stays_frozen() -> None:
    """The names of the base's trainable biases contain the adapter's name."""
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
    model = peft.get_peft_model(tiny_models.build("gpt2"), config)
    frozen = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model.add_adapter("mlp", frozen)
    assert any(".mlp." in name and p.requires_grad for name, p in model.named_parameters())
    adapters = lorakit.from_peft(model)
    assert adapters.trainable_parameters("default")
    with pytest.raises(AdapterStateError, match="'mlp' is frozen"):
        adapters.trainable_parameters("mlp")


def test_biases_that_were_trained_in_place_are_named(caplog: pytest.LogCaptureFixture) -> None:
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)
    model = peft.get_peft_model(tiny_models.build("gpt2"), config)
    lorakit.from_peft(model)
    assert any("trained the biases of the base itself" in r.getMessage() for r in caplog.records)


def test_a_merged_one_is_refused() -> None:
    model = peft_model()
    model.merge_adapter()
    assert_refused(model, AdapterStateError, "an adapter merged into its weights")


def test_a_model_of_peft_is_not_adapted_again(tmp_path: Path) -> None:
    model = peft_model()
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(
        AdapterStateError, match=r"lorakit\.from_peft\(model\), or .* model\.unload"
    ):
        lorakit.attach(model, lorakit.LoRA())
    inner = model.get_base_model()
    with pytest.raises(
        AdapterStateError, match=r"adapters of PEFT, on '.*q_proj'\. Pass the PeftModel"
    ):
        lorakit.load(inner, tmp_path / "saved")
    with pytest.raises(AdapterStateError, match=r"Pass the model that get_peft_model"):
        lorakit.from_peft(inner)
    assert lorakit.attach(model.unload(), lorakit.LoRA()).names == ("default",)


@pytest.mark.parametrize("adapt", [lorakit.from_peft, lambda m: lorakit.attach(m, lorakit.LoRA())])
def test_adapters_without_a_peft_model_are_loaded_from_a_file(adapt) -> None:
    """transformers and diffusers add them by `add_adapter`."""
    model = tiny_models.build("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    with pytest.raises(AdapterStateError, match=r"save .* lorakit\.load\(base, FOLDER\)"):
        adapt(model)

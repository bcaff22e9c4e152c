"""`from_peft` converts a live PEFT model: same logits, the base's modules and keys, and training continues."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import tiny_models
import torch
from torch import Tensor, nn

import lorakit
from lorakit.errors import AdapterStateError, LorakitError

pytestmark = [
    # PEFT uses a name that transformers deprecates.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT warns that it saves the frozen embedding together with an adapter on it.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

TARGETS = ["q_proj", "v_proj", "down_proj"]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(torch.arange(3, 17).view(2, 7)).logits


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
    with pytest.raises(AdapterStateError, match="no PEFT adapter"):
        lorakit.from_peft(tiny_models.build("llama"))
    config = peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    other = peft.get_peft_model(tiny_models.build("llama"), config)
    before = logits(other)
    with pytest.raises(LorakitError, match="IA3"):
        lorakit.from_peft(other)
    assert torch.equal(logits(other), before)


def test_a_merged_one_is_refused_or_given_its_base_back() -> None:
    model = peft_model()
    expected, base = logits(model), logits(tiny_models.build("llama"))
    model.merge_adapter()
    try:
        adapters = lorakit.from_peft(model)
    except AdapterStateError:
        return  # rejecting the model is correct too
    torch.testing.assert_close(logits(adapters.model), expected, atol=1e-4, rtol=0)
    adapters.detach()
    torch.testing.assert_close(logits(adapters.model), base, atol=1e-4, rtol=0)


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

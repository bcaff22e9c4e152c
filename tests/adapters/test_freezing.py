"""The first adapter freezes the base; later ones leave what the user has unfrozen since."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from random_adapters import randomise
from tiny_models import assert_same_tensors, tensors_of
from torch import Tensor, nn
from transformers import MarianConfig, MarianMTModel

from lorakit.adapters import Adapters, attach, count_parameters, load
from lorakit.errors import AdapterStateError, TargetError
from lorakit.methods import BitFit, FullFineTuning, LoRA, Method, PrefixLayer


def flags(model: nn.Module) -> dict[str, bool]:
    return {n: p.requires_grad for n, p in model.named_parameters() if ".adapters." not in n}


@pytest.mark.parametrize("second", [LoRA(rank=2, targets="0"), BitFit()], ids=["lora", "bitfit"])
def test_a_second_adapter_leaves_what_the_user_unfroze(second: Method) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    before = flags(model)
    attach(model, LoRA(rank=2, targets="0"), name="first")
    assert not any(flags(model).values())

    weight = model[1].weight.requires_grad_(True)
    adapters = attach(model, second, name="second")
    assert weight.requires_grad
    assert not model[0].weight.requires_grad
    adapters.activate(None)
    assert [name for name, flag in flags(model).items() if flag] == ["1.weight"]

    adapters.detach()
    assert flags(model) == before
    attach(model, second)  # a first adapter again
    assert not weight.requires_grad


TRAINED_COPIES = LoRA(rank=2, targets="0", bias="all", train_modules="1")


@pytest.mark.parametrize("method", [TRAINED_COPIES, FullFineTuning()], ids=["lora", "full"])
def test_a_save_names_what_the_user_unfroze(
    method: Method, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    adapters = attach(model, method)
    adapters.save(tmp_path / "copies")
    assert "require a gradient" not in caplog.text
    adapters.activate(None)
    model.requires_grad_(True)
    adapters.activate("default")
    adapters.save(tmp_path / "unfrozen")
    assert (
        "parameters of the base require a gradient ('0.weight', '0.bias' and 4 more)" in caplog.text
    )


def test_detach_leaves_what_was_added_after_attach() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    adapters = attach(model, LoRA(rank=2, targets="0"))
    model.append(nn.Linear(4, 2))
    adapters.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradients_of_the_base_from_before_attach_are_dropped() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = tensors_of(model)
    model(torch.randn(2, 4)).sum().backward()
    adapters = attach(model, LoRA(rank=2, targets="0"))
    assert all(parameter.grad is None for parameter in model.parameters())
    optimizer.step()
    adapters.detach()
    assert torch.equal(model[0].weight, before["0.weight"])


# --- full fine-tuning --------------------------------------------------------------------------------


def trained_names(model: nn.Module, method: Method) -> set[str]:
    """The base parameters that a method trains; they are the same before the first adapter and beside another."""
    counts = count_parameters(model, method)
    attach(model, LoRA(rank=2, targets="all-linear"), name="lora")
    adapters = attach(model, method, name="full")
    assert counts == count_parameters(model, method)
    assert counts.trainable == sum(p.numel() for p in adapters.trainable_parameters("full"))
    names = set(method.trained_parameters(model))
    adapters.detach()
    return names


def test_fixed_positions_are_not_fine_tuned() -> None:
    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 16)
    counts = dict.fromkeys(("encoder_layers", "decoder_layers", "max_position_embeddings"), 2)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    tokens = {"pad_token_id": 0, "decoder_start_token_id": 0}
    config = MarianConfig(vocab_size=30, **sizes, **counts, **heads, **tokens)
    model = MarianMTModel(config)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    fixed = {f"model.{part}.embed_positions.weight" for part in ("encoder", "decoder")}
    assert fixed <= names
    assert trained_names(model, FullFineTuning()) == names - fixed


def test_parameters_frozen_before_attach_are_not_fine_tuned() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert trained_names(model, FullFineTuning()) == {"1.weight", "1.bias"}
    named = FullFineTuning(train_modules="0")
    assert trained_names(model, named) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert flags(model) == {"0.weight": False, "0.bias": False, "1.weight": True, "1.bias": True}
    model.requires_grad_(False)
    with pytest.raises(TargetError, match=r"Call model\.requires_grad_\(True\) before attach"):
        attach(model, FullFineTuning())


# --- running statistics ------------------------------------------------------------------------------


def normalised(norm: type[nn.Module] = nn.BatchNorm2d) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    middle = norm(4, track_running_stats=True)
    layers = nn.Conv2d(3, 4, 3), middle, nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    return nn.Sequential(*layers).eval(), torch.randn(8, 3, 6, 6)


def train(model: nn.Module, x: Tensor, parameters: list[nn.Parameter]) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


NORMS = pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])


@NORMS
def test_detach_restores_the_running_statistics(norm: type[nn.Module]) -> None:
    model, x = normalised(norm)
    before, base = tensors_of(model), model(x)
    adapters = attach(model, LoRA(rank=2, targets="0"))
    train(model.train(), x, adapters.trainable_parameters())
    model.eval()
    assert not torch.equal(model.get_buffer("1.running_mean"), before["1.running_mean"])
    adapters.detach()
    assert torch.equal(model(x), base)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@NORMS
def test_changed_statistics_are_not_saved_as_an_adapter(
    norm: type[nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = normalised(norm)
    adapters = attach(model, LoRA(rank=2, targets="0"))
    assert "'1' has running statistics. model.train() lets a forward pass change" in caplog.text
    train(model.train(), x, adapters.trainable_parameters())
    with pytest.raises(AdapterStateError, match=r"The running statistics of '1' have changed"):
        adapters.save(tmp_path / "adapter")
    expected = model.eval()(x)
    adapters.merge(keep_base=False)
    torch.testing.assert_close(model(x), expected)  # the statistics stay


def test_with_the_statistics_kept_the_file_computes_the_same(tmp_path: Path) -> None:
    model, x = normalised()
    adapters = attach(model, LoRA(rank=2, targets="0"))
    model.train()
    model[1].eval()
    train(model, x, adapters.trainable_parameters())
    adapters.save(tmp_path / "adapter")
    fresh, _ = normalised()
    load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(x), model.eval()(x))


TRAINED_ON = {
    "pissa": LoRA(rank=2, targets="attention.q", init="pissa", train_modules="lm_head"),
    "vectors": PrefixLayer(prefix_length=2),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("method", TRAINED_ON.values(), ids=TRAINED_ON)
def test_a_trainable_adapter_has_no_tensors_of_16_bits(
    method: Method, dtype: torch.dtype, tmp_path: Path
) -> None:
    """An update of 1e-4 would round to nothing; copies of base tensors keep the base's dtype, as with `attach`."""
    model = tiny_models.build("llama").to(torch.bfloat16)
    adapters = attach(model, method, dtype=dtype)
    randomise(adapters)
    adapters.save(tmp_path / "saved")
    saved = added_tensors(adapters)
    adapters.detach()
    for trainable, expected in ((False, dtype), (True, torch.promote_types(dtype, torch.float32))):
        adapters = load(model, tmp_path / "saved", name="again", trainable=trainable)
        found = added_tensors(adapters)
        assert {tensor.dtype for tensor in found.values()} == {expected}
        assert_same_tensors({n: t.to(dtype) for n, t in found.items()}, saved)
        copies = [
            copy for module in adapters.modules().values() for copy in module.trained.values()
        ]
        assert all(copy.dtype == torch.bfloat16 for copy in copies)
        adapters.detach()


def added_tensors(adapters: Adapters) -> dict[str, Tensor]:
    """Return the tensors that the only adapter adds, without its copies of base tensors."""
    return {
        f"{path}.{name}": tensor.detach()
        for path, module in adapters.modules().items()
        for name, tensor in module.state_dict().items()
        if not name.startswith("trained.")
    }

"""PEFT's own initialisations (`init_lora_weights`), its conversions to LoRA, and Arrow, in float64."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from logits import assert_differ, randomise
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft_models import load as loaded_by_peft
from peft_models import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorakit
from lorakit.errors import AdapterFileError, WrongBaseError

IDS = torch.arange(1, 13).view(2, 6)
LAYERS = ["up", "down"]


class Net(nn.Module):
    """Float64 alone: models of transformers compute some steps in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.up = nn.Linear(12, 16)
        self.mix = Conv1D(16, 16)
        self.down = nn.Linear(16, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(self.mix(self.up(self.embed(ids)).tanh()).tanh())


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net().eval()
    model.embed.weight.data[:, 3:] *= 0.1
    model.up.weight.data *= 10
    model.mix.weight.data *= 10
    return model


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)


def assert_same(model: nn.Module, expected: Tensor) -> None:
    torch.testing.assert_close(outputs(model), expected, rtol=1e-12, atol=1e-12)


def double_net() -> nn.Module:
    return net().double()


def batches() -> list[Tensor]:
    return list(torch.randint(20, (8, 40), generator=torch.Generator().manual_seed(0)))


# --- adapters -------------------------------------------------------------------------------------


def create(init: Any, **options: Any) -> peft.PeftModel:
    """Initialise an adapter in float32, as PEFT requires, and continue in float64."""
    base = net()
    given = {"r": 4, "lora_alpha": 6, "target_modules": LAYERS, "init_lora_weights": init}
    own = {
        "corda": {"corda_config": CordaConfig()},
        "eva": {"eva_config": peft.EvaConfig()},
        "loftq": {"loftq_config": peft.LoftQConfig()},
        "lora_ga": {"lora_ga_config": peft.LoraGAConfig()},
    }
    config = peft.LoraConfig(**given | own.get(init, {}) | options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory, and of hooks
        if init == "corda":
            preprocess_corda(base, config, lambda: [base(batch) for batch in batches()])
        elif init == "lora_ga":
            preprocess_loraga(base, config, lambda: base(IDS).square().mean().backward())
        adapted = peft.get_peft_model(base, config)
        if init == "eva":
            peft.initialize_lora_eva_weights(
                adapted,
                batches(),
                forward_fn=lambda model, batch: model(batch),
                prepare_model_inputs_fn=None,
                prepare_layer_inputs_fn=lambda inputs, *_: inputs[0],
                show_progress_bar=False,
            )
    return adapted.double().eval()


def train(adapted: peft.PeftModel) -> Tensor:
    before = outputs(adapted)
    randomise((p for p in adapted.parameters() if p.requires_grad), seed=1)
    assert_differ(outputs(adapted), before)
    return outputs(adapted)


def save_as_true(adapted: peft.PeftModel, folder: Path) -> Path:
    """Save the adapter for its present base, as PEFT's examples of PiSSA and LoftQ do."""
    adapted = copy.deepcopy(adapted)
    adapted.peft_config["default"].init_lora_weights = True
    return save(adapted, folder)


def check(base: Callable[[], nn.Module], folder: Path, expected: Tensor) -> None:
    """Load PEFT's folder with lorakit, and what lorakit saves of it with PEFT."""
    model = base()
    handle = lorakit.load(model, folder)
    assert_same(model, expected)
    ours = handle.save(folder.parent / f"{folder.name}-ours")
    assert_same(loaded_by_peft(base(), ours), expected)


# --- the base stays -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "options"),
    [
        ("gaussian", {}),
        ("Gaussian", {}),
        ("orthogonal", {"target_modules": ["up", "mix"]}),
        ("eva", {}),
        ("eva", {"use_rslora": True}),
        ("mica", {"target_modules": ["embed", "down"]}),
        ("MiCA", {}),
    ],
    ids=str,
)
def test_an_initialisation_that_leaves_the_base(init: str, options: dict, tmp_path: Path) -> None:
    adapted = create(init, **options)
    assert bool(adapted.peft_config["default"].rank_pattern) == (init == "eva")
    expected = train(adapted)
    check(double_net, save(adapted, tmp_path / "theirs"), expected)
    assert_same(lorakit.from_peft(adapted).model, expected)


# --- the base changes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "options"),
    [
        ("pissa", {}),
        ("pissa", {"use_rslora": True}),
        ("pissa", {"target_modules": ["mix"], "fan_in_fan_out": True}),
        ("pissa_niter_4", {}),
        ("olora", {}),
        ("OLoRA", {"rank_pattern": {"up": 3}, "alpha_pattern": {"down": 5}}),
        ("corda", {}),
        ("lora_ga", {}),
    ],
    ids=str,
)
def test_an_initialisation_that_changes_the_base(init: str, options: dict, tmp_path: Path) -> None:
    """lorakit refuses the folder. It loads the one converted for the original base, and that for the changed base."""
    adapted = create(init, **options)
    for path, layer in adapted.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):  # PEFT has rounded the new weight to float32
            change = layer.get_delta_weight("default").detach()
            layer.get_base_layer().weight.data = double_net().get_submodule(path).weight - change
    start = save_as_true(adapted, tmp_path / "start")
    expected = train(adapted)
    changed = copy.deepcopy(adapted).unload()

    with pytest.raises(
        AdapterFileError, match=f"init_lora_weights is '{init}'.*on the changed base"
    ):
        lorakit.load(double_net(), save(adapted, tmp_path / "theirs"))
    with pytest.raises(
        AdapterFileError, match=r"^'default/adapter_config\.json': init_lora_weights"
    ):
        lorakit.from_peft(adapted)

    converted = tmp_path / "converted"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice to convert the adapter
        adapted.save_pretrained(converted, path_initial_model_for_weight_conversion=str(start))
    check(double_net, converted, expected)

    check(lambda: copy.deepcopy(changed), save_as_true(adapted, tmp_path / "true"), expected)
    with pytest.raises(WrongBaseError, match="float64 weights differ"):
        lorakit.load(double_net(), tmp_path / "true-ours")


def test_loftq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """PEFT's example sets init_lora_weights to true for the quantised base, and loftq_config stays in the file."""

    def rounded(weight: Tensor, reduced_rank: int, **_: int) -> tuple[Tensor, Tensor, Tensor]:
        quantised = (8 * weight).round() / 8  # PEFT's function needs a GPU
        U, S, Vh = torch.linalg.svd(weight - quantised, full_matrices=False)
        return quantised, Vh[:reduced_rank], (U * S)[:, :reduced_rank]

    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", rounded)
    adapted = create("loftq")
    expected = train(adapted)
    with pytest.raises(
        AdapterFileError, match=r"'loftq': .* before training\. To load it on the changed base"
    ):
        lorakit.load(double_net(), save(adapted, tmp_path / "theirs"))
    quantised = copy.deepcopy(adapted).unload()
    assert_differ(outputs(quantised), outputs(double_net()))
    folder = save_as_true(adapted, tmp_path / "true")
    assert json.loads((folder / "adapter_config.json").read_text())["loftq_config"]
    check(lambda: copy.deepcopy(quantised), folder, expected)
    assert "belongs to the base that LoftQ quantised" in caplog.text


# --- conversions and routers ----------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 0.9], ids=str)
@pytest.mark.parametrize("targets", [["up", "down"], "up|down"], ids=str)
def test_another_method_that_peft_converts_to_lora(rank: float, targets: Any, tmp_path: Path):
    config = peft.LoHaConfig(r=2, target_modules=targets, init_weights=False)
    theirs = peft.get_peft_model(double_net(), config).eval()
    peft.save_as_lora(tmp_path / "theirs", theirs, rank=rank)
    expected = outputs(loaded_by_peft(double_net(), tmp_path / "theirs"))
    assert_differ(expected, outputs(double_net()))
    check(double_net, tmp_path / "theirs", expected)


def test_arrow(tmp_path: Path) -> None:
    """A router cannot be loaded or merged. The adapters that it chooses among are plain ones."""
    folders = []
    for alpha in (6, 7):
        adapted = create("gaussian", lora_alpha=alpha)
        train(adapted)
        folders.append(str(save(adapted, tmp_path / f"{alpha}")))
    routed = peft.create_arrow_model(double_net(), folders, peft.ArrowConfig(top_k=1)).eval()
    save(routed, tmp_path / "all")
    for load in (
        lambda: lorakit.load(double_net(), tmp_path / "all" / "arrow_router"),
        lambda: lorakit.from_peft(routed),
    ):
        with pytest.raises(
            AdapterFileError, match=r"'[^']*arrow_router/.*use the adapter with PEFT\.$"
        ):
            load()
    expected = {}
    for name in ("task_0", "task_1"):
        routed.set_adapter(name)
        expected[name] = outputs(routed)
        check(double_net, tmp_path / "all" / name, expected[name])
    routed.delete_adapter("arrow_router")
    adapters = lorakit.from_peft(routed)
    for name in expected:
        adapters.activate(name)
        assert_same(adapters.model, expected[name])

"""A user's method: from a file or an installed package, never from an adapter's folder."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tiny_models
import tiny_runs
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lorakit import LoRA, attach, load, use_method
from lorakit.cli import main
from lorakit.data import DataConfig
from lorakit.errors import AdapterFileError, AdapterStateError, ConfigurationError
from lorakit.evaluation.evaluate import evaluate
from lorakit.evaluation.evaluate_config import EvaluateConfig
from lorakit.methods import AdapterModule, registry
from lorakit.methods.combined import Combined
from lorakit.training.config import HeldOutConfig, OptimizerConfig
from lorakit.training.loop import train

FILE = Path(__file__).parents[2] / "examples" / "own_method.py"
NAME = f"{FILE}:IA3"


@pytest.fixture(autouse=True)
def _unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts without registered methods."""
    monkeypatch.setattr(registry, "_OWN", {})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_runs.save_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.mark.slow
def test_a_file_named_in_the_configuration(tmp_path: Path, base: str, capsys, monkeypatch) -> None:
    config = tiny_runs.config(
        tmp_path,
        base,
        method=NAME,
        method_settings={"targets": ["mlp.up"]},
        optimizer=OptimizerConfig(),
        evaluation=HeldOutConfig(),
    )
    assert config.peak_rate == 3e-3
    result = train(config)
    assert result.scores["loss"] < result.scores_before["loss"]

    # As in another process: the folder does not contain the method's code.
    monkeypatch.setattr(registry, "_OWN", {})
    folder = str(result.adapter)
    data = {"base": config.base, "adapter": folder, "data": config.data, "scores": ("loss",)}
    with pytest.raises(
        AdapterFileError, match=r"its method is 'IA3'.*method path/to/file.py:Class"
    ):
        evaluate(EvaluateConfig(**data, split="validation"))
    scored = evaluate(EvaluateConfig(**data, split="validation", method=NAME))
    assert scored.scores["loss"] == pytest.approx(result.scores["loss"], rel=1e-5)
    assert main(["inspect", folder, "--method", NAME]) == 0
    assert "IA3(targets=" in capsys.readouterr().out
    command = ["generate", "--method", NAME, "--adapter", folder, "--base.name", base]
    assert main([*command, "--prompt", "river:", "--decoding.max_new_tokens", "2"]) == 0
    monkeypatch.setattr(registry, "_OWN", {})
    assert main(["report", str(result.folder)]) == 1
    assert "method path/to/file.py:Class" in capsys.readouterr().err
    assert main(["report", str(result.folder), "--method", NAME]) == 0
    monkeypatch.setattr(registry, "_OWN", {})
    assert main(["analyze", "diff", folder, folder, "--method", NAME]) == 0
    text = tmp_path / "text.txt"
    text.write_text("river: park\n")
    monkeypatch.setattr(registry, "_OWN", {})
    assert main(["analyze", "drift", folder, str(text), "--base.name", base, "--method", NAME]) == 0
    again = ["--output", str(tmp_path / "again"), "--max_steps", "1"]
    assert main(["train", "--config", str(result.folder / "config.yaml"), *again]) == 0
    adapter = tmp_path / "again" / "adapter"
    out = capsys.readouterr().out
    assert f"next     lorakit generate --adapter {adapter} --method {NAME} --prompt TEXT\n" in out
    assert f"         lorakit inspect {adapter} --method {NAME}\n" in out
    assert "lorakit merge" not in out  # IA3 cannot be merged
    more = tiny_runs.config(
        tmp_path, base, method=NAME, from_adapter=folder, max_steps=1, output=str(tmp_path / "more")
    )
    assert train(more).scores_before["loss"] == pytest.approx(result.scores["loss"], rel=1e-5)


def test_with_lora_and_with_a_new_head(tmp_path: Path) -> None:
    base = tiny_runs.save_base(tmp_path / "base", "llama", "base")
    data = tiny_runs.write_rows(tmp_path / "labels.jsonl", tiny_runs.labelled(40))
    config = tiny_runs.config(tmp_path, base, method=f"lora+{NAME}", optimizer=OptimizerConfig())
    assert isinstance(config.chosen_method, Combined)
    assert config.peak_rate == 5e-4
    config = tiny_runs.config(
        tmp_path,
        base,
        method=NAME,
        data=DataConfig(train=data),
        evaluation=HeldOutConfig(),
        max_steps=1,
    )
    trained = load_file(train(config).adapter / "lorakit_model.safetensors")
    assert "trained.score.weight" in trained


def test_a_class_of_the_running_program(tmp_path: Path) -> None:
    kind = use_method(NAME)
    model = tiny_models.build("llama")
    adapters = attach(model, kind())
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter += 0.3
    batch = tiny_models.example_batch("llama", model)
    expected = model(**batch).logits
    adapters.save(tmp_path / "mine")
    registry._OWN.clear()
    other = tiny_models.build("llama")
    with pytest.raises(AdapterFileError, match="use_method"):
        load(other, tmp_path / "mine")
    assert use_method(kind) is kind
    load(other, tmp_path / "mine")
    assert torch.equal(other(**batch).logits, expected)


@pytest.mark.parametrize(
    ("arch", "targets"), [("gpt-neox", ("attention.k",)), ("phi3", ("mlp.up",))]
)
def test_the_example_does_not_scale_the_other_rows_of_a_fused_projection(arch, targets) -> None:
    with pytest.raises(ConfigurationError, match="IA3 cannot scale a slice of"):
        attach(tiny_models.build(arch), use_method(NAME)(targets=targets))


def test_none_is_float32_in_the_example_as_in_the_interface() -> None:
    model, method = tiny_models.build("llama"), use_method(NAME)()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = method.modules(model, dtype=None).values()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {module.vector.dtype for module in made} == {torch.float32}


def test_the_example_scales_the_output_of_a_conv1d() -> None:
    model = tiny_models.build("gpt2")
    adapters = attach(model, use_method(NAME)(targets=("mlp.up",)))
    widths = {len(module.vector) for module in adapters.modules().values()}
    assert widths == {model.transformer.h[0].mlp.c_fc.nf}
    model(**tiny_models.example_batch("gpt2", model))


@dataclass(frozen=True, kw_only=True)
class OnOutput:
    """Puts a module of a given class on one layer."""

    kind: type[AdapterModule]
    target: str = "model.layers.0.mlp.up_proj"

    def modules(self, model: nn.Module, dtype: torch.dtype) -> dict[str, AdapterModule]:
        return {self.target: self.kind()}

    def trained_parameters(self, model: nn.Module) -> list[str]:
        return []


class Doubles(AdapterModule):
    """Has an effect, and leaves `merges` as it is."""

    def adapt(self, layer: nn.Module, x: Tensor, output: Tensor, weight: float) -> Tensor:
        return (1 + weight) * output


def test_a_module_without_weights_is_not_merged() -> None:
    model = tiny_models.build("llama")
    adapters = attach(model, OnOutput(kind=Doubles))
    with pytest.raises(AdapterStateError, match="'default' cannot be merged"):
        adapters.merge()


def test_a_method_without_a_rate_has_that_of_lora() -> None:
    assert registry.default_rate(OnOutput(kind=Doubles)) == 5e-4


class Counts(AdapterModule):
    """Has a counter, which an adapter's file cannot hold."""

    persistent = True

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))
        self.register_buffer("steps", torch.tensor(0), persistent=self.persistent)

    def adapt(self, layer: nn.Module, x: Tensor, output: Tensor, weight: float) -> Tensor:
        return output + self.offset


class CountsForNow(Counts):
    persistent = False


def test_a_tensor_that_no_file_can_hold_is_refused_before_training() -> None:
    model = tiny_models.build("llama")
    with pytest.raises(
        ConfigurationError, match=r"Counts on .* has the tensor 'steps' of int64.*persistent=False"
    ):
        attach(model, OnOutput(kind=Counts))
    assert not any("adapters" in name for name in model.state_dict())
    (tensors,) = attach(model, OnOutput(kind=CountsForNow)).stored().modules.values()
    assert list(tensors) == ["offset"]


def test_a_module_of_another_class_is_not_installed() -> None:
    model = tiny_models.build("llama")
    with pytest.raises(
        ConfigurationError, match=r"gives Identity for 'model.layers.0.*AdapterModule"
    ):
        attach(model, OnOutput(kind=nn.Identity))
    attach(model, LoRA(rank=2))


def test_an_installed_package(tmp_path: Path, monkeypatch, base: str) -> None:
    (tmp_path / "their_package.py").write_text(FILE.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint(name="ia3", value="their_package:IA3", group="lorakit.methods")
    monkeypatch.setattr(registry, "installed", lambda group: {"ia3": point})
    config = tiny_runs.config(tmp_path, base, method="ia3", max_steps=1)
    result = train(config)
    monkeypatch.setattr(registry, "_OWN", {})
    assert main(["inspect", str(result.adapter)]) == 0  # by the name of its class


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "nowhere.py:IA3"}, "names the file 'nowhere.py', which does not exist"),
        ({"method": f"{FILE}:IA2"}, r"which has no 'IA2'.*Did you mean 'IA3'"),
        ({"method": f"{FILE}"}, "Its classes: IA3"),
        ({"method": f"{FILE}:Scale"}, "a method is a frozen dataclass"),
        ({"method": NAME, "method_settings": {"targts": []}}, "Did you mean 'targets'"),
        ({"method_settings": {"size": 4}}, "one method of your own"),
    ],
)
def test_what_cannot_work_says_why(tmp_path: Path, settings, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tiny_runs.config(tmp_path, "base", **settings)


def test_files_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("raise RuntimeError('no')")
    with pytest.raises(ConfigurationError, match=r"cannot be imported \(RuntimeError: no\)"):
        use_method(f"{file}:A")
    file.write_text(FILE.read_text().replace("IA3", "LoRA"))
    with pytest.raises(ConfigurationError, match="a method of lorakit is called LoRA"):
        use_method(f"{file}:LoRA")
    with pytest.raises(ConfigurationError, match="There is no method 'ia4' of yours"):
        use_method("ia4")

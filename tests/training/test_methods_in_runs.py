"""Every method in a run: it learns, is evaluated, generates, continues from its adapter and merges."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_runs
import torch
from test_train_config import RATES
from torch import Tensor

from lorakit import (
    BottleneckAdapter,
    FullFineTuning,
    LoRA,
    PrefixEmbedding,
    PrefixLayer,
    load_base,
)
from lorakit.adapters import formats
from lorakit.adapters.formats import StoredAdapter
from lorakit.cli import main
from lorakit.data import DataConfig
from lorakit.errors import ConfigurationError
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.evaluate import evaluate
from lorakit.evaluation.evaluate_config import EvaluateConfig
from lorakit.methods.registry import SECTIONS
from lorakit.reporting import read_run
from lorakit.training.checkpoint_adapter import read_checkpoint
from lorakit.training.config import HeldOutConfig, OptimizerConfig, TrainConfig
from lorakit.training.loop import train
from lorakit.training.run_folder import RunResult, read_settings
from lorakit.training.setup import prepare
from lorakit.training.warm_start import method_of

METHODS = {
    "lora": {},
    "full": {"full": FullFineTuning(top_layers=1)},
    "bitfit": {},
    "bottleneck": {"bottleneck": BottleneckAdapter(kind="lin", size=4)},
    "prefix_embedding": {
        "prefix_embedding": PrefixEmbedding(prefix_length=3, infix_length=2),
        "optimizer": OptimizerConfig(learning_rate=0.2),  # of an embedding of width 32
    },
    "prefix_layer": {
        "prefix_layer": PrefixLayer(prefix_length=3, infix_length=2),
        "optimizer": OptimizerConfig(learning_rate=0.2),
    },
    "lora+prefix_layer": {
        "lora": LoRA(rank=4),
        "prefix_layer": PrefixLayer(prefix_length=2, infix_length=1),
    },
}
"""Settings with which each method fits a tiny model."""

MERGES = {"lora", "full", "bitfit"}


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    config: TrainConfig
    result: RunResult


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny GPT-2, which has biases for BitFit."""
    return tiny_runs.save_base(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_runs.save_base(tmp_path_factory.mktemp("roberta"), "roberta", "base")


def writing(folder: Path, base: str, method: str, **overrides) -> TrainConfig:
    return tiny_runs.config(folder, base, method=method, **{**METHODS[method], **overrides})


def labelling(folder: Path, base: str, method: str, **overrides) -> TrainConfig:
    tiny_runs.write_rows(folder / "labels.jsonl", tiny_runs.labelled(80))
    return tiny_runs.config(
        folder,
        base,
        method=method,
        data=DataConfig(train=str(folder / "labels.jsonl"), validation_fraction=0.2),
        **{**METHODS[method], **overrides},
    )


def require_equal_checkpoint(result: RunResult) -> None:
    """Require that the checkpoint of the last step reads as the adapter after it."""

    def tensors(stored: StoredAdapter) -> dict[str, Tensor]:
        factors = {
            f"{path}.{name}": tensor
            for path, layer in stored.layers.items()
            for name, tensor in layer.tensors.items()
        }
        return {**factors, **stored.module_tensors, **stored.trained}

    found = tensors(read_checkpoint(result.folder / "checkpoints" / f"step-{result.steps:06d}"))
    expected = tensors(formats.read(result.adapter))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_every_method_has_a_section() -> None:
    names = {name for method in METHODS for name in method.split("+")}
    assert names == SECTIONS.keys() <= TrainConfig.__dataclass_fields__.keys()


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, decoder: str, method: str) -> Run:
    """A finished run of the method on text generation."""
    folder = tmp_path_factory.mktemp(method)
    config = writing(folder, decoder, method, evaluation=HeldOutConfig(samples=2, max_new_tokens=3))
    return Run(folder, config, train(config))


@pytest.mark.slow
def test_the_saved_adapter_is_what_was_trained(run: Run, decoder: str, method: str, capsys) -> None:
    result = run.result
    assert result.scores["loss"] < result.scores_before["loss"]
    lines = (run.folder / "run" / "samples.jsonl").read_text().splitlines()
    last = [s for s in map(json.loads, lines) if s["step"] == result.steps]
    held_out = DataConfig(train=run.config.data.train, test=run.config.data.validation)
    scored = evaluate(
        EvaluateConfig(
            base=run.config.base,
            adapter=str(result.adapter),
            data=held_out,
            decoding=Decoding(max_new_tokens=3),
            scores=("loss", "text"),
        )
    )
    assert scored.scores["loss"] == pytest.approx(result.scores["loss"], rel=1e-5)
    texts = {output["prompt"]: output["output"] for output in scored.outputs}
    assert last
    assert all(texts[s["prompt"]] == s["output"] for s in last)

    command = [
        "generate",
        "--base.name",
        decoder,
        "--base.dtype",
        "float32",
        "--base.device",
        "cpu",
    ]
    command += ["--adapter", str(result.adapter), "--prompt", last[0]["prompt"]]
    assert main([*command, "--decoding.max_new_tokens", "3"]) == 0
    assert capsys.readouterr().out.strip() == last[0]["output"]
    assert main(["inspect", str(result.adapter)]) == 0
    assert type(run.config.chosen_method).__name__ in capsys.readouterr().out


def test_its_checkpoint_reads_as_its_adapter(run: Run) -> None:
    require_equal_checkpoint(run.result)


@pytest.mark.parametrize(
    "lora", [LoRA(bias="lora_only"), LoRA(train_modules=("lm_head",))], ids=["bias", "module"]
)
def test_a_checkpoint_of_lora_with_trained_base_tensors(
    tmp_path: Path, decoder: str, lora: LoRA
) -> None:
    require_equal_checkpoint(train(tiny_runs.config(tmp_path, decoder, lora=lora, max_steps=1)))


@pytest.mark.slow
def test_it_is_trained_further(run: Run, decoder: str, method: str, tmp_path: Path, capsys) -> None:
    config = tiny_runs.config(
        tmp_path,
        decoder,
        data=run.config.data,
        from_adapter=str(run.result.adapter),
        optimizer=OptimizerConfig(),
        max_steps=2,
    )
    before = train(config).scores_before["loss"]
    assert before == pytest.approx(run.result.scores["loss"], rel=1e-5)
    settings = read_settings(tmp_path / "run")  # the default rate is that of the adapter's method
    assert settings["optimizer"]["learning_rate"] == RATES[method]
    name = type(run.config.chosen_method).__name__
    shown = capsys.readouterr().err
    assert f"method    {name} of {run.result.adapter}: " in shown
    # The reports and the card have this method, not the configuration's default.
    assert read_run(tmp_path / "run").method == method
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert f'"from_adapter": "{run.result.adapter}"' in card
    assert '"lora": {' not in card


def test_a_rate_for_b_is_of_lora_alone(run: Run, method: str, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(lr_ratio=16)
    config = tiny_runs.config(
        tmp_path, "base", from_adapter=str(run.result.adapter), optimizer=optimizer
    )
    if "lora" in method:
        assert method_of(config) == run.config.chosen_method
    else:
        with pytest.raises(ConfigurationError, match=r"applies only to lora, and .* is "):
            method_of(config)


@pytest.mark.slow
def test_it_merges_or_says_that_it_cannot(run, decoder, method, tmp_path: Path, capsys) -> None:
    output = tmp_path / "merged"
    command = ["merge", str(run.result.adapter), str(output), "--base.name", decoder]
    code = main([*command, "--base.dtype", "float32", "--base.device", "cpu"])
    if method in MERGES:
        assert code == 0
        assert load_base(str(output)).model.config.model_type == "gpt2"
    else:
        assert code == 1
        assert "cannot be merged" in capsys.readouterr().err
        assert not output.exists()


def validation_scores(config: TrainConfig, result: RunResult) -> dict[str, float]:
    """Return the scores of a run's saved adapter on the run's validation data."""
    return evaluate(
        EvaluateConfig(
            base=config.base,
            adapter=str(result.adapter),
            data=config.data,
            split="validation",
            scores=("loss",),
        )
    ).scores


@pytest.mark.slow
def test_classification(tmp_path: Path, encoder: str, method: str) -> None:
    config = labelling(
        tmp_path,
        encoder,
        method,
        evaluation=HeldOutConfig(metric="accuracy"),
        optimizer=OptimizerConfig(learning_rate=2e-3 if method == "full" else 2e-2),
        # After 3, a prefix is still at chance.
        epochs=2 if method in ("lora", "full", "bitfit") else 6,
    )
    job = prepare(config)
    assert {name for name in job.parameters if name.startswith("classifier.")}
    result = train(config)
    assert result.scores["loss"] < result.scores_before["loss"]
    scores = validation_scores(config, result)
    assert scores["accuracy"] == result.scores["accuracy"]
    require_equal_checkpoint(result)  # its head is trained in full


@pytest.mark.slow
def test_an_adapter_of_a_language_model_starts_a_classifier(tmp_path: Path, capsys) -> None:
    """A folder of PEFT does not record the class of its base, and has no head: the new one is trained and saved."""
    base = tiny_runs.save_base(tmp_path / "base")
    first = train(tiny_runs.config(tmp_path, base, max_steps=1, output=str(tmp_path / "first")))
    (first.adapter / "lorakit.json").unlink()
    tiny_runs.write_rows(tmp_path / "labels.jsonl", tiny_runs.labelled(20))
    config = tiny_runs.config(
        tmp_path,
        base,
        data=DataConfig(train=str(tmp_path / "labels.jsonl"), validation_fraction=0.2),
        from_adapter=str(first.adapter),
        max_steps=2,
    )
    assert "score.weight" in prepare(config).parameters
    result = train(config)
    assert "start anew and are trained: score.weight (2, 32)" in " ".join(
        capsys.readouterr().err.split()
    )
    scores = validation_scores(config, result)
    assert scores["loss"] == pytest.approx(result.scores["loss"], rel=1e-5)
    require_equal_checkpoint(result)


def test_default_rates_stand_in_the_recorded_configuration(tmp_path: Path, decoder: str) -> None:
    train(writing(tmp_path, decoder, "bitfit", max_steps=1, optimizer=OptimizerConfig()))
    assert f"learning_rate: {RATES['bitfit']}\n" in (tmp_path / "run/config.yaml").read_text()

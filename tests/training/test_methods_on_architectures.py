"""Every method on encoders and decoders by commands: train, stop, resume, evaluate and generate."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import yaml
from tiny_runs import adapter_bytes

from lorakit import (
    BottleneckAdapter,
    FullFineTuning,
    LoRA,
    PrefixEmbedding,
    PrefixLayer,
)
from lorakit.cli import main
from lorakit.compute.adapted import open_adapted
from lorakit.compute.adapter_file import AdapterFile
from lorakit.compute.model_input import model_prompts
from lorakit.data import DataConfig
from lorakit.errors import LorakitError
from lorakit.models.base_config import BaseConfig
from lorakit.tasks.language_modelling import prompt_ids
from lorakit.training.config import CheckpointConfig, HeldOutConfig, OptimizerConfig, TrainConfig
from lorakit.training.loop import train

METHODS = {
    "lora": ("lora", {}),
    "full": ("full", {}),
    "top layer": ("full", {"full": FullFineTuning(top_layers=1)}),
    "bitfit": ("bitfit", {}),
    "houlsby": ("bottleneck", {"bottleneck": BottleneckAdapter(size=4)}),
    "lin": ("bottleneck", {"bottleneck": BottleneckAdapter(kind="lin", size=4)}),
    "pfeiffer": (
        "bottleneck",
        {"bottleneck": BottleneckAdapter(kind="pfeiffer", size=4, drop_layers=(0,))},
    ),
    "prefix embedding": (
        "prefix_embedding",
        {"prefix_embedding": PrefixEmbedding(prefix_length=3, infix_length=2)},
    ),
    "prefix layer": (
        "prefix_layer",
        {"prefix_layer": PrefixLayer(prefix_length=3, infix_length=2)},
    ),
    "lora and prefix embedding": (
        "lora+prefix_embedding",
        {"lora": LoRA(rank=4), "prefix_embedding": PrefixEmbedding(prefix_length=2)},
    ),
    "lora and prefix layer": (
        "lora+prefix_layer",
        {"lora": LoRA(rank=4), "prefix_layer": PrefixLayer(prefix_length=2, infix_length=1)},
    ),
}
"""Name of a test -> the method, and the section that makes it fit a tiny model."""

DECODERS = ("gpt2", "llama")
ENCODERS = ("roberta", "deberta-v2")
SIDES = {
    **dict.fromkeys(("top layer", "houlsby", "lora and prefix embedding"), (DECODERS,)),
    **dict.fromkeys(("lin", "pfeiffer"), (ENCODERS,)),
}
"""Variants that run on one kind of architecture, because other variants of their method run on the other."""
CASES = [
    (pair[i % 2], name)
    for i, name in enumerate(METHODS)
    for pair in SIDES.get(name, (DECODERS, ENCODERS))
]
"""Architectures and methods. Neighbours in METHODS, of one kind, get different ones."""

TOKENS = 3
"""Number of generated tokens."""


@dataclass(frozen=True)
class Bases:
    """Model folders by architecture."""

    folder: Path

    def path(self, arch: str) -> str:
        """Return the folder of the tiny model; the first call creates it."""
        folder = self.folder / arch
        if not folder.exists():
            head = None if arch in DECODERS else "base"  # the run adds a new classification head
            # A Llama has no biases by default, so BitFit would have nothing to train.
            biases = {"attention_bias": True, "mlp_bias": True} if arch == "llama" else {}
            tiny_runs.save_base(folder, arch, head, **biases)
        return str(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def configuration(folder: Path, base: str, name: str, *, writes: bool) -> TrainConfig:
    """Four steps that see each of 32 examples once, with a checkpoint after the second."""
    method, section = METHODS[name]
    if writes:
        train, held_out = tiny_runs.pairs(32), tiny_runs.pairs(8, seed=1)
    else:
        train, held_out = tiny_runs.labelled(32), tiny_runs.labelled(8, seed=1)
    data = DataConfig(
        train=tiny_runs.write_rows(folder / "train.jsonl", train),
        validation=tiny_runs.write_rows(folder / "held-out.jsonl", held_out),
    )
    return TrainConfig(
        base=BaseConfig(name=base, dtype="float32", device="cpu"),
        data=data,
        output=str(folder / "whole"),
        method=method,
        epochs=1,
        batch_size=8,
        optimizer=OptimizerConfig(learning_rate=5e-3),
        evaluation=HeldOutConfig(every=4),
        checkpoints=CheckpointConfig(every=2),
        **section,
    )


def train_by_command(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run `lorakit train` without its plan and its report, which take most of the time; return the exit status."""

    def no_plan(*args: Any, **settings: Any) -> None:
        raise LorakitError("left out")

    monkeypatch.setattr("lorakit.planning.plan", no_plan)
    monkeypatch.setattr("lorakit.cli.report.write_run_report", lambda *args, **settings: "left out")
    file = Path(config.output).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config.as_dict()), encoding="utf-8")
    return main(["train", "--config", str(file)])


def greedy_without_cache(base: str, adapter: Path, prompt: str) -> str:
    """The definition of greedy decoding: a whole forward pass for every token."""
    opened = open_adapted(
        BaseConfig(name=base, dtype="float32", device="cpu"), AdapterFile.read(adapter)
    )
    model, tokenizer = opened.model, opened.tokenizer
    assert tokenizer is not None
    (ids,) = model_prompts(model, tokenizer, [prompt_ids(tokenizer, prompt)])
    written: list[int] = []
    model.eval()
    with torch.no_grad():
        while len(written) < TOKENS and tokenizer.eos_token_id not in written:
            logits = model(torch.tensor([ids + written]), use_cache=False).logits
            written.append(int(logits[0, -1].argmax()))
    return tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "name"), CASES)
def test_the_life_of_an_adapter(
    tmp_path: Path, bases: Bases, arch: str, name: str, monkeypatch, capsys
) -> None:
    base, writes = bases.path(arch), arch in DECODERS
    whole = configuration(tmp_path, base, name, writes=writes)
    result = train(whole)
    assert result.scores["loss"] != result.scores_before["loss"]
    stopped = dataclasses.replace(whole, output=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        calls = iter(range(4))

        def stopping(*args: Any) -> None:
            if next(calls) == 3:
                raise KeyboardInterrupt

        patch.setattr("lorakit.training.step.require_finite", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(stopped)
    assert not (tmp_path / "stopped" / "adapter").exists()
    assert train_by_command(dataclasses.replace(stopped, resume=True), monkeypatch) == 0
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "whole")

    adapter = tmp_path / "stopped" / "adapter"
    device = ["--base.name", base, "--base.dtype", "float32", "--base.device", "cpu"]
    held_out = ["--data.train", whole.data.train, "--data.test", whole.data.validation]
    scored = [*held_out, "--scores", '["loss"]', "--adapter", str(adapter)]
    capsys.readouterr()
    assert main(["evaluate", *device, *scored]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    printed = {
        words[0]: words[1] for words in lines if len(words) > 1
    }  # of the adapter, before the base's
    for score in ("loss",) if writes else ("loss", "accuracy"):
        assert float(printed[score]) == pytest.approx(result.scores[score], rel=1e-3)  # four digits

    if writes:
        prompt = "river plane:"
        options = ["--adapter", str(adapter), "--prompt", prompt]
        options += ["--decoding.max_new_tokens", str(TOKENS)]
        assert main(["generate", *device, *options]) == 0
        expected = greedy_without_cache(base, adapter, prompt)
        assert capsys.readouterr().out == expected + "\n"


def test_without_biases_the_command_says_so(tmp_path: Path, monkeypatch, capsys) -> None:
    base = tiny_runs.save_base(tmp_path / "base", "llama")
    config = configuration(tmp_path, base, "bitfit", writes=True)
    assert train_by_command(config, monkeypatch) == 1
    assert "bias" in capsys.readouterr().err
    assert not (tmp_path / "whole").exists()

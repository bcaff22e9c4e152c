"""`lorakit inspect`: the norms of every kind of layer, and names printed literally."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import tiny_models

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "analysis"), str(TESTS / "adapters" / "formats")]

from sample_adapters import dense_parts, layers, stored

import lorakit
from lorakit.cli import main
from lorakit.cli.inspect import describe
from lorakit.methods import method


@pytest.mark.parametrize("name", layers())
def test_the_norm_is_that_of_the_change(name: str) -> None:
    norm = describe(stored(name))["layers"][name]["norm"]
    parts = dense_parts(layers()[name])
    assert norm == pytest.approx(math.hypot(*(float(part.norm()) for part in parts)))


def test_the_size_is_that_of_the_file(tmp_path: Path, capsys) -> None:
    """PEFT's form has zeros beside the adapted rows of GPT-2's fused projection."""
    adapters = lorakit.attach(tiny_models.build("gpt2"), lorakit.LoRA(rank=2), name="a")
    folder = adapters.save(tmp_path / "a")
    assert main(["inspect", str(folder), "--json", "true"]) == 0
    file = folder / "adapter_model.safetensors"
    assert json.loads(capsys.readouterr().out)["bytes"] == file.stat().st_size


def test_names_from_a_file_are_no_markup(tmp_path: Path, capsys) -> None:
    model = tiny_models.build("llama")
    model.config._name_or_path = "[bold]base[/red]"
    lorakit.attach(model, lorakit.LoRA(rank=2), name="a").save(tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert "base: [bold]base[/red]" in shown
    assert "model.layers.*.self_attn.q_proj" in shown
    assert main(["inspect", str(tmp_path / "a"), "--layers", "true", "--json", "true"]) == 0
    found = json.loads(capsys.readouterr().out)["layers"]
    assert {layer["norm"] for layer in found.values()} == {0}


def test_only_what_the_adapter_has_is_printed(tmp_path: Path, capsys) -> None:
    adapters = lorakit.attach(tiny_models.build("llama"), lorakit.LoRA(rank=2), name="a")
    config = {"method": "lora", "lora": {"rank": 2}, "bottleneck": {"kind": "houlsby"}}
    config |= {"epochs": 3.0, "max_steps": None, "optimizer": {"learning_rate": 5e-4}}
    recorded = {"config": config, "labels": [], "encoding": None, "scores": {"loss": 1.23456}}
    adapters.save(tmp_path / "a", provenance=recorded)
    assert main(["inspect", str(tmp_path / "a")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "LoRA(rank=2, alpha=16.0, targets=('attention.qv',))"
    assert "config: epochs 3, optimizer.learning_rate 0.0005 (all settings: --json)" in lines
    assert "scores: loss 1.235" in lines
    adapters.save(tmp_path / "b", provenance={"config": {"epochs": 3.0, "max_steps": 9}})
    assert main(["inspect", str(tmp_path / "b")]) == 0
    assert "config: max_steps 9 (all settings: --json)" in capsys.readouterr().out.splitlines()
    shown = "\n".join(lines)
    assert not [
        word for word in ("dora", "bias", "bottleneck", "labels", "encoding") if word in shown
    ]


@pytest.mark.parametrize(
    ("adapter", "shown", "changed"),
    [
        (lorakit.LoRA(), "LoRA(rank=8, alpha=16.0, targets=('attention.qv',))", "LoRA()"),
        (
            lorakit.LoRA(dora=True),
            "LoRA(rank=8, alpha=16.0, targets=('attention.qv',), dora=True)",
            "LoRA(dora=True)",
        ),
        (lorakit.PrefixLayer(), "PrefixLayer(prefix_length=8, infix_length=0)", "PrefixLayer()"),
        (
            lorakit.BottleneckAdapter(),
            "BottleneckAdapter(kind='houlsby', size=64)",
            "BottleneckAdapter()",
        ),
        (lorakit.BitFit(), "BitFit()", "BitFit()"),
        (
            lorakit.Combined(methods=(lorakit.LoRA(rank=4), lorakit.BitFit())),
            "Combined(methods=(LoRA(rank=4, alpha=16.0, targets=('attention.qv',)), BitFit()))",
            "Combined(methods=(LoRA(rank=4), BitFit()))",
        ),
    ],
)
def test_the_main_settings_are_always_shown(adapter, shown: str, changed: str) -> None:
    assert method.describe(adapter) == shown
    # A resumed run compares this text: it has the settings that differ from the defaults alone.
    assert method.describe(adapter, main=False) == changed


def test_an_assumed_alpha_is_stated(tmp_path: Path, capsys) -> None:
    adapters = lorakit.attach(tiny_models.build("llama"), lorakit.LoRA(rank=2))
    folder, file = str(adapters.save(tmp_path / "a")), str(tmp_path / "a.bin")
    assert main(["convert", folder, file]) == 0
    for arguments, is_assumed in (
        ([file], True),
        ([file, "--alpha", "16"], False),
        ([folder], False),
    ):
        capsys.readouterr()
        assert main(["inspect", *arguments]) == 0
        assert ("does not record alpha; 1 is assumed" in capsys.readouterr().out) == is_assumed

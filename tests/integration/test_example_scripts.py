"""The scripts in examples/ run unchanged and give the promised results."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit
from lorakit.compute.adapter_file import AdapterFile, recorded_task
from lorakit.data import DataTask

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TRAINING = ("plain_pytorch_loop", "transformers_trainer", "trl_sft", "trl_dpo", "accelerate_loop")

pytestmark = [
    # transformers' Trainer requests pinned memory even without an accelerator.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    # PEFT and TRL use a name that transformers deprecates.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
    # TRL appends the end token to a completion, and so does the byte tokenizer of the examples.
    pytest.mark.filterwarnings("ignore:This sequence already has </s>:UserWarning"),
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run an example as ``python examples/NAME.py --out ...``; return its variables."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)

    def run_example(name: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, "--out", str(tmp_path / "out"), *arguments])
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    return run_example


def fresh_base(names: dict[str, Any]) -> nn.Module:
    model, _ = names["load_base"](None)
    return model


def assert_same_base(model: nn.Module, base: nn.Module) -> None:
    found, expected = model.state_dict(), base.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name].cpu(), expected[name]) for name in expected)


@torch.no_grad()
def logits(model: nn.Module, names: dict[str, Any]) -> Tensor:
    batch = names["tokenizer"](
        names["load_base"].__globals__["TEXTS"], padding=True, return_tensors="pt"
    )
    return model.cpu().eval()(**batch).logits


def test_every_example_is_tested() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {
        *TRAINING,
        "many_adapters",
        "load_with_peft",
        "look_inside",
        "tiny_base",
        "own_task",
        "own_method",
        "ray_serve",  # tests/serving/test_ray_replicas.py
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_training(name: str, run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    names = run(name)
    losses = names["losses"]
    assert losses[-1] < losses[0] - 0.05
    model, adapters, base = names["model"], names["adapters"], fresh_base(names)

    # Only the adapter changed.
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".adapters.")[1].split(".")[0] for n in trained} == {"mine"}
    start = fresh_base(names)
    lorakit.attach(start, adapters.method(), name="mine", seed=0)
    moved = {
        n for n, p in start.named_parameters() if not torch.equal(p, model.get_parameter(n).cpu())
    }
    assert moved == trained.keys()

    # The saved folder gives the same logits, and the base is unchanged.
    adapted = logits(model, names)
    assert (adapted - logits(base, names)).abs().max() > 1e-2
    folder = next((tmp_path / "out").rglob("adapter_config.json")).parent
    other = fresh_base(names)
    lorakit.load(other, folder)
    torch.testing.assert_close(logits(other, names), adapted)
    adapters.detach()
    assert_same_base(model, base)


def test_many_adapters(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    names = run("many_adapters")
    found, model = names["logits"], names["model"]
    formal, casual, base = found["formal"], found["casual"], found[None]
    for one, other in ((formal, casual), (formal, base), (casual, base)):
        assert (one - other).abs().max() > 1e-2
    torch.testing.assert_close(found["by row"], torch.stack([casual[0], base[1], formal[2]]))
    torch.testing.assert_close(found["merged"], formal, atol=1e-4, rtol=1e-4)
    assert all((found["mixed"] - one).abs().max() > 1e-2 for one in (formal, casual, base))
    assert_same_base(model, fresh_base(names))
    lorakit.load(model, tmp_path / "out", name="again")
    with torch.no_grad():
        torch.testing.assert_close(model(**names["batch"]).logits, formal)


def test_load_with_peft(run: Callable[..., dict[str, Any]]) -> None:
    names = run("load_with_peft")
    found = names["logits"]
    assert list(found) == ["lorakit", "peft", "transformers", "taken over"]
    with torch.no_grad():
        base = fresh_base(names)(**names["batch"]).logits
    for logits_found in found.values():
        assert (logits_found - base).abs().max() > 1e-2
        torch.testing.assert_close(logits_found, found["lorakit"], atol=1e-5, rtol=0)
    taken_over = names["taken_over"]
    assert set(dict(taken_over.model.named_modules())) >= {"model.layers.0.self_attn.q_proj"}
    taken_over.detach()
    assert_same_base(taken_over.model, fresh_base(names))


def test_look_inside(run: Callable[..., dict[str, Any]]) -> None:
    names = run("look_inside")
    losses = names["losses"]
    assert max(losses["one"], losses["two"], losses["small"]) < losses[None] - 0.05
    assert names["mean"].error == 0
    assert 0 < names["small"].error < 0.5
    assert {layer.rank for layer in names["small"].adapter.layers.values()} == {4}
    assert_same_base(names["model"], fresh_base(names))


@pytest.mark.slow
def test_own_task(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    names = run("own_task")
    scores = names["scored"].scores
    assert set(scores) == {"loss", "perplexity", "exact"}
    assert scores["exact"] > 0  # on numbers that are not in the training data
    records = names["scored"].outputs
    assert [r["references"] for r in records[:2]] == [["zero three"], ["one zero"]]
    assert records[0]["prompt"] == "Write the number 03 in words:"
    start = json.loads((tmp_path / "out/run/metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert scores["loss"] < start / 2
    # The adapter records its task, and reading it does not run the file.
    adapter = str(tmp_path / "out" / "run" / "adapter")
    assert recorded_task(AdapterFile.read(adapter)) == DataTask(name="completion")
    assert recorded_task(AdapterFile.read(adapter), names["data"].task) == DataTask(
        name=names["data"].task
    )


def test_a_model_of_ones_own(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """--model accepts any folder; here a saved copy of the tiny model and its tokenizer."""
    names = run("many_adapters")
    model, tokenizer = names["load_base"](None)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    again = run("many_adapters", "--model", str(tmp_path / "base"))
    torch.testing.assert_close(again["logits"][None], names["logits"][None], atol=1e-5, rtol=0)


def test_own_method(run: Callable[..., dict[str, Any]]) -> None:
    names = run("own_method")
    assert names["losses"][-1] < names["losses"][0] - 0.05
    assert names["adapters"].names == ("again",)
    loaded = names["adapters"].modules("again").values()
    assert max((module.vector - 1).abs().max() for module in loaded) > 0.1


@pytest.mark.slow
def test_the_reference_of_dpo_is_the_base(run: Callable[..., dict[str, Any]]) -> None:
    """The new adapter has no effect yet when TRL computes the reference."""
    names = run("trl_dpo")
    trainer, adapters = names["trainer"], names["adapters"]
    assert trainer.ref_model is None
    row = trainer.train_dataset[0]
    ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]], device=trainer.model.device)
    with adapters.disabled(), torch.no_grad():
        scores = trainer.model(ids).logits.float().log_softmax(-1)[0, :-1]
    each = scores.gather(1, ids[0, 1:, None]).squeeze(1)
    chosen = each[len(row["prompt_ids"]) - 1 :].sum().item()
    assert chosen == pytest.approx(row["ref_chosen_logps"], rel=1e-3)

"""What lorakit computes on the device of `second_device.py` and on the CPU, for `test_second_device.py`.

By hand::

    python tests/integration/on_second_device.py FOLDER

The numbers of each scenario on both devices are written to FOLDER/outcomes.json; an error is written as a text.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "serving")]

import pytest
import second_device
import tiny_models
import tiny_runs
import torch
from engines import running, send
from leases import PlainLease, attach_some
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedModel

import lorakit
from lorakit.adapters import handle_of
from lorakit.data import DataConfig
from lorakit.evaluation.decoding import Decoding
from lorakit.evaluation.generate import generate
from lorakit.methods.bottleneck import BottleneckAdapter
from lorakit.methods.lora.method import LoRA
from lorakit.models.base_config import BaseConfig
from lorakit.serving.batched import BatchedEngine
from lorakit.serving.continuous import ContinuousEngine
from lorakit.serving.engine import Sampling
from lorakit.serving.sampling import Chooser, choose
from lorakit.training.config import OptimizerConfig, TrainConfig
from lorakit.training.loop import train
from lorakit.training.setup import prepare
from lorakit.training.step import optimizer_step

SECOND = f"{second_device.NAME}:0"
BATCHES = (1, 4)
"""Numbers of batches in a step whose waits for the device are counted."""
NO_DROPOUT = {
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "roberta": {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
}
"""Settings that turn off a base's dropout, whose masks another device draws otherwise."""
REQUESTS = (4, 32)
"""Numbers of requests in a decoding step."""
Scenario = Callable[[str, Path], Any]


def main() -> None:
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    BaseConfig.__post_init__ = lambda _: None  # type: ignore[method-assign]  # accepts the device's name
    outcomes = {
        name: {device: _outcome(scenario, device, root / name) for device in ("cpu", SECOND)}
        for name, scenario in SCENARIOS.items()
    }
    outcomes["step"] = {
        arch: [_waits(root / f"{arch}-{count}", arch, count) for count in BATCHES]
        for arch in ("llama", "gpt2")
    }
    outcomes["waits to sample"] = {str(count): _waits_to_sample(count) for count in REQUESTS}
    (root / "outcomes.json").write_text(json.dumps(outcomes))


def _outcome(scenario: Scenario, device: str, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    try:
        return scenario(device, folder)
    except Exception:
        return traceback.format_exc()


def _config(device: str, folder: Path, arch: str = "llama", **settings: Any) -> TrainConfig:
    base = folder / "base"
    if not base.exists():
        tiny_runs.save_base(base, arch, **NO_DROPOUT.get(arch, {}))
    if arch in tiny_models.ENCODERS and "data" not in settings:
        train_file = tiny_runs.write_rows(folder / "labelled.jsonl", tiny_runs.labelled(72))
        held_out = tiny_runs.write_rows(folder / "held_out.jsonl", tiny_runs.labelled(12, 1))
        settings["data"] = DataConfig(train=train_file, validation=held_out)
    return tiny_runs.config(
        folder,
        str(base),
        output=str(folder / f"run-{device[:3]}"),
        base=BaseConfig(name=str(base), dtype="float32", device=device),
        **{"max_steps": 4, **settings},
    )


def _trained(arch: str = "llama", **settings: Any) -> Scenario:
    """Return a scenario that trains a tiny model; its numbers are the scores and the loss of each step."""

    def scenario(device: str, folder: Path) -> Any:
        config = _config(device, folder, arch, **settings)
        result = train(config)
        losses = [line["loss"] for line in tiny_runs.metrics(Path(config.output), "train")]
        return [*result.scores.values(), *losses]

    return scenario


def _resumed(device: str, folder: Path) -> Any:
    """Stop in step 4, and train on from the checkpoint of step 3."""
    config = _config(device, folder, max_steps=5)
    with pytest.MonkeyPatch.context() as patch:
        tiny_runs.crash_in_step(patch, 4)
        with pytest.raises(tiny_runs.Crash):
            train(config)
    return list(train(replace(config, resume=True)).scores.values())


def _adapted(device: str) -> PreTrainedModel:
    model = tiny_models.build("llama", vocab_size=len(TOKENIZER), max_position_embeddings=256)
    model.generation_config.eos_token_id = None
    model = model.to(device)
    torch.manual_seed(0)  # of both devices
    attach_some(model)
    return model


TOKENIZER = tiny_tokenizer()
PROMPTS = [[5, 9, 14, 20, 31], [7, 7, 40], [12, 30, 8, 25, 19, 33, 6], [50, 41, 4, 11]]
BLENDS = [(), (("a", 1.0),), (("b", 1.0),), (("a", 0.5), ("c", 0.75))]


def _served(kind: type[Any]) -> Scenario:
    """Return a scenario that answers requests with different adapters in the same batches."""

    def scenario(device: str, folder: Path) -> Any:
        samplings = (
            Sampling(temperature=0),
            Sampling(temperature=0.8, top_p=0.9, seed=3),
            Sampling(seed=3),
        )
        with running(kind(_adapted(device), TOKENIZER)) as engine:
            sent = [
                send(engine, prompt, PlainLease(blend, TOKENIZER), 6, sampling=sampling)
                for sampling in samplings
                for prompt, blend in zip(PROMPTS, BLENDS, strict=True)
            ]
            return [answer.wait().ids for answer in sent]

    return scenario


def _generated(device: str, folder: Path) -> Any:
    model = _adapted(device)
    handle = handle_of(model)
    assert handle is not None
    texts = []
    for blend in BLENDS:
        handle.activate(dict(blend) or None)
        for decoding in (Decoding(max_new_tokens=5), Decoding(max_new_tokens=5, beams=3)):
            texts += generate(model, TOKENIZER, PROMPTS, decoding)
    return texts


def _merged(device: str, folder: Path) -> Any:
    """Save, load and merge an adapter of each kind; return the logits with it, merged, and after it is gone."""
    logits = []
    for dora in (False, True):
        model = tiny_models.build("llama").to(device)
        ids = torch.tensor(PROMPTS[:1], device=device)
        adapters = lorakit.attach(model, LoRA(rank=4, dora=dora), name="x", seed=0)
        optimizer = torch.optim.AdamW(adapters.trainable_parameters("x"), lr=0.05)
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        path = folder / f"adapter-{dora}-{device[:3]}"
        adapters.save(path)
        adapters.detach()
        adapters = lorakit.load(model, path, name="x")
        with torch.no_grad():
            for change in (None, partial(adapters.merge, "x"), adapters.detach):
                if change:
                    change()
                logits.append(model(ids).logits.cpu().flatten().tolist())
    return logits


def _waits(folder: Path, arch: str, batches: int) -> tuple[int, int]:
    """Return how often the CPU waits for the device in one step of packed examples, and what it copies to it.

    After a first step. The second number is that of the copies for one batch.
    """
    folder.mkdir(exist_ok=True)
    tiny_runs.save_base(folder / "base", arch, **NO_DROPOUT.get(arch, {}))
    settings = OptimizerConfig(learning_rate=1e-2)
    config = _config(SECOND, folder, arch, accumulation=batches, optimizer=settings, max_steps=2)
    job = prepare(config)
    for number, examples in enumerate(job.step_plan.steps()):
        second_device.waits.clear()
        second_device.uploads.clear()
        optimizer_step(job, examples, number)
    return len(second_device.waits), len(second_device.uploads) // batches


def _waits_to_sample(requests: int) -> int:
    """Return how often the CPU waits for the device to draw a token for each request."""
    scores = torch.randn(requests, 2000, generator=torch.Generator().manual_seed(0)).to(SECOND)
    samplings = (Sampling(), Sampling(top_p=0.9), Sampling(top_k=5), Sampling(temperature=0))
    choosers = [Chooser(samplings[i % 4], 2) for i in range(requests)]
    second_device.waits.clear()
    choose(scores, choosers)
    return len(second_device.waits)


def _refusal(device: str, folder: Path) -> Any:
    return (torch.ones(3, device=device) + torch.ones(3)).tolist()


SCENARIOS: dict[str, Scenario] = {
    "train packed": _trained(),
    "train padded": _trained(packing=False),
    "train with DoRA": _trained(lora=LoRA(dora=True)),
    "train every weight": _trained(method="full"),
    "train a prefix": _trained(method="prefix_layer"),
    "train bottleneck layers": _trained(method="bottleneck", bottleneck=BottleneckAdapter(size=8)),
    "train an encoder": _trained("roberta"),
    "train an encoder-decoder": _trained("t5"),
    "resume": _resumed,
    "serve, continuous": _served(ContinuousEngine),
    "serve, batched": _served(BatchedEngine),
    "generate": _generated,
    "save, load, merge": _merged,
    "refusal": _refusal,
}

if __name__ == "__main__":
    main()

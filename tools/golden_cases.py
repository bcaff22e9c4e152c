"""The golden cases. Each returns what is compared: values for JSON, and tensors. They use lorakit as its users do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from golden_inputs import PEFT_FOLDERS, example_ids, load_model
from safetensors.torch import load_file

import lorakit
from lorakit.cli import main

Tensors = dict[str, torch.Tensor]
Case = Callable[[Path], tuple[dict[str, Any], Tensors]]
"""Gets an empty folder for its files; returns values and tensors."""

_TEXT = {"base": "llama", "data": "pairs"}
RUNS: dict[str, dict[str, Any]] = {
    "lora": _TEXT,
    "dora": {**_TEXT, "lora": {"rank": 4, "dora": True}},
    "rslora": {**_TEXT, "lora": {"rank": 4, "scaling": "rslora", "targets": "all-linear"}},
    "pissa": {**_TEXT, "lora": {"rank": 4, "init": "pissa"}},
    "full": {**_TEXT, "method": "full"},
    "bitfit": {**_TEXT, "base": "llama-biased", "method": "bitfit"},
    "bottleneck": {**_TEXT, "method": "bottleneck", "bottleneck": {"size": 8}},
    "prefix-layer": {**_TEXT, "method": "prefix_layer", "prefix_layer": {"prefix_length": 3}},
    "prefix-embedding": {
        **_TEXT,
        "method": "lora+prefix_embedding",
        "prefix_embedding": {"prefix_length": 2, "infix_length": 1},
    },
    "fused": {**_TEXT, "base": "gpt2", "lora": {"rank": 4, "bias": "lora_only"}},
    "classifier": {"base": "roberta", "data": "labelled", "task": "classification"},
    "chat": {"base": "llama", "data": "chats", "gradient_checkpointing": True},
    "encoder-decoder": {"base": "t5", "data": "pairs"},
    "padded": {**_TEXT, "packing": False},
    "grouped": {**_TEXT, "sampling": "grouped", "label_smoothing": 0.1},
    "quantised": {**_TEXT, "dtype": "nf4"},
    "dropout": {**_TEXT, "base": "llama-dropout", "lora": {"rank": 4, "dropout": 0.1}},
}
"""Settings of each run; base, dtype, data and task name inputs."""

MERGED = ("lora", "dora", "pissa", "fused", "classifier")
"""The runs whose adapter is merged as well."""

_TIMES = ("seconds", "tokens_per_second", "peak_memory", "time", "memory")


@contextmanager
def cases(inputs: Path) -> Iterator[dict[str, Case]]:
    """Yield all cases by name."""

    def run_case(name: str) -> Case:
        return lambda scratch: _run(inputs, scratch, name)

    def peft_case(name: str) -> Case:
        return lambda scratch: _peft(inputs, scratch, name)

    yield {
        **{f"runs/{name}": run_case(name) for name in RUNS},
        **{f"peft/{name}": peft_case(name) for name in PEFT_FOLDERS},
    }


def _run(inputs: Path, scratch: Path, name: str) -> tuple[dict[str, Any], Tensors]:
    """Train a few steps, score the adapter, and merge some."""
    folder = scratch / "run"
    data = RUNS[name]["data"]
    test = {"test": str(inputs / "data" / f"{data}-test.jsonl")}
    lorakit.train(_train_config(inputs, folder, **RUNS[name]))
    values: dict[str, Any] = {
        "config": yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")),
        "metrics": _metrics(folder / "metrics.jsonl"),
        "adapter files": sorted(path.name for path in (folder / "adapter").iterdir()),
    }
    peft_config = folder / "adapter" / "adapter_config.json"
    if peft_config.exists():
        values["adapter_config.json"] = json.loads(peft_config.read_text(encoding="utf-8"))
    tensors = {"adapter": folder / "adapter"}
    scored = lorakit.evaluate(
        lorakit.EvaluateConfig(
            adapter=str(folder / "adapter"),
            base=_base(inputs, RUNS[name]),
            data=test,
            decoding={"max_new_tokens": 6},
        )
    )
    values["scores"], values["outputs"] = scored.scores, scored.outputs
    if data == "labelled":
        predicted = lorakit.predict(
            lorakit.PredictConfig(
                adapter=str(folder / "adapter"),
                data={"test": str(inputs / "data" / "unlabelled.jsonl")},
                output=str(scratch / "predicted.jsonl"),
            )
        )
        values["predicted"] = predicted.rows
    if name in MERGED:
        merged = ["merge", str(folder / "adapter"), str(scratch / "merged")]
        values["merge status"] = main([*merged, "--base.dtype", "float32"])
        tensors["merged"] = scratch / "merged"
    return values, _named_tensors(tensors)


def _train_config(inputs: Path, output: Path, **settings: Any) -> lorakit.TrainConfig:
    """Return six steps of two batches, with a validation score before, between and after."""
    data, task = (settings.pop(key, "auto") for key in ("data", "task"))
    base = _base(inputs, settings)
    others = {key: value for key, value in settings.items() if key not in ("base", "dtype")}
    return lorakit.TrainConfig(
        **{
            "base": base,
            "data": {
                "train": str(inputs / "data" / f"{data}.jsonl"),
                "validation": str(inputs / "data" / f"{data}-test.jsonl"),
                "task": task,
            },
            "output": str(output),
            "max_steps": 6,
            "batch_size": 4,
            "accumulation": 2,
            "optimizer": {"learning_rate": 1e-2},
            "evaluation": {"every": 3},
            **others,
        }
    )


def _base(inputs: Path, settings: dict[str, Any]) -> dict[str, str]:
    name, dtype = settings["base"], settings.get("dtype", "float32")
    return {"name": str(inputs / name), "dtype": dtype, "device": "cpu"}


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what depends on the machine."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in row.items() if key not in _TIMES} for row in rows]


def _peft(inputs: Path, scratch: Path, name: str) -> tuple[dict[str, Any], Tensors]:
    """Load a PEFT folder, merge and unmerge it, save it again, and take it off."""
    base, _ = PEFT_FOLDERS[name]
    model, ids = load_model(inputs / base), example_ids()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapters = lorakit.load(model, inputs / "peft" / name)
    with torch.no_grad():
        loaded = model(input_ids=ids).logits
        adapters.merge()
        merged = model(input_ids=ids).logits
        adapters.unmerge()
    adapters.save(scratch / "saved")
    adapters.detach()
    after = model.state_dict()
    of_peft = load_file(inputs / "peft" / f"{name}.safetensors")["logits"]
    values = {
        "agrees with PEFT": bool(torch.allclose(loaded, of_peft, rtol=1e-5, atol=1e-5)),
        "merged agrees": bool(torch.allclose(merged, of_peft, rtol=1e-5, atol=1e-5)),
        "base restored": before.keys() == after.keys()
        and all(torch.equal(before[key], after[key]) for key in before),
        "adapter_config.json": json.loads(
            (scratch / "saved" / "adapter_config.json").read_text(encoding="utf-8")
        ),
    }
    saved = _named_tensors({"saved": scratch / "saved"})
    return values, {"logits": loaded, "merged logits": merged, **saved}


def _named_tensors(folders: dict[str, Path]) -> Tensors:
    """Return the tensors in the safetensors files of folders, each with the name of its folder and file."""
    return {
        f"{name}/{path.stem}/{key}": tensor
        for name, folder in folders.items()
        for path in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }

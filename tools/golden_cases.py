"""The golden cases. Each returns what is compared: values for JSON, and tensors. They use lorakit as its users do."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib
import io
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import (
    ExitStack,
    closing,
    contextmanager,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from golden_inputs import PEFT_FOLDERS, example_ids, load_model
from safetensors.torch import load_file

import lorakit
from lorakit.cli import main

_TIMES = ("seconds", "tokens_per_second", "peak_memory", "time", "memory")
"""Fields of metrics.jsonl that depend on the machine."""
_OF_HISTORY = ("created", "loaded", "digest", "cached_tokens")
"""Fields of answers that depend on the time, or on the requests before."""

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

PARSERS = ("lorakit.cli.parsing:build",)
"""Functions whose result is the configuration of a command line, as MODULE:NAME; those that exist are intercepted."""


@contextmanager
def cases(inputs: Path) -> Iterator[dict[str, Case]]:
    """Yield all cases by name."""

    commands = _read_table("golden_commands.yaml")
    servers = _read_table("golden_requests.yaml")
    with ExitStack() as stack, tempfile.TemporaryDirectory() as temporary:

        @functools.cache
        def address(server: str) -> str:
            return stack.enter_context(_serving(inputs, Path(temporary), server))

        yield {
            **{f"runs/{name}": partial(_run, inputs, name) for name in RUNS},
            **{f"peft/{name}": partial(_peft, inputs, name) for name in PEFT_FOLDERS},
            **{f"commands/{n}": partial(_command, inputs, line) for n, line in commands.items()},
            **{
                f"requests/{name}": partial(_requests, partial(address, server), request)
                for server, requests in servers.items()
                for name, request in requests.items()
            },
        }


def _read_table(name: str) -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8"))


def _run(inputs: Path, name: str, scratch: Path) -> tuple[dict[str, Any], Tensors]:
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


def _peft(inputs: Path, name: str, scratch: Path) -> tuple[dict[str, Any], Tensors]:
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


class _Parsed(BaseException):
    """Ends a command once its configuration is known. No command catches it, as it is no `Exception`."""

    def __init__(self, config: Any) -> None:
        self.config = config


@contextmanager
def _intercepted_parsers() -> Iterator[None]:
    """Let the functions of `PARSERS` raise `_Parsed` with what they return."""
    patches = []
    for location in PARSERS:
        module, name = location.split(":")
        with suppress(ImportError):
            home = importlib.import_module(module)
            patches.append((home, name, getattr(home, name)))
    assert patches, f"none of {PARSERS} exists; write the name of the present parser there"

    def parsing(original: Callable[..., Any]) -> Callable[..., Any]:
        def parse(*arguments: Any, **options: Any) -> Any:
            raise _Parsed(original(*arguments, **options))

        return parse

    for home, name, original in patches:
        setattr(home, name, parsing(original))
    try:
        yield
    finally:
        for home, name, original in patches:
            setattr(home, name, original)


def _command(inputs: Path, line: str, scratch: Path) -> tuple[dict[str, Any], Tensors]:
    """Return the configuration that a command line gives, or its exit status, with what it prints."""
    values: dict[str, Any] = {}
    printed = io.StringIO()
    before = Path.cwd()
    os.chdir(inputs / "commands")
    try:
        with _intercepted_parsers(), redirect_stdout(printed), redirect_stderr(printed):
            values["status"] = main(shlex.split(line))
    except _Parsed as parsed:
        values["config"] = dataclasses.asdict(parsed.config)
    except SystemExit as end:
        values["status"] = end.code
    finally:
        os.chdir(before)
    return {**values, "message": printed.getvalue().splitlines()}, {}


@contextmanager
def _serving(inputs: Path, scratch: Path, server: str) -> Iterator[str]:
    """Run a server of adapters; yield its address."""
    base, adapters = inputs / "llama", inputs / "served"
    if server == "classes":
        base, adapters = inputs / "roberta", scratch / "classifiers"
        lorakit.train(_train_config(inputs, adapters / "run", **RUNS["classifier"]))
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"base.name": base, "base.dtype": "float32", "adapters": adapters, "port": port}
    options |= {"served_name": "base", "cache_memory": "50MB", "allow_loading": "true"}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    address, source = f"http://127.0.0.1:{port}", Path(lorakit.__file__).parents[1]
    log = scratch / f"{server}.txt"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "lorakit", "serve", *words],
            env={**os.environ, "PYTHONPATH": str(source)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(600):
            with suppress(urllib.error.URLError):
                urllib.request.urlopen(f"{address}/health").close()
                break
            assert process.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _requests(
    address: Callable[[], str], request: Any, scratch: Path
) -> tuple[dict[str, Any], Tensors]:
    """Return the answers to one request, to several in turn, or to several at once."""
    url = address()
    if not isinstance(request, dict):
        return _answer(url, request), {}
    if "sequence" in request:
        answers = [_answer(url, step) for step in request["sequence"]]
    else:
        steps = request["parallel"]
        with concurrent.futures.ThreadPoolExecutor(len(steps)) as threads:
            answers = list(threads.map(partial(_answer, url), steps))
    return {"message": [answer.pop("message", None) for answer in answers], "answers": answers}, {}


def _answer(address: str, request: str | list[Any]) -> dict[str, Any]:
    """Send a request; return status, receipt and body, without times."""
    path, body = (request, None) if isinstance(request, str) else request
    content = body if body is None or isinstance(body, str) else json.dumps(body)
    headers = {"content-type": "application/json", "x-request-id": "golden"}
    data = None if content is None else content.encode()
    try:
        answer = urllib.request.urlopen(urllib.request.Request(address + path, data, headers))
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        text, kind = answer.read().decode(), answer.headers.get("content-type", "")
    values: dict[str, Any] = {"status": answer.status, "type": kind}
    values |= {k: v for k, v in answer.headers.items() if k.startswith("x-lorakit-")}
    if kind.startswith("text/event-stream"):
        values["stream"] = _stream(text)
    elif path == "/metrics":
        values["metrics"] = [
            line for line in text.splitlines() if line.startswith("# TYPE lorakit")
        ]
    elif kind.startswith("application/json"):
        values["body"] = _timeless(json.loads(text))
    if path == "/v1/classify":  # the time of its training is in the digest of the adapter
        values.pop("x-lorakit-adapter", None)
        values["body"].pop("system_fingerprint", None)
    if answer.status >= 400:
        values["message"] = values["body"]["error"].pop("message")
    return values


def _stream(text: str) -> dict[str, Any]:
    """Return the text of a stream in one piece, since its pieces depend on time, and what else its events have."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    events = [_timeless(json.loads(line)) for line in lines if line != "[DONE]"]
    choices = [choice for event in events for choice in event["choices"]]
    texts = [
        choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices
    ]
    return {
        "text": "".join(texts),
        "reasons": [c["finish_reason"] for c in choices if c["finish_reason"]],
        "usage": [event["usage"] for event in events if event.get("usage")],
        "fields": sorted({key for event in events for key in event}),
        "end": lines[-1],
    }


def _timeless(value: Any) -> Any:
    """Return JSON without what depends on the time, and on the requests before."""
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in _OF_HISTORY}
    return [_timeless(item) for item in value] if isinstance(value, list) else value

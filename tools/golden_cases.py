"""The golden cases. Each returns what is compared: values for JSON, and tensors. They use lorakit as its users do."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import pkgutil
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import torch
import yaml
from golden_inputs import PEFT_FOLDERS, example_ids, load_model
from safetensors.torch import load_file

import lorakit
from lorakit.cli import main

PARSERS = ("lorakit.cli.parsing:build",)
"""Functions that return the configuration of a command line, as MODULE:NAME. Those that exist are intercepted, so that
a command stops there."""

OF_MACHINE = ("seconds", "tokens_per_second", "peak_memory", "time", "memory")
"""Fields of metrics.jsonl that depend on the machine."""
OF_HISTORY = ("created", "loaded", "digest", "cached_tokens")
"""Fields of answers that depend on the time, or on earlier requests."""

Values = dict[str, Any]
Tensors = dict[str, torch.Tensor]
Case = Callable[[Path], tuple[Values, Tensors]]
"""Gets an empty folder for its files."""


@contextlib.contextmanager
def cases(inputs: Path) -> Iterator[dict[str, Case]]:
    """Yield all cases by name."""
    runs, commands, servers = map(_read_table, ("runs", "commands", "requests"))
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:

        @functools.cache
        def client(server: str) -> httpx.Client:
            folder, classifier = Path(scratch), _train_config(inputs, runs["classifier"])
            return stack.enter_context(_serving(inputs, folder, server, classifier))

        yield {
            **{f"runs/{name}": partial(_run, inputs, run) for name, run in runs.items()},
            **{f"peft/{name}": partial(_peft, inputs, name) for name in PEFT_FOLDERS},
            **{f"commands/{n}": partial(_command, inputs, line) for n, line in commands.items()},
            **{
                f"requests/{name}": partial(_request, partial(client, server), request)
                for server, requests in servers.items()
                for name, request in requests.items()
            },
        }


def _read_table(name: str) -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name(f"golden_{name}.yaml").read_text())


# --- runs and PEFT folders -----------------------------------------------------------------------------


def _run(inputs: Path, run: Values, scratch: Path) -> tuple[Values, Tensors]:
    """Train a few steps, and use the adapter."""
    config = _train_config(inputs, run)
    folder, adapter = scratch / "run", scratch / "run" / "adapter"
    lorakit.train(dataclasses.replace(config, output=str(folder)))
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    values: Values = {
        "config": yaml.safe_load((folder / "config.yaml").read_text()),
        "metrics": [{k: v for k, v in row.items() if k not in OF_MACHINE} for row in rows],
        "adapter files": sorted(path.name for path in adapter.iterdir()),
    }
    if (adapter / "adapter_config.json").exists():
        values["adapter_config.json"] = json.loads((adapter / "adapter_config.json").read_text())
    opened: Values = {"adapter": str(adapter), "base": config.base}
    scored = lorakit.evaluate(
        lorakit.EvaluateConfig(
            **opened, data={"test": config.data.validation}, decoding={"max_new_tokens": 6}
        )
    )
    values |= {"scores": scored.scores, "outputs": scored.outputs}
    if config.data.task == "classification":
        new = {"test": str(inputs / "data" / "unlabelled.jsonl")}
        output = str(scratch / "predicted.jsonl")
        predicted = lorakit.predict(lorakit.PredictConfig(**opened, data=new, output=output))
        values["predicted"] = predicted.rows
    tensors = _tensors(adapter)
    if run.get("merge"):
        merged = scratch / "merged"
        values["merge"] = main(["merge", str(adapter), str(merged), "--base.dtype", "float32"])
        tensors |= _tensors(merged)
    return values, tensors


def _train_config(inputs: Path, run: Values) -> lorakit.TrainConfig:
    """Return six steps of two batches, with a validation score before, between and after."""
    settings = {"base": "llama", "data": "pairs", "task": "auto", "dtype": "float32", **run}
    settings.pop("merge", None)
    name, data, task, dtype = (settings.pop(key) for key in ("base", "data", "task", "dtype"))
    train, validation = (str(inputs / "data" / f"{data}{end}.jsonl") for end in ("", "-test"))
    return lorakit.TrainConfig(
        base={"name": str(inputs / name), "dtype": dtype, "device": "cpu"},
        data={"train": train, "validation": validation, "task": task},
        output="run",
        max_steps=6,
        batch_size=4,
        accumulation=2,
        optimizer={"learning_rate": 1e-2},
        evaluation={"every": 3},
        **settings,
    )


def _peft(inputs: Path, name: str, scratch: Path) -> tuple[Values, Tensors]:
    """Load a PEFT folder, merge and unmerge it, save it again, and take it off."""
    base, _ = PEFT_FOLDERS[name]
    model, ids = load_model(inputs / base), example_ids()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapters = lorakit.load(model, inputs / "peft" / name)
    with torch.no_grad():
        tensors = {"logits": model(input_ids=ids).logits}
        adapters.merge()
        tensors["merged logits"] = model(input_ids=ids).logits
        adapters.unmerge()
    adapters.save(scratch)
    adapters.detach()
    after = model.state_dict()
    of_peft = load_file(inputs / "peft" / f"{name}.safetensors")["logits"]
    values = {
        f"{key} are PEFT's": bool(torch.allclose(found, of_peft, rtol=1e-5, atol=1e-5))
        for key, found in tensors.items()
    }
    is_same = [torch.equal(tensor, after[key]) for key, tensor in before.items()]
    values["base restored"] = before.keys() == after.keys() and all(is_same)
    values["saved"] = json.loads((scratch / "adapter_config.json").read_text())
    return values, {**tensors, **_tensors(scratch)}


def _tensors(folder: Path) -> Tensors:
    """Return the tensors in the safetensors files of a folder, each with the name of its file."""
    return {
        f"{path.stem}/{key}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


# --- command lines -------------------------------------------------------------------------------------


class _Parsed(BaseException):
    """Ends a command once its configuration is known. No command catches it, as it is no `Exception`."""


def _parse(parser: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    raise _Parsed(parser(*arguments, **options))


def _command(inputs: Path, line: str, scratch: Path) -> tuple[Values, Tensors]:
    """Return the configuration that a command line gives, or its exit status, with what it prints."""
    values: Values = {}
    printed = io.StringIO()
    before = Path.cwd()
    os.chdir(inputs / "commands")
    try:
        with (
            contextlib.ExitStack() as stack,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            for location in PARSERS:
                with contextlib.suppress(ImportError, AttributeError):
                    parse = partial(_parse, pkgutil.resolve_name(location))
                    stack.enter_context(mock.patch(location.replace(":", "."), parse))
            values["status"] = main(shlex.split(line))
    except _Parsed as parsed:
        values["config"] = dataclasses.asdict(parsed.args[0])
    except SystemExit as end:
        values["status"] = end.code
    finally:
        os.chdir(before)
    return {**values, "message": printed.getvalue().splitlines()}, {}


# --- requests ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _serving(
    inputs: Path, scratch: Path, server: str, classifier: lorakit.TrainConfig
) -> Iterator[httpx.Client]:
    """Run a server of adapters; yield a client."""
    base, adapters = inputs / "llama", inputs / "served"
    if server == "classes":
        base, adapters = inputs / "roberta", scratch / "adapters"
        lorakit.train(dataclasses.replace(classifier, output=str(adapters / "run")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"base.name": base, "base.dtype": "float32", "adapters": adapters, "port": port}
    options |= {"served_name": "base", "cache_memory": "50MB", "allow_loading": "true"}
    words = [f"--{name}={value}" for name, value in options.items()]
    environment = {**os.environ, "PYTHONPATH": str(Path(lorakit.__file__).parents[1])}
    log = scratch / f"{server}.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "lorakit", "serve", *words],
            **{"env": environment, "stdout": output, "stderr": subprocess.STDOUT},
        )
    try:
        headers = {"x-request-id": "golden", "content-type": "application/json"}
        address = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=address, headers=headers, timeout=60) as client:
            for _ in range(600):
                with contextlib.suppress(httpx.ConnectError):
                    client.get("/health")
                    break
                if process.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.1)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def _request(
    client: Callable[[], httpx.Client], request: Any, scratch: Path
) -> tuple[Values, Tensors]:
    """Return the answers to one request, to several in turn, or to several at once."""
    answer = partial(_answer, client())
    if not isinstance(request, dict):
        return answer(request), {}
    if "sequence" in request:
        answers = [*map(answer, request["sequence"])]
    else:
        with ThreadPoolExecutor() as threads:
            answers = [*threads.map(answer, request["parallel"])]
    return {"message": [a.pop("message", None) for a in answers], "answers": answers}, {}


def _answer(client: httpx.Client, request: str | list[Any]) -> Values:
    """Send a request; return status, receipt and body."""
    if isinstance(request, str):
        path, answer = request, client.get(request)
    else:
        path, body = request
        answer = client.post(path, content=body if isinstance(body, str) else json.dumps(body))
    kind = answer.headers.get("content-type", "")
    values: Values = {"status": answer.status_code, "type": kind}
    values |= {k: v for k, v in answer.headers.items() if k.startswith("x-lorakit-")}
    if kind.startswith("text/event-stream"):
        values["stream"] = _stream(answer.text)
    elif path == "/metrics":
        values["metrics"] = [line for line in answer.text.splitlines() if "# TYPE" in line]
    elif kind.startswith("application/json"):
        values["body"] = _lasting(answer.json())
    if path == "/v1/classify":  # the digest of its adapter covers the time of the training
        values.pop("x-lorakit-adapter", None)
        values["body"].pop("system_fingerprint", None)
    if answer.is_error:
        values["message"] = values["body"]["error"].pop("message")
    return values


def _stream(text: str) -> Values:
    """Return the text of a stream in one piece, since its pieces depend on time, and what else its events have."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    events = [_lasting(json.loads(line)) for line in lines if line != "[DONE]"]
    choices = [choice for event in events for choice in event["choices"]]
    pieces = [c["text"] if "text" in c else c["delta"].get("content") for c in choices]
    return {
        "text": "".join(piece or "" for piece in pieces),
        "reasons": [c["finish_reason"] for c in choices if c["finish_reason"]],
        "usage": [event["usage"] for event in events if event.get("usage")],
        "fields": sorted({key for event in events for key in event}),
        "end": lines[-1],
    }


def _lasting(value: Any) -> Any:
    """Return JSON without the fields of `OF_HISTORY`."""
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if key not in OF_HISTORY}
    return [*map(_lasting, value)] if isinstance(value, list) else value

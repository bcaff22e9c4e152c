"""A whole server on tiny models, and what their adapters say alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from random_adapters import randomise

import lorakit
from lorakit.cli import serve
from lorakit.models.base_config import BaseConfig
from lorakit.serving.opening import Opened, open_all
from lorakit.serving.serve_config import ServeConfig

LABELS = {"three": ["a", "b", "c"], "two": ["no", "yes"], "score": []}


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(
    base: Path, folder: Path, method: Any, *, seed: int, head: Any, **provenance: Any
) -> None:
    opened = lorakit.load_base(base, dtype="float32", **head)
    handle = lorakit.attach(opened.model, method, name="x", seed=seed)
    randomise(handle, scale=0.3, seed=seed)
    handle.save(folder, provenance=provenance, overwrite=True)


@contextlib.contextmanager
def served(
    folder: Path, *, report: Any = lambda receipt, verdict: None, keys: Any = None, **settings: Any
) -> Iterator[tuple[TestClient, Opened]]:
    config = ServeConfig(
        base=BaseConfig(name=str(folder / "base"), dtype="float32"),
        adapters=str(folder / "adapters"),
        cache_memory="20MB",
        adapter_memory="10MB",
        **settings,
    )
    opened = open_all(config, report)
    app = serve.app_of(config, opened, keys)
    opened.engine.start()
    try:
        with TestClient(app, base_url="http://localhost") as client:
            yield client, opened
    finally:
        assert opened.engine.close(10)


def post(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def alone(folder: Path, adapter: Any, prompt: str, count: int) -> list[int]:
    """Return the greedy continuation by `generate` on a base of its own."""
    opened = lorakit.load_base(folder / "base", dtype="float32")
    names = {} if adapter is None else {adapter: 1.0} if isinstance(adapter, str) else adapter
    for name in names:
        handle = lorakit.load(opened.model, folder / "adapters" / name, name=name)
    if names:
        handle.activate(names)
    ids = opened.tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = opened.model.generate(ids, max_new_tokens=count, do_sample=False)
    return out[0, ids.shape[1] :].tolist()

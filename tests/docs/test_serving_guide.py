"""The guide to serving: its server starts as shown, and its requests get answers of the shown form."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

import made
import pages
import pytest
import uvicorn
from outputs import difference
from walk import words

from lorakit.cli import serve
from lorakit.cli.parsing import parse
from lorakit.serving.engine import EngineStatus
from lorakit.serving.http.keys import read_keys
from lorakit.serving.http.metrics import Metrics
from lorakit.serving.loaded import StoreStats
from lorakit.serving.opening import open_all
from lorakit.serving.serve_config import ServeConfig

PAGE = "docs/guides/serving.md"
ADDRESS = "http://127.0.0.1:8000"


def steps(start: str) -> list[pages.Step]:
    return [step for step in pages.steps(PAGE, pages.read(PAGE)) if step.text.startswith(start)]


@pytest.fixture
def server(reader: Callable[[str], Path]) -> Iterator[tuple[str, str]]:
    """Start the page's server on a free port; return its address and what it prints."""
    reader(PAGE)
    for seed, name in enumerate(("e2e", "sql")):
        made.adapter(f"out/adapters/{name}", seed=seed)
    (step,) = steps("lorakit serve ")
    more = ["--cache_memory", "20MB", "--allow_loading", "true"]
    config = parse(ServeConfig, "serve", "", [*words(step.text)[2:], *more])
    opened = open_all(config, lambda verdict: None)
    opened.engine.start()
    app = serve.app_of(config, opened, keys=None)
    with socket.create_server(("127.0.0.1", 0)) as listener, redirect_stdout(StringIO()) as printed:
        serve._greet(config, listener, opened)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", printed.getvalue()
        server.should_exit = True
        thread.join(10)
    assert opened.engine.close(10)


def shape(value: Any) -> Any:
    """Return the keys of JSON, with types in place of values; a list by its first item."""
    if isinstance(value, dict):
        free = {"details"}  # a description of the adapter
        return {key: ... if key in free else shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return (
        "text" if isinstance(value, str) else "number" if isinstance(value, int | float) else value
    )


@pytest.mark.slow
def test_the_page(server: tuple[str, str]) -> None:
    address, printed = server
    (step,) = steps("lorakit serve ")
    assert difference(step.output, printed.replace(address, ADDRESS).splitlines()) == ""
    requests = steps("curl ")
    assert len(requests) == 5
    for request in requests:
        command = words(request.text.replace(ADDRESS, address))
        done = subprocess.run([*command, "-s"], capture_output=True, text=True, check=True)
        answer = json.loads(done.stdout)
        assert shape(answer) == shape(json.loads("\n".join(request.output))), request.text
    (code,) = steps("from openai")
    exec(compile(code.text.replace(ADDRESS, address), PAGE, "exec"), {})


def test_the_list_for_vllm_has_adapters_and_runs(tmp_path: Path) -> None:
    folder = tmp_path / "out/adapters"
    for name in ("e2e", "run/adapter", "other"):
        (folder / name).mkdir(parents=True)
        if name != "other":
            (folder / name / "adapter_config.json").touch()
    (step,) = steps("modules=")
    script = f'{step.text}\nprintf "%s\\n" $modules'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [f"e2e={folder}/e2e", f"run={folder}/run/adapter"]


def test_the_limits_are_those_of_the_code() -> None:
    text = pages.read(PAGE)
    table = text[text.index("| Option | Default | Status |") :].split("\n\n")[0]
    rows = [row.split(" | ") for row in table.splitlines()[2:]]
    shown = {}
    for names, values, _ in rows:
        for name, value in zip(re.findall(r"`(max_\w+)`", names), values.split(", "), strict=False):
            shown[name] = value
    known = {f.name: f.default for f in fields(ServeConfig) if f.name.startswith("max_")}
    assert known.keys() - shown.keys() == {"max_running"}  # no request exceeds it
    for name, value in shown.items():
        assert known[name] is None or value == f"{known[name]:g}" or value == str(known[name]), name


def test_every_route_and_series_is_on_the_page() -> None:
    text = pages.read(PAGE)
    status = EngineStatus(True, running=0, waiting=0, cache_used=0.0, steps=0, tokens=0)
    stats = StoreStats(loaded=0, bytes=0, budget=0, loads=0, evictions=0, leases=0)
    series = {
        f"{family.name}{'_total' if family.type == 'counter' else ''}"
        for family in Metrics(lambda: status, lambda: stats).registry.collect()
    }
    assert [name for name in series if f"`{name}`" not in text] == []


def test_the_file_of_keys_is_valid(tmp_path: Path) -> None:
    (step,) = (s for s in pages.steps(PAGE, pages.read(PAGE)) if s.kind == "file")
    (tmp_path / step.file).write_text(step.text)
    keys = read_keys(tmp_path / step.file).keys
    assert [(key.name, key.operator) for key in keys] == [("team-a", False), ("operations", True)]
    assert keys[0].allows("e2e-new")
    assert not keys[0].allows("sql")

"""`lorakit serve`."""

from __future__ import annotations

import importlib.util
import json
import logging
import signal
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from lorakit.cli.parsing import parse
from lorakit.errors import ConfigurationError
from lorakit.formatting import counted, shell_command, visible
from lorakit.serving.serve_config import ServeConfig

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lorakit.serving.engine import Receipt
    from lorakit.serving.http.keys import KeyRing
    from lorakit.serving.opening import Opened
    from lorakit.serving.verification import Verdict

CONFIGS = (ServeConfig,)

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def run(argv: Sequence[str]) -> int:
    """Serve many adapters from one base, until a signal."""
    config = parse(
        ServeConfig,
        "serve",
        "Serve a base and many adapters with an OpenAI-compatible API, in mixed batches. Each request names its "
        "adapter, or a blend of several. Ctrl-C or SIGTERM finishes what runs, then ends; a second one ends at once.",
        argv,
    )
    require_packages()
    from lorakit.serving.http.keys import read_keys

    keys = None if config.keys is None else read_keys(config.keys)
    with _listener(config) as listener:  # before the base, which takes longer to open
        return _serve(config, listener, keys)


def require_packages() -> None:
    """Raise a ConfigurationError if a package of the server is not installed."""
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigurationError(
            f"lorakit serve needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
            'Install them: pip install "lorakit[serve]".'
        )


def app_of(config: ServeConfig, opened: Opened, keys: KeyRing | None) -> FastAPI:
    """Return the application with the options of `config`."""
    from lorakit.serving.http.app import create_app

    return create_app(
        opened.engine,
        opened.store,
        config,
        base_name=opened.name,
        keys=keys,
        verifier=opened.verifier,
    )


def _serve(config: ServeConfig, listener: socket.socket, keys: KeyRing | None) -> int:
    from lorakit.models.processor import in_own_thread
    from lorakit.serving.http.metrics import model_label
    from lorakit.serving.http.running import run as run_server
    from lorakit.serving.opening import open_all

    failed: list[Verdict] = []

    def report(receipt: Receipt, verdict: Verdict | None) -> None:
        app.state.serving.metrics.verified(model_label(receipt, opened.name), verdict)
        if verdict is not None and not verdict.agrees and config.verify_stops and not failed:
            failed.append(verdict)
            if not app.state.serving.is_draining:  # a second signal would cut the running answers
                # On Windows, os.kill would end the process without its handler.
                signal.raise_signal(signal.SIGTERM)

    opened = in_own_thread(lambda: open_all(config, report))
    app = app_of(config, opened, keys)
    logging.getLogger("lorakit").setLevel(logging.INFO)
    opened.engine.start()
    try:
        run_server(
            app,
            listener,
            started=lambda: _greet(config, listener, opened),
            access_log=config.access_log,
        )
    finally:
        opened.engine.close(timeout=10)
    if failed:
        print("lorakit serve: stopped, because an answer failed its verification.", file=sys.stderr)
    return int(bool(failed))


def _listener(config: ServeConfig) -> socket.socket:
    """Return a socket bound to the address, or raise a ConfigurationError if the machine cannot listen there."""
    listener = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    try:
        # On Windows, SO_REUSEADDR would share the port with a server that already listens on it.
        option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
        listener.setsockopt(socket.SOL_SOCKET, option, 1)
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"Cannot listen on {config.host}, port {config.port}: {error.strerror or error}. Choose another --port or "
            "--host."
        ) from None
    return listener


def _greet(config: ServeConfig, listener: socket.socket, opened: Opened) -> None:
    """Print where the server is, what it serves, and a command to try. Open the playground if asked."""
    from lorakit.models.dtypes import dtype_name
    from lorakit.serving.classifying import ClassifyingEngine

    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{host}:{listener.getsockname()[1]}"
    names, model = opened.store.names(), opened.base.model
    dtype = dtype_name(model.dtype)
    print(
        visible(
            f"lorakit serve: {address}, base {opened.name} ({dtype}, {model.device}), {opened.engine.name} "
            f"engine, {counted(len(names), 'adapter')}"
        )
    )
    for notice in filter(None, (opened.engine.notice, opened.memory_notice)):
        print(visible(f"note: {notice}"), file=sys.stderr)
    print(f"playground: {address}")
    name = names[0] if names else opened.name
    is_text = not isinstance(opened.engine, ClassifyingEngine)
    route = "completions" if is_text else "classify"
    body = {"model": name, "prompt" if is_text else "input": "Hello"}
    curl = shell_command(["curl", f"{address}/v1/{route}"])
    key = ' -H "Authorization: Bearer $KEY"' if config.keys else ""
    content = shell_command(["-H", "Content-Type: application/json", "-d", json.dumps(body)])
    print(visible(f"{curl}{key} {content}"), flush=True)
    if config.open:
        # A browser in the terminal runs until it is closed, and the server must answer it.
        state = f"/#{urlencode({'mode': 'text', 'prompt': config.prompt})}" if config.prompt else ""
        threading.Thread(target=_open_playground, args=(address + state,), daemon=True).start()
    elif config.prompt:
        # No error: a file of settings for all commands may set the prompt of lorakit generate.
        print("note: prompt is for the playground that --open opens.", file=sys.stderr)


def _open_playground(address: str) -> None:
    """Open the playground in the default browser. The socket listens already, so the browser waits for the answer."""
    if not webbrowser.open(address):
        print(f"note: no browser was found. Open {address} yourself.", file=sys.stderr)

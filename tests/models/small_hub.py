"""A hub on this machine that serves folders as models."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import transformers.utils.hub
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The first commit of every model."""


class SmallHub:
    """What the hub serves.

    Attributes:
        models: Folders by hub id.
        commits: Commits of every model; the branch `main` and the tag `v1` are at the last.
        status: Status of every answer; None for the right answers.
        file_status: The same, of answers about files; 401 for those of a gated model.
        requests: Paths that were requested.
    """

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.commits = [COMMIT]
        self.status: int | None = None
        self.file_status: int | None = None
        self.requests: list[str] = []

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Return status, body and headers for a path."""
        self.requests.append(path)
        parts = path.strip("/").split("/")
        is_api = parts[0] == "api"
        name = "/".join(parts[2:4] if is_api else parts[:2])
        if status := self.status or (None if is_api else self.file_status):
            return status, b"{}", {"X-Error-Code": "GatedRepo"} if status == 401 else {}
        if name not in self.models:
            return 404, b"{}", {"X-Error-Code": "RepoNotFound"}
        folder = self.models[name]
        revision = parts[3] if not is_api else parts[5] if len(parts) > 5 else "main"
        commit = self.commits[-1] if revision in ("main", "v1") else revision
        if commit not in self.commits:
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
        if is_api:
            paths = (path for path in folder.rglob("*") if path.is_file())
            files = sorted(path.relative_to(folder).as_posix() for path in paths)
            body: Any = {"id": name, "sha": commit, "siblings": [{"rfilename": f} for f in files]}
            if "tree" in parts:  # of the folder itself, or of one inside it, which is empty
                files = files if len(parts) == 6 else []
                body = [{"type": "file", "path": f, "size": 1, "oid": "0" * 40} for f in files]
            return 200, json.dumps(body).encode(), {"Content-Type": "application/json"}
        file = folder.joinpath(*parts[4:])
        if not file.is_file():
            return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
        content = file.read_bytes()
        return 200, content, {"ETag": hashlib.sha1(content).hexdigest(), "X-Repo-Commit": commit}


@contextmanager
def small_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    """Serve a hub, and let the hub client of this process use it, with an empty cache, until `monkeypatch` ends."""
    hub = SmallHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            status, body, headers = hub.answer(unquote(urlsplit(self.path).path))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    settings = {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_CACHE": str(cache),
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    }
    huggingface_hub.close_session()  # the client reads the proxies once
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    try:
        yield hub
    finally:
        huggingface_hub.close_session()
        server.shutdown()
        server.server_close()

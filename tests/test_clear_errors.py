"""What goes wrong for everybody sooner or later: a clear error, and nothing left behind.

Every case goes through the face that a user meets, Python's or the command line's. The error is
lorakit's own and names what was found and what to write instead; the command ends with status 1
and no traceback. No folder gains, loses or changes a file, and no model a tensor or a hook.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import yaml
from random_adapters import randomise
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor, nn

import lorakit
from lorakit import storage
from lorakit.adapters import formats, handle_of
from lorakit.cli import main
from lorakit.errors import (
    AdapterFileError,
    BaseModelError,
    ConfigurationError,
    DataError,
    LorakitError,
    RunFolderError,
    TargetError,
    WrongBaseError,
)
from lorakit.evaluation.config import BaseConfig, Decoding
from lorakit.evaluation.generate import generate
from lorakit.training import checkpoint
from lorakit.training.config import CheckpointConfig
from lorakit.training.run_folder import JsonLines, RunResult

TENSORS, PEFT_CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "lorakit.json"
CONTEXT = 64
ROWS = [{"prompt": f"river {i}:", "completion": " pub"} for i in range(8)]
KEY = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"


# --- what a user has: a base, an adapter, data ----------------------------------------------------


def save_base(folder: Path, arch: str = "llama", **settings: Any) -> Path:
    """Write the tiny model of `arch` and a tokenizer, as a model folder."""
    tokenizer = tiny_tokenizer()
    model = tiny_models.build(arch, vocab_size=len(tokenizer), **settings)
    model.config.pad_token_id, model.config.eos_token_id = (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model folders: base; retrained, of the same shapes; wider."""
    folder = tmp_path_factory.mktemp("models")
    save_base(folder / "base")
    save_base(folder / "wider", intermediate_size=96)
    save_base(folder / "learned-positions", "gpt2")
    shutil.copytree(folder / "base", folder / "retrained")
    tensors = load_file(folder / "retrained" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += 0.1
    save_file(tensors, folder / "retrained" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def base(bases: Path) -> str:
    return str(bases / "base")


@pytest.fixture
def model(base: str) -> nn.Module:
    return lorakit.load_base(base, dtype="float32").model


@pytest.fixture(scope="module")
def saved(bases: Path) -> Path:
    """The user's adapter: a folder of lorakit's, which is one of PEFT's with a record beside it."""
    adapters = lorakit.attach(
        lorakit.load_base(bases / "base", dtype="float32").model, lorakit.LoRA(rank=2)
    )
    randomise(adapters)
    return adapters.save(bases / "adapter")


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


@pytest.fixture
def peft_folder(adapter: Path) -> Path:
    """The same from PEFT: no record, no checksums."""
    (adapter / RECORD).unlink()
    return adapter


@pytest.fixture
def loralib_file(saved: Path, tmp_path: Path) -> Path:
    formats.write_loralib(formats.read(saved), tmp_path / "lora.bin")
    return tmp_path / "lora.bin"


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_rows(tmp_path / "train.jsonl", ROWS)


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# --- what must hold after every error -------------------------------------------------------------


def listing(folder: Path) -> dict[str, str]:
    """Every path in `folder`, with a digest of what is there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def trace(model: nn.Module) -> tuple[dict[str, Tensor], list[tuple[Any, ...]], list[bool]]:
    """Everything that an adapter would change on a model."""
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
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
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
    """Runs commands that must fail, as a shell would show it."""

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


@pytest.fixture
def shell(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Shell:
    """A shell in an empty folder, so that relative paths and stray files land in it."""
    monkeypatch.chdir(tmp_path)
    return Shell(capsys, tmp_path)


# --- targets --------------------------------------------------------------------------------------

TARGETS = {
    "a misspelt name": ("q_prj", ["q_prj", "q_proj"]),
    "a misspelt role": ("attention.w", ["attention.w", "attention.q"]),
    "a pattern of nothing": (r"model\.layers\.9\..*", [r"layers\.9", "q_proj"]),
    "one of two": (("q_proj", "v_prj"), ["v_prj", "v_proj"]),
    "one of two roles": (("attention.q", "mlp.upp"), ["mlp.upp", "mlp.up"]),
    "a layer that takes none": ("input_layernorm", ["input_layernorm", "RMSNorm"]),
    "a pattern that takes in such a layer": (
        r".*\.(q_proj|input_layernorm)",
        ["input_layernorm", "RMSNorm"],
    ),
}


@pytest.mark.parametrize(("targets", "words"), TARGETS.values(), ids=TARGETS)
def test_target_that_matches_nothing_or_only_partly(
    targets: Any, words: list[str], model: nn.Module, tmp_path: Path
) -> None:
    with nothing_left(tmp_path, model), refused(TargetError, *words):
        lorakit.attach(model, lorakit.LoRA(targets=targets))


@pytest.mark.parametrize(
    "settings",
    [{"rank_pattern": {"q_prj": 4}}, {"alpha_pattern": {"q_prj": 4}}, {"train_modules": "q_prj"}],
    ids=lambda settings: next(iter(settings)),
)
def test_setting_for_a_layer_that_is_not_there(
    settings: dict[str, Any], model: nn.Module, tmp_path: Path
) -> None:
    with nothing_left(tmp_path, model), refused(LorakitError, "q_prj"):
        lorakit.attach(model, lorakit.LoRA(**settings))


@pytest.mark.parametrize("targets", ["q_prj", '["q_proj","q_prj"]'], ids=["nothing", "partly"])
def test_target_that_matches_nothing_in_a_run(
    targets: str, shell: Shell, base: str, data: str
) -> None:
    shell.refuses(
        f"train --base.name {base} --data.train {data} --output run --lora.targets {targets}",
        "q_prj",
        "Did you mean 'q_proj'?",
    )


# --- damaged files --------------------------------------------------------------------------------


def truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


DAMAGE = {
    "tensors cut off": lambda folder: truncate(folder / TENSORS, 0.9),
    "tensors cut off in the header": lambda folder: truncate(folder / TENSORS, 0.05),
    "tensors empty": lambda folder: truncate(folder / TENSORS, 0),
    "bit flipped in a tensor": lambda folder: flip(folder / TENSORS, -5),
    "bit flipped in the header": lambda folder: flip(folder / TENSORS, 80),
    "bit flipped in its length": lambda folder: flip(folder / TENSORS, 7, bit=6),
    "options cut off": lambda folder: truncate(folder / PEFT_CONFIG, 0.5),
    "bit flipped in the options": lambda folder: flip(folder / PEFT_CONFIG, 100),
    "record cut off": lambda folder: truncate(folder / RECORD, 0.5),
    "record empty": lambda folder: truncate(folder / RECORD, 0),
    "bit flipped in the record": lambda folder: flip(folder / RECORD, 300),
}


UNSEEN_WITHOUT_CHECKSUMS = ("bit flipped in a tensor", "bit flipped in the options")


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_adapter(damage: Any, adapter: Path, model: nn.Module, tmp_path: Path) -> None:
    damage(adapter)
    with nothing_left(tmp_path, model), refused(AdapterFileError, str(adapter)):
        lorakit.load(model, adapter)


@pytest.mark.parametrize(
    "damage",
    [name for name in DAMAGE if "record" not in name and name not in UNSEEN_WITHOUT_CHECKSUMS],
)
def test_damaged_adapter_without_checksums(
    damage: str, peft_folder: Path, model: nn.Module, tmp_path: Path
) -> None:
    DAMAGE[damage](peft_folder)
    with nothing_left(tmp_path, model), refused(AdapterFileError, str(peft_folder)):
        lorakit.load(model, peft_folder)


@pytest.mark.parametrize("name", [TENSORS, PEFT_CONFIG, RECORD])
def test_a_bit_flipped_anywhere(name: str, adapter: Path) -> None:
    """No file that a lorakit folder is read from may change unseen."""
    path = adapter / name
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole)
        flip(path, position, bit=position % 8)
        with refused(AdapterFileError, str(adapter)):
            formats.read(adapter)
    path.write_bytes(whole)
    assert formats.read(adapter).layers


@pytest.mark.parametrize("damage", ["cut off", "bit flipped"])
def test_damaged_loralib_file(
    damage: str, loralib_file: Path, model: nn.Module, tmp_path: Path
) -> None:
    A = formats.read(loralib_file, alpha=4).layers["model.layers.0.self_attn.q_proj"].A
    if damage == "cut off":
        truncate(loralib_file, 0.9)
    else:
        flip(loralib_file, loralib_file.read_bytes().index(A.numpy().tobytes()) + 7)
    with nothing_left(tmp_path, model), refused(AdapterFileError, str(loralib_file)):
        lorakit.load(model, loralib_file, alpha=4)


COMMANDS_ON_AN_ADAPTER = {
    "inspect": "inspect adapter",
    "generate": "generate --adapter adapter --base.name {base} --prompt river",
    "evaluate": "evaluate --adapter adapter --base.name {base} --data.train {data} --split validation"
    " --data.validation {data}",
    "merge": "merge adapter merged --base.name {base}",
    "convert": "convert adapter converted",
    "train": "train --from_adapter adapter --base.name {base} --data.train {data} --output run",
}


@pytest.mark.parametrize("command", COMMANDS_ON_AN_ADAPTER.values(), ids=COMMANDS_ON_AN_ADAPTER)
def test_damaged_adapter_in_every_command(
    command: str, shell: Shell, adapter: Path, base: str, data: str
) -> None:
    flip(adapter / TENSORS, -5)
    shell.refuses(
        command.format(base=base, data=data), f"adapter/{TENSORS}", "damaged", "fetch or save"
    )


# --- wrong base -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "words"), [("retrained", ["weights"]), ("wider", ["shapes"])], ids=str
)
def test_wrong_base(
    other: str, words: list[str], adapter: Path, bases: Path, tmp_path: Path
) -> None:
    model = lorakit.load_base(bases / other, dtype="float32").model
    with (
        nothing_left(tmp_path, model),
        refused(WrongBaseError, "base", other, "allow_other_base", *words),
    ):
        lorakit.load(model, adapter)


@pytest.mark.parametrize("command", ["generate", "evaluate", "merge", "train"])
def test_wrong_base_in_every_command(
    command: str, shell: Shell, adapter: Path, bases: Path, data: str
) -> None:
    line = COMMANDS_ON_AN_ADAPTER[command].format(base=bases / "retrained", data=data)
    shell.refuses(line, "base", "retrained", "allow_other_base")


# --- missing and surplus keys ---------------------------------------------------------------------


def drop(*keys: str) -> Any:
    return lambda tensors: [tensors.pop(key) for key in keys]


def add(key: str, shape: tuple[int, ...]) -> Any:
    return lambda tensors: tensors.update({key: torch.ones(shape)})


def narrow(key: str) -> Any:
    return lambda tensors: tensors.update({key: tensors[key][:, :-1].contiguous()})


Q0_A, Q0_B = KEY.format(0, "q_proj", "A"), KEY.format(0, "q_proj", "B")
CHANGED_KEYS = {
    "a factor missing": (drop(Q0_B), ["layers.0.self_attn.q_proj", "lora_B"]),
    "a layer missing": (drop(Q0_A, Q0_B), ["layers.0.self_attn.q_proj"]),
    "everything missing": (lambda tensors: tensors.clear(), [TENSORS]),
    "half a layer too many": (add(KEY.format(7, "q_proj", "A"), (2, 32)), ["layers.7", "lora_B"]),
    "a stranger": (add("base_model.model.score.bias", (3,)), ["score.bias"]),
    "a misspelt key": (add(Q0_A.replace("lora_A", "lora_C"), (2, 32)), ["lora_C"]),
    "a factor of another width": (narrow(Q0_A), ["q_proj", "31", "32"]),
    "a factor of another height": (narrow(Q0_B), ["q_proj"]),
}


@pytest.mark.parametrize(("change", "words"), CHANGED_KEYS.values(), ids=CHANGED_KEYS)
def test_missing_and_surplus_keys(
    change: Any, words: list[str], peft_folder: Path, model: nn.Module, tmp_path: Path
) -> None:
    tensors = load_file(peft_folder / TENSORS)
    change(tensors)
    save_file(tensors, peft_folder / TENSORS)
    with nothing_left(tmp_path, model), refused(AdapterFileError, str(peft_folder), *words):
        lorakit.load(model, peft_folder)


def test_a_layer_too_many(peft_folder: Path, model: nn.Module, tmp_path: Path) -> None:
    tensors = load_file(peft_folder / TENSORS)
    for part in "AB":
        tensors[KEY.format(7, "q_proj", part)] = tensors[KEY.format(0, "q_proj", part)].clone()
    save_file(tensors, peft_folder / TENSORS)
    with nothing_left(tmp_path, model), refused(AdapterFileError, "layers.7", "model"):
        lorakit.load(model, peft_folder)


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_missing_and_surplus_keys_of_a_loralib_file(
    change: str, loralib_file: Path, model: nn.Module, tmp_path: Path
) -> None:
    tensors = torch.load(loralib_file, weights_only=True)
    key = next(key for key in tensors if key.endswith("lora_B"))
    if change == "missing":
        del tensors[key]
    else:
        key = "score.weight_of_nothing"
        tensors[key] = torch.ones(3)
    torch.save(tensors, loralib_file)
    with (
        nothing_left(tmp_path, model),
        refused(AdapterFileError, str(loralib_file), key.removesuffix(".lora_B")),
    ):
        lorakit.load(model, loralib_file, alpha=4)


@pytest.mark.parametrize(
    "change", [drop(Q0_B), add("score.bias", (3,))], ids=["missing", "surplus"]
)
@pytest.mark.parametrize("command", ["inspect", "generate", "merge", "convert"])
def test_missing_and_surplus_keys_in_commands(
    command: str, change: Any, shell: Shell, peft_folder: Path, base: str
) -> None:
    tensors = load_file(peft_folder / TENSORS)
    change(tensors)
    save_file(tensors, peft_folder / TENSORS)
    shell.refuses(COMMANDS_ON_AN_ADAPTER[command].format(base=base), f"adapter/{TENSORS}")


# --- code in a pickle -----------------------------------------------------------------------------


class Payload:
    """Unpickling this makes the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("hidden", ["alone", "beside tensors"])
@pytest.mark.parametrize("protocol", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("place", ["PEFT folder", "loralib file"])
def test_pickle_with_code_in_it(
    place: str, protocol: str, hidden: str, peft_folder: Path, model: nn.Module, tmp_path: Path
) -> None:
    payload: Any = Payload(tmp_path / "executed")
    if hidden == "beside tensors":
        payload = {**load_file(peft_folder / TENSORS), "more": payload}
    path = tmp_path / "lora.pt"
    if place == "PEFT folder":
        (peft_folder / TENSORS).unlink()
        path = peft_folder / "adapter_model.bin"
    if protocol == "plain":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=protocol == "zip")
    with nothing_left(tmp_path, model), refused(AdapterFileError, str(path)):
        lorakit.load(model, path if place == "loralib file" else peft_folder, alpha=4)


@pytest.mark.parametrize("command", ["inspect", "generate", "merge", "convert", "train"])
def test_pickle_with_code_in_it_in_every_command(
    command: str, shell: Shell, peft_folder: Path, base: str, data: str
) -> None:
    (peft_folder / TENSORS).unlink()
    torch.save({"a": Payload(shell.folder / "executed")}, peft_folder / "adapter_model.bin")
    shell.refuses(
        COMMANDS_ON_AN_ADAPTER[command].format(base=base, data=data),
        "adapter/adapter_model.bin",
        "code",
        "mkdir",
        "not opened",
        "safetensors",
    )


def test_base_model_in_a_pickle_with_code_in_it(shell: Shell, bases: Path) -> None:
    folder = shutil.copytree(bases / "base", shell.folder / "model")
    tensors = load_file(Path(folder, "model.safetensors"))
    Path(folder, "model.safetensors").unlink()
    payload = Payload(shell.folder / "executed")
    torch.save({**tensors, "more": payload}, Path(folder, "pytorch_model.bin"))
    with refused(BaseModelError, "model"):
        lorakit.load_base(folder)
    shell.refuses("generate --base.name model --prompt river", "model")


# --- rank, alpha, configuration -------------------------------------------------------------------

NUMBERS = {
    "rank 0": ({"rank": 0}, ["rank is 0", "1 or more"]),
    "rank negative": ({"rank": -8}, ["rank is -8", "1 or more"]),
    "alpha 0": ({"alpha": 0.0}, ["alpha is 0", "no", "effect", "2 * rank"]),
    "rank 0 somewhere": ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern['q_proj'] is 0"]),
    "alpha 0 somewhere": ({"alpha_pattern": {"q_proj": 0}}, ["alpha_pattern['q_proj'] is 0"]),
}


@pytest.mark.parametrize(("settings", "words"), NUMBERS.values(), ids=NUMBERS)
def test_rank_0_and_alpha_0(
    settings: dict[str, Any],
    words: list[str],
    model: nn.Module,
    shell: Shell,
    base: str,
    data: str,
) -> None:
    with nothing_left(shell.folder, model), refused(ConfigurationError, *words):
        lorakit.attach(model, lorakit.LoRA(**settings))
    Path("run.yaml").write_text(yaml.safe_dump({"lora": settings}))
    run = f"train --base.name {base} --data.train {data} --output run"
    shell.refuses(f"{run} --config run.yaml", *words)
    (name, value), *_ = settings.items()
    shell.refuses(f"{run} --lora.{name}={json.dumps(value).replace(' ', '')}", *words)


def test_rank_above_the_width(model: nn.Module, shell: Shell, base: str, data: str) -> None:
    """The layers are 32 wide, and v_proj, of two shared heads, gives 16."""
    with nothing_left(shell.folder, model):
        with refused(ConfigurationError, "rank 17", "v_proj", "16", "rank_pattern"):
            lorakit.attach(model, lorakit.LoRA(rank=17))
        with refused(ConfigurationError, "rank 33", "q_proj", "32", "rank_pattern"):
            lorakit.attach(model, lorakit.LoRA(rank_pattern={"q_proj": 33}))
    run = f"train --base.name {base} --data.train {data} --output run"
    shell.refuses(f"{run} --lora.rank 17", "rank 17", "v_proj", "16", "rank_pattern")


UNKNOWN_KEYS = {
    "at the top": ("epoch: 2", ["epoch", "Did you mean '--epochs'?"]),
    "in a section": ("lora:\n  rnk: 4", ["rnk", "Did you mean '--lora.rank'?"]),
    "two sections deep": ("data:\n  colums:\n    prompt: a", ["colums", "'--data.columns'"]),
    "of another section": ("optimizer:\n  rank: 4", ["optimizer", "rank"]),
    "an unknown section": ("lorra:\n  rank: 4", ["lorra", "Did you mean '--lora"]),
    "with a dash for a line": ("batch-size: 4", ["batch-size", "Did you mean '--batch_size'?"]),
}


@pytest.mark.parametrize(("text", "words"), UNKNOWN_KEYS.values(), ids=UNKNOWN_KEYS)
def test_unknown_yaml_key(text: str, words: list[str], shell: Shell, base: str, data: str) -> None:
    Path("run.yaml").write_text(text + "\n")
    run = f"train --base.name {base} --data.train {data} --output run"
    shell.refuses(f"{run} --config run.yaml", *words)


# --- data -----------------------------------------------------------------------------------------

EMPTY = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \n\n",
    "list.json": b"[]",
    "empty.json": b"",
    "empty.csv": b"",
    "header.csv": b"prompt,completion\n",
}


def on_data(command: str, base: str) -> str:
    return {
        "train": f"train --base.name {base} --output run --data.train ",
        "data": f"data --base.name {base} --data.train ",
        "evaluate": f"evaluate --base.name {base} --split validation --data.train ",
    }[command]


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("command", ["train", "data"])
def test_empty_data_file(command: str, name: str, shell: Shell, base: str) -> None:
    Path(name).write_bytes(EMPTY[name])
    shell.refuses(on_data(command, base) + name, name, "empty", "no rows")


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_empty_validation_file(command: str, shell: Shell, base: str, data: str) -> None:
    Path("held-out.jsonl").touch()
    line = on_data(command, base) + f"{data} --data.validation held-out.jsonl"
    shell.refuses(line, "held-out.jsonl", "empty")


COLUMNS = {
    "of no task": ({"question": "a", "answer": "b"}, "", ["question, answer", "columns"]),
    "half a task": ({"prompt": "a", "answer": "b"}, "", ["prompt, answer", "prompt + completion"]),
    "of another task": (
        {"text": "a", "label": "b"},
        "--data.task chat",
        ["text, label", "messages"],
    ),
    "mapped": (
        {"question": "a", "answer": "b"},
        '--data.columns {"prompt":"qestion","completion":"answer"}',
        ["qestion", "Did you mean 'question'?"],
    ),
    "in a template": (
        {"question": "a", "answer": "b"},
        "--data.prompt_template {qestion} --data.completion_template {answer}",
        ["qestion", "question"],
    ),
}


@pytest.mark.parametrize(("row", "options", "words"), COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("command", ["train", "data"])
def test_data_column_missing(
    command: str, row: dict[str, str], options: str, words: list[str], shell: Shell, base: str
) -> None:
    write_rows(Path("rows.jsonl"), [row] * 3)
    shell.refuses(f"{on_data(command, base)}rows.jsonl {options}", "rows.jsonl", *words)


def test_data_column_missing_in_one_row(shell: Shell, base: str) -> None:
    write_rows(Path("rows.jsonl"), [*ROWS, {"prompt": "river"}])
    shell.refuses(on_data("train", base) + "rows.jsonl", "rows.jsonl:9", "completion", "bad_rows")


def test_data_column_missing_in_the_validation_file(shell: Shell, base: str, data: str) -> None:
    write_rows(Path("held-out.jsonl"), [{"prompt": "a", "answer": "b"}])
    line = on_data("train", base) + f"{data} --data.validation held-out.jsonl"
    shell.refuses(line, "held-out.jsonl", "answer", "completion")


def test_data_file_missing_and_the_empty_folder_of_the_user_stays_empty(
    shell: Shell, base: str, data: str
) -> None:
    Path("run").mkdir()
    shell.refuses(on_data("train", base) + "trian.jsonl", "trian.jsonl", "'train.jsonl'?")


def test_data_file_missing_and_the_finished_run_stays(shell: Shell, base: str, data: str) -> None:
    """Also where the new run was to take its place."""
    assert main((on_data("train", base) + data).split()) == 0
    line = on_data("train", base) + "trian.jsonl --overwrite true"
    shell.refuses(line, "trian.jsonl", "Did you mean 'train.jsonl'?")


# --- longer than the context ----------------------------------------------------------------------

LONG = "river " * CONTEXT
"""Three tokens to the word."""
ARCHITECTURES = ["base", "learned-positions"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_prompt_longer_than_the_context(arch: str, shell: Shell, bases: Path) -> None:
    opened = lorakit.load_base(bases / arch, dtype="float32")
    assert opened.tokenizer is not None
    words = ["Prompt 2", f"context of {CONTEXT}", "max_new_tokens", "Shorten"]
    with nothing_left(shell.folder, opened.model), refused(DataError, *words):
        generate(opened.model, opened.tokenizer, ["river", LONG], Decoding(max_new_tokens=2))
    Path("prompts.txt").write_text(f"river\n{LONG}\n")
    shell.refuses(
        f"generate --base.name {bases / arch} --file prompts.txt --output out.jsonl"
        " --decoding.max_new_tokens 2",
        *words,
    )


def test_output_that_would_leave_the_context(shell: Shell, base: str) -> None:
    shell.refuses(
        f"generate --base.name {base} --prompt river --decoding.max_new_tokens {CONTEXT}",
        f"context of {CONTEXT}",
        "lower max_new_tokens",
    )


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_example_longer_than_max_length(command: str, shell: Shell, base: str, data: str) -> None:
    long = write_rows(Path("long.jsonl"), [*ROWS, {"prompt": LONG, "completion": " pub"}])
    line = f"{on_data(command, base)}{data} --data.validation {long} --data.max_length 32"
    shell.refuses(line, "long.jsonl:9", "max_length 32", "too_long", "truncate")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("command", "split"),
    [("train", "train"), ("train", "validation"), ("evaluate", "validation")],
)
def test_example_longer_than_the_context(
    command: str, split: str, arch: str, shell: Shell, bases: Path, data: str
) -> None:
    """A `max_length` that the user raised above what the model can see."""
    long = write_rows(Path("long.jsonl"), [*ROWS, {"prompt": LONG, "completion": " pub"}])
    train, validation = (long, data) if split == "train" else (data, long)
    line = f"{on_data(command, str(bases / arch))}{train} --data.validation {validation}"
    if command == "evaluate":
        line += " --scores [loss]"
    shell.refuses(f"{line} --data.max_length 1000", "long.jsonl:9", "max_length", f"{CONTEXT}")


# --- disk full ------------------------------------------------------------------------------------


def disk_full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullAfter:
    """Stands in for a writing function; the disk is full from call number `calls` on."""

    def __init__(self, function: Any, calls: int) -> None:
        self.function, self.left = function, calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.left == 0:
            disk_full()
        self.left -= 1
        return self.function(*args, **kwargs)


WRITES = {
    "mkdir": (Path, "mkdir"),
    "tensors": (formats.tensors, "save_file"),
    "bytes": (Path, "write_bytes"),
    "text": (Path, "write_text"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
}


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("write", WRITES)
def test_disk_full_at_any_write_of_a_save(
    write: str, calls: int, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = lorakit.attach(model, lorakit.LoRA(rank=2))
    owner, name = WRITES[write]
    full = FullAfter(getattr(owner, name), calls)
    with nothing_left(tmp_path), monkeypatch.context() as patched:
        patched.setattr(owner, name, lambda *args, **kwargs: full(*args, **kwargs))
        try:
            adapters.save(tmp_path / "new" / "adapter")
        except RunFolderError as error:
            assert_says(str(error), ("disk full", "adapter", "free some space"))
        else:  # a save makes fewer such calls than that
            assert full.left >= 0
            shutil.rmtree(tmp_path / "new")
    assert full.left == 0 or calls


@pytest.mark.parametrize("write", ["tensors", "bytes", "fsync"])
def test_disk_full_while_replacing_an_adapter(
    write: str,
    adapter: Path,
    model: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapters = lorakit.attach(model, lorakit.LoRA(rank=2))
    with nothing_left(tmp_path), monkeypatch.context() as patched:
        patched.setattr(*WRITES[write], disk_full)
        with refused(RunFolderError, "disk full", "nothing was changed"):
            adapters.save(adapter, overwrite=True)
    assert formats.read(adapter).layers


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with 4 KiB left."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32k", "lorakit-test", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a small disk; the injected errors are tested above")
    try:
        (folder / "filler").write_bytes(bytes(28 << 10))
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "command",
    [
        "merge adapter disk/new --base.name {base}",
        "convert adapter disk/new",
        "convert adapter disk/new.bin --to loralib",
        "generate --base.name {base} --prompt river --output disk/new --decoding.max_new_tokens 2",
        "train --base.name {base} --data.train {data} --output disk/new",
    ],
    ids=["merge", "convert to peft", "convert to loralib", "generate", "train"],
)
def test_really_full_disk(
    command: str, small_disk: Path, shell: Shell, adapter: Path, base: str, data: str
) -> None:
    if command.startswith(("generate", "train")):  # whose first writes are small
        with (small_disk / "filler").open("ab") as file:
            file.write(bytes(4 << 10))
    shell.refuses(command.format(base=base, data=data), "disk full", "disk/new", "free some space")


def test_save_to_a_really_full_disk(small_disk: Path, model: nn.Module, tmp_path: Path) -> None:
    adapters = lorakit.attach(model, lorakit.LoRA(rank=2))
    with nothing_left(tmp_path), refused(RunFolderError, "disk full", "free some space"):
        adapters.save(small_disk / "adapter")


STEPS = 4
IN_A_RUN = {
    "fsync": (os, "fsync"),
    "metrics": (JsonLines, "_write"),
    "tensors": (checkpoint, "save_file"),
    "settings": (Path, "write_text"),
    "records": (Path, "write_bytes"),
}


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


@pytest.mark.parametrize("share", [0, 0.3, 0.7, 1], ids=["first", "early", "late", "last"])
@pytest.mark.parametrize("write", IN_A_RUN)
def test_disk_full_in_a_run(
    write: str,
    share: float,
    base: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was saved before stays whole: once there is space, the run goes on to the same weights."""
    owner, name = IN_A_RUN[write]
    function = getattr(owner, name)

    def train(room: int, output: str, **settings: Any) -> tuple[FullAfter, RunResult | None]:
        full = FullAfter(function, room)
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, lambda *args, **kwargs: full(*args, **kwargs))
            try:
                return full, lorakit.train(run_config(base, data, tmp_path / output, **settings))
            except LorakitError as error:
                assert_says(str(error), ("disk full", output, "free some space"))
                return full, None

    plenty = 10**6
    full, undisturbed = train(plenty, "undisturbed")
    assert undisturbed is not None
    calls = plenty - full.left
    _, result = train(int(share * (calls - 1)), "run")
    assert result is None
    assert not [path for path in (tmp_path / "run").rglob("*") if ".tmp-" in path.name]
    _, result = train(plenty, "run", resume=True)
    assert result is not None
    assert (result.adapter / TENSORS).read_bytes() == (undisturbed.adapter / TENSORS).read_bytes()


# --- in use by another run ------------------------------------------------------------------------

HOLD = """
import sys
from lorakit import storage
with storage.lock_folder("run"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_output_folder_in_use_by_another_run(shell: Shell, base: str, data: str) -> None:
    run = f"train --base.name {base} --data.train {data} --output run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == "locked\n"
            for options in ("", " --resume true", " --overwrite true"):
                shell.refuses(
                    run + options, "run", f"in use by another run (pid {other.pid})", "folder"
                )
        finally:
            other.stdin.close()
    assert main(run.split()) == 0


def test_output_folder_in_use_by_this_process(shell: Shell, base: str, data: str) -> None:
    with storage.lock_folder("run"):
        shell.refuses(
            f"train --base.name {base} --data.train {data} --output run",
            f"in use by another run (pid {os.getpid()})",
        )

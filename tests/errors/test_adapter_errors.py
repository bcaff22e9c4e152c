"""Adapters that are damaged, trained for another base, incomplete, or that contain code."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from user_mistakes import (
    COMMANDS_ON_AN_ADAPTER,
    KEY,
    PEFT_CONFIG,
    RECORD,
    TENSORS,
    Shell,
    flip,
    nothing_left,
    refused,
    truncate,
)

import lorakit
from lorakit.adapters import formats
from lorakit.errors import (
    AdapterFileError,
    BaseModelError,
    WrongBaseError,
)

# --- damaged files --------------------------------------------------------------------------------


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
    """A change of any file of a lorakit folder is detected."""
    path = adapter / name
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole)
        flip(path, position, bit=position % 8)
        with refused(AdapterFileError, str(adapter)):
            formats.read(adapter)
    path.write_bytes(whole)
    assert formats.read(adapter).layers


def test_damaged_loralib_file(loralib_file: Path, model: nn.Module, tmp_path: Path) -> None:
    truncate(loralib_file, 0.9)
    with nothing_left(tmp_path, model), refused(AdapterFileError, str(loralib_file)):
        lorakit.load(model, loralib_file, alpha=4)


@pytest.mark.parametrize("command", COMMANDS_ON_AN_ADAPTER.values(), ids=COMMANDS_ON_AN_ADAPTER)
def test_damaged_adapter_in_every_command(
    command: str, shell: Shell, adapter: Path, base: str, data: str
) -> None:
    flip(adapter / TENSORS, -5)
    shell.refuses(
        command.format(base=base, data=data), f"adapter/{TENSORS}", "damaged", "download or save"
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


# --- missing and unexpected keys ------------------------------------------------------------------


def drop(*keys: str) -> Any:
    return lambda tensors: [tensors.pop(key) for key in keys]


def add(key: str, shape: tuple[int, ...]) -> Any:
    return lambda tensors: tensors.update({key: torch.ones(shape)})


def narrow(key: str) -> Any:
    return lambda tensors: tensors.update({key: tensors[key][:, :-1].contiguous()})


Q0_A, Q0_B = KEY.format(0, "q_proj", "A"), KEY.format(0, "q_proj", "B")
CHANGED_KEYS = {
    "a factor missing": (drop(Q0_B), ["layers.0.self_attn.q_proj", "lora_B"]),
    "everything missing": (lambda tensors: tensors.clear(), [TENSORS]),
    "half a layer too many": (add(KEY.format(7, "q_proj", "A"), (2, 32)), ["layers.7", "lora_B"]),
    "a stranger": (add("base_model.model.score.bias", (3,)), ["score.bias", "model does not"]),
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


@pytest.mark.parametrize("command", ["inspect", "generate", "merge", "convert"])
def test_a_missing_key_in_commands(
    command: str, shell: Shell, peft_folder: Path, base: str
) -> None:
    tensors = load_file(peft_folder / TENSORS)
    del tensors[Q0_B]
    save_file(tensors, peft_folder / TENSORS)
    shell.refuses(COMMANDS_ON_AN_ADAPTER[command].format(base=base), f"adapter/{TENSORS}")


# --- code in a pickle -----------------------------------------------------------------------------


class Payload:
    """Unpickling an instance creates the folder `path`."""

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
        "would run code",
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

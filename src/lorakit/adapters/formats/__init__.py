"""Adapters in files: which format a path holds, and writing a folder that many tools read.

=============== =============================================== ======= =======
format          what is there                                   read    written
=============== =============================================== ======= =======
lorakit         lorakit.json beside one of the two below        yes     yes
PEFT            adapter_config.json, adapter_model.safetensors  yes     yes
loralib         one file of tensors                             yes     `loralib.write_loralib`
=============== =============================================== ======= =======
"""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

from lorakit import storage
from lorakit.adapters.formats import card, lorakit_json, peft
from lorakit.adapters.formats.fingerprint import BaseRecord, base_record, compare
from lorakit.adapters.formats.fit import check_targets
from lorakit.adapters.formats.loralib import read_loralib, write_loralib
from lorakit.adapters.formats.peft import (
    NotExpressibleError,
    expected_layers,
    read_peft,
    write_peft,
)
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.stored_layer import StoredLayer
from lorakit.errors import AdapterFileError, ConfigurationError, RunFolderError

__all__ = [
    "BaseRecord",
    "NotExpressibleError",
    "StoredAdapter",
    "StoredLayer",
    "base_record",
    "check_replaceable",
    "check_targets",
    "compare",
    "copy_tokenizer",
    "expected_layers",
    "read",
    "read_loralib",
    "read_peft",
    "write",
    "write_loralib",
    "write_peft",
]

TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.*"),
    *("additional_chat_templates", "vocab.*", "merges.txt", "*.model"),
)
"""Names under which transformers' tokenizers save themselves."""


def read(path: str | Path, *, alpha: float | None = None) -> StoredAdapter:
    """Read an adapter, whatever its format.

    Args:
        path: A folder of lorakit or PEFT, or a loralib file.
        alpha: The constant of a loralib file, which does not record it.

    Raises:
        AdapterFileError: Nothing readable is there, or it is damaged, incomplete or unsafe.
        ConfigurationError: A loralib file without `alpha`, or an `alpha` that another file contradicts.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise AdapterFileError(
            f"The path of an adapter is {path!r}; name a folder of lorakit or PEFT, or a loralib file."
        )
    path = Path(path)
    with storage.reading(path, AdapterFileError):
        return _read(path, alpha)


def _read(path: Path, alpha: float | None) -> StoredAdapter:
    if path.is_file():
        return _read_file(path, alpha)
    if path.exists() and not path.is_dir():
        raise AdapterFileError(f"'{path}' is neither a folder nor a file, but a pipe or a device.")
    if not path.is_dir():
        raise AdapterFileError(
            f"'{path}' does not exist. Check the path; for an adapter on the Hugging Face hub, fetch it "
            "first: hf download OWNER/NAME --local-dir FOLDER."
        )
    if os.path.lexists(path / lorakit_json.NAME):  # a link to nowhere is no reason to do without
        stored = lorakit_json.read(path)
    elif os.path.lexists(path / peft.CONFIG_NAME):
        stored = read_peft(path)
    else:
        raise AdapterFileError(_no_adapter_in(path))
    _check_alpha(stored, alpha, path)
    return stored


def write(stored: StoredAdapter, folder: str | Path) -> list[str]:
    """Write an adapter into a folder: PEFT's files where PEFT can load it, lorakit.json, the card.

    What the folder holds already (a tokenizer) stays and gets its checksum too. The files appear one
    after the other: give a folder from `storage.atomic_folder`.

    Returns:
        What the user should know, in sentences: for one, why PEFT cannot load the folder.

    Raises:
        ConfigurationError: The provenance holds something that JSON has no form for.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    notices: list[str] = []
    form = None
    try:
        form = write_peft(stored, folder)
    except NotExpressibleError as error:
        notices.append(f"Only lorakit can load this folder, PEFT cannot: {error}")
        lorakit_json.write_tensors(stored, folder)
    text = card.card(stored, form)
    (folder / lorakit_json.CARD_NAME).write_bytes(text.encode())
    lorakit_json.write(stored, folder, form)
    return notices


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Copy the tokenizer and chat template beside an adapter into the folder of another; call before `write`."""
    if not Path(source).is_dir():
        return  # a loralib file
    for path in sorted(Path(source).iterdir()):
        if not any(fnmatch(path.name, pattern) for pattern in TOKENIZER_FILES):
            continue
        with storage.reading(path, AdapterFileError):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            else:
                shutil.copy(path, folder / path.name)


def check_replaceable(folder: str | Path) -> None:
    """Refuse to overwrite a folder that is not an adapter's.

    Raises:
        RunFolderError: The folder holds files, and none that marks an adapter.
    """
    folder = Path(folder)
    marks = (lorakit_json.NAME, peft.CONFIG_NAME)
    with storage.reading(folder, RunFolderError):
        holds = folder.is_dir() and any(folder.iterdir())
        is_own = any((folder / mark).exists() for mark in marks)
    if holds and not is_own:
        raise RunFolderError(
            f"'{folder}' holds files that are not an adapter's, and overwriting would delete them. "
            "Choose another folder."
        )


def _read_file(path: Path, alpha: float | None) -> StoredAdapter:
    own = (peft.TENSORS_NAME, peft.PICKLE_NAME, lorakit_json.TENSORS_NAME)
    if path.name in (*own, peft.CONFIG_NAME, lorakit_json.NAME):
        raise AdapterFileError(
            f"'{path}' is one file of an adapter folder. Give the folder: '{path.parent}'."
        )
    return read_loralib(path, alpha=alpha)


def _check_alpha(stored: StoredAdapter, alpha: float | None, path: Path) -> None:
    recorded = {layer.alpha for layer in stored.layers.values()}
    if alpha is not None and recorded != {alpha}:
        raise ConfigurationError(
            f"alpha={alpha:g} was given, and '{path}' records {', '.join(f'{a:g}' for a in recorded)}. "
            "Leave alpha out; it is for loralib files, which record none."
        )


def _no_adapter_in(folder: Path) -> str:
    here = sorted(p.name for p in folder.iterdir())
    marks = (lorakit_json.NAME, peft.CONFIG_NAME)
    below = [
        p for p in sorted(folder.iterdir()) if p.is_dir() and any((p / m).exists() for m in marks)
    ]
    hint = f" Did you mean '{below[0]}'?" if below else ""
    files = [name for name in here if name.endswith((".bin", ".pt", ".pth", ".safetensors"))]
    if files and not below:
        hint = f" A loralib file is given by its own path, for example '{folder / files[0]}'."
    return (
        f"'{folder}' holds no adapter: there is neither {lorakit_json.NAME} nor {peft.CONFIG_NAME}, only "
        f"{', '.join(here[:5]) or 'nothing'}.{hint}"
    )

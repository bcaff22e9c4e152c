"""Read adapters in any supported format; write folders that many tools can read.

=============== =============================================== ======= =======
format          files                                           read    written
=============== =============================================== ======= =======
lorakit         lorakit.json, beside PEFT's files or its own    yes     yes
PEFT            adapter_config.json, adapter_model.safetensors  yes     yes
loralib         one file of tensors                             yes     `write_loralib`
=============== =============================================== ======= =======
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

from lorakit import storage
from lorakit.adapters.formats import card, lorakit_json, peft
from lorakit.adapters.formats.fingerprint import BaseRecord, base_record, compare
from lorakit.adapters.formats.fit import check_targets
from lorakit.adapters.formats.loralib import read_loralib, write_loralib
from lorakit.adapters.formats.peft import NotExpressibleError, peft_form, read_peft, write_peft
from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.formats.tensors import SUFFIXES
from lorakit.errors import AdapterFileError, ConfigurationError, LorakitError, nearest_path
from lorakit.file_names import (
    ADAPTER,
    ADAPTER_CONFIGS,
    ADAPTER_TENSORS,
    BEST,
    CHECKPOINTS,
    CONFIG,
    LORAKIT_JSON,
    MODEL_CARD,
    PEFT_CONFIG,
    RESULT,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
)
from lorakit.formatting import resume_command
from lorakit.models.sources import is_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BaseRecord",
    "StoredAdapter",
    "base_record",
    "check_replaceable",
    "check_targets",
    "compare",
    "copy_tokenizer",
    "has_tokenizer",
    "is_adapter",
    "read",
    "read_loralib",
    "read_peft",
    "save_tokenizer",
    "tensor_file",
    "tensors_of",
    "write",
    "write_loralib",
]


def read(path: str | Path, *, alpha: float | None = None) -> StoredAdapter:
    """Read an adapter in any supported format.

    Args:
        path: A folder of lorakit or PEFT, or a loralib file.
        alpha: The `lora_alpha` of a loralib file, which does not record it.

    Raises:
        AdapterFileError: The path holds no adapter, or one that is damaged, incomplete or unsafe.
        ConfigurationError: `alpha` is missing for a loralib file, or contradicts another file.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise AdapterFileError(
            f"The path of an adapter is {path!r}; a lorakit or PEFT folder or a loralib file was expected."
        )
    path = Path(path)
    with storage.reading(path, AdapterFileError):
        stored = _read(path, alpha)
    stored.path = str(path)
    return stored


def _read(path: Path, alpha: float | None) -> StoredAdapter:
    if path.is_file():
        if path.name in (*ADAPTER_TENSORS, *ADAPTER_CONFIGS):
            raise AdapterFileError(
                f"'{path}' is one file of an adapter folder. Give the folder: '{path.parent}'."
            )
        if is_gguf(path):
            raise AdapterFileError(
                f"'{path}' is a GGUF file, which can be a base (--base.name) but no adapter. Give the PEFT folder from "
                "which the GGUF file was made."
            )
        return read_loralib(path, alpha=alpha)
    if not path.is_dir():
        _reject_run_without_adapter(path.parent)
        raise AdapterFileError(
            f"'{path}' does not exist.{nearest_path(path) or ' Check the path.'} Download an adapter on the Hugging "
            "Face hub first: hf download OWNER/NAME --local-dir FOLDER."
        )
    if os.path.lexists(path / LORAKIT_JSON):  # a broken link is an error, not a PEFT folder
        stored = lorakit_json.read(path)
    elif os.path.lexists(path / PEFT_CONFIG):
        stored = read_peft(path)
    else:
        _reject_run_without_adapter(path)
        raise AdapterFileError(_no_adapter_in(path))
    _check_alpha(stored, alpha, path)
    stored.notices += [*peft.option_notices(stored.from_peft or {}), *_tokenizer_notices(path)]
    return stored


def write(stored: StoredAdapter, folder: str | Path, *, for_peft: bool = True) -> list[str]:
    """Write an adapter into a folder: lorakit.json, the model card, and PEFT's files if PEFT can load it.

    Files that the folder already contains (a tokenizer) stay, and their checksums are recorded. The
    write is not atomic: pass a folder from `storage.atomic_folder`.

    Args:
        stored: The adapter.
        folder: The folder; it may exist.
        for_peft: False writes no files of PEFT, as for an adapter made from one that PEFT cannot load.

    Returns:
        Sentences for the user, such as the reason why PEFT cannot load the folder.

    Raises:
        AdapterFileError: The adapter has `base_copies`.
        ConfigurationError: The provenance holds a value that JSON cannot represent.
    """
    stored.require_no_base_copies()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    notices: list[str] = []
    form: peft.PeftForm | None = None  # stays None if PEFT cannot load the adapter
    try:
        if not for_peft:
            raise NotExpressibleError("the input adapter has no files of PEFT.")
        form = write_peft(stored, folder)
        notices += form.notices
    except NotExpressibleError as error:
        notices.append(f"Only lorakit can load this folder; PEFT cannot: {error}")
    (folder / MODEL_CARD).write_bytes(card.card(stored, form).encode())
    lorakit_json.write(stored, folder, form)
    return notices


def is_adapter(folder: str | Path) -> bool:
    """Return whether a folder has one of the files that describe an adapter, even as a broken link."""
    return any(os.path.lexists(os.path.join(folder, name)) for name in ADAPTER_CONFIGS)


def has_tokenizer(folder: str | Path) -> bool:
    """Return whether an adapter's folder has a tokenizer of its own.

    Raises:
        AdapterFileError: The folder cannot be read.
    """
    with storage.reading(folder, AdapterFileError):
        return Path(folder, TOKENIZER_CONFIG).exists()


def tensor_file(path: str | Path) -> Path | None:
    """Return the file with the tensors of an adapter: `path`, or the file of the folder that `read` reads."""
    path = Path(path)
    files = [path] if path.is_file() else [path / name for name in ADAPTER_TENSORS]
    return next((file for file in files if file.is_file()), None)


def tensors_of(stored: StoredAdapter) -> list[Tensor]:
    """Return the tensors that `write` writes; their data is not read."""
    form: peft.PeftForm | None = None
    with suppress(NotExpressibleError):
        form = peft_form(stored)
    theirs = () if form is None else form.tensors.values()
    return [*theirs, *lorakit_json.beside(stored, form).values()]


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Copy the tokenizer and chat template of an adapter to another folder; call it before `write`.

    Raises:
        AdapterFileError: A file is a link out of the adapter's folder, other than one of the hub's cache.
    """
    source = Path(os.path.realpath(source))
    # The hub's cache consists of links from snapshots/REVISION to blobs.
    snapshots = [parent for parent in source.parents if parent.name == "snapshots"]
    homes = [source, *(parent.with_name("blobs") for parent in snapshots)]
    for path in _tokenizer_files(source):
        target = Path(os.path.realpath(storage.regular_file(path)))
        if not any(home in target.parents for home in homes):
            raise AdapterFileError(
                f"'{path}' is a link to '{target}', outside the adapter's folder, so it was not copied. Replace the "
                "link by the file if it belongs to the adapter, otherwise delete it."
            )
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        with storage.reading(path, AdapterFileError):
            shutil.copyfile(path, copy)  # not the mode, which a mounted share may refuse


def _tokenizer_files(folder: Path) -> list[Path]:
    found = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}
    return sorted(path for path in found if not path.is_dir())


def _tokenizer_notices(folder: Path) -> list[str]:
    """Return a notice if the folder has files of a tokenizer, such as a chat template, that are not used."""
    files = [] if has_tokenizer(folder) else _tokenizer_files(folder)
    if not files:
        return []
    return [
        f"'{folder}' has {', '.join(file.name for file in files)} but no {TOKENIZER_CONFIG}, so commands use the "
        "base's tokenizer and chat template. If the adapter was trained with others, save its whole tokenizer there."
    ]


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """Write a tokenizer to an adapter's folder; call it before `write`.

    Returns:
        A notice if it was left out: readers run no Python code from an adapter's folder.
    """
    if type(tokenizer).__module__.partition(".")[0] != TRANSFORMERS_DYNAMIC_MODULE_NAME:
        tokenizer.save_pretrained(folder)
        return []
    return [
        "The tokenizer needs Python code of its own, so it was not saved with the adapter. Commands use the base's, "
        "with base.trust_remote_code."
    ]


def check_replaceable(folder: str | Path) -> None:
    """Refuse to overwrite a folder with files other than an adapter's and its tokenizer's.

    Raises:
        RunFolderError: The folder has other files, or files but no adapter.
    """
    storage.require_replaceable(
        folder, "an adapter's", written=_written(folder), marks=ADAPTER_CONFIGS
    )


def other_files(folder: Path) -> list[str]:
    """Return up to three files of a folder that are not an adapter's; see `check_replaceable`.

    Raises:
        RunFolderError: The folder cannot be read.
    """
    return storage.other_files(folder, written=_written(folder), marks=ADAPTER_CONFIGS)


def _written(folder: str | Path) -> list[str]:
    """Return patterns of the files that a save of an adapter writes, with those that lorakit.json names."""
    saved: object = None
    with suppress(LorakitError):  # of PEFT, new or damaged
        saved = storage.read_json(Path(folder) / LORAKIT_JSON).get("files")
    listed = map(glob.escape, saved) if isinstance(saved, Mapping) else ()
    return [*ADAPTER_CONFIGS, *ADAPTER_TENSORS, MODEL_CARD, *TOKENIZER_FILES, *listed]


def _check_alpha(stored: StoredAdapter, alpha: float | None, path: Path) -> None:
    """Reject an `alpha` that contradicts the one in the file."""
    recorded = {layer.alpha for layer in stored.layers.values()}
    if alpha is not None and recorded != {alpha}:
        raise ConfigurationError(
            f"alpha is {alpha:g}, but '{path}' records {', '.join(f'{a:g}' for a in recorded)}. Leave "
            "alpha out; it is only for loralib files, which record none."
        )


def _reject_run_without_adapter(folder: Path) -> None:
    """Raise an error for a run that is not finished, and so has no adapter/ yet, or whose adapter/ was deleted."""
    is_run = (folder / RESULT).is_file() or (folder / CHECKPOINTS).is_dir()
    if not (folder / CONFIG).is_file() or not is_run or is_adapter(folder / ADAPTER):
        return
    best = folder / BEST
    instead = f", or use its best adapter, '{best}'" if is_adapter(best) else ""
    raise AdapterFileError(
        f"'{folder}' is a run without an adapter: it is unfinished, or its adapter was deleted. Finish it: "
        f"{resume_command(folder)}{instead}."
    )


def _no_adapter_in(folder: Path) -> str:
    """Return the message for a folder without an adapter, with what it contains instead."""
    entries = sorted(folder.iterdir())
    adapter = next((p for p in entries if p.is_dir() and is_adapter(p)), None)
    file = next((p for p in entries if p.name.endswith(SUFFIXES)), None)
    hint = ""
    if adapter is not None:
        hint = f" Did you mean '{adapter}'?"
    elif (folder / "config.json").exists():
        hint = " It is the folder of a model."
    elif file is not None:
        hint = f" For a loralib file, give the path of the file, for example '{file}'."
    return (
        f"'{folder}' holds no adapter: it has neither {LORAKIT_JSON} nor {PEFT_CONFIG}, only "
        f"{', '.join(p.name for p in entries[:5]) or 'nothing'}.{hint}"
    )

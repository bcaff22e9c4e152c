"""Read a tokenizer from its files, and digest it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import AdapterFileError, BaseModelError, LorakitError, is_momentary
from lorakit.file_names import TOKENIZER_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.models.locating import Located
    from lorakit.models.sources import ModelSource

_TRIAL = "A river, 12 pubs.\n\tcaf\u00e9 \u4e2d\u6587 \U0001f600"
"""A text with letters, digits, white space, accents, and characters of two to four bytes."""

_SETTINGS = re.compile(r'"truncation":.*?,"padding":.*?(?="added_tokens":)', re.DOTALL)
"""Matches truncation and padding at the start of a serialised tokenizer. In a text of it the quotes are escaped."""

_FILES = ("tokenizer*", "*vocab*", "merges.txt", "*.model")
"""Names of files that only a model with a tokenizer has."""


def tokenizer_of(located: Located) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a base model; None if it has none.

    Raises:
        BaseModelError: The model has files of a tokenizer, and they cannot be read.
    """
    try:
        tokenizer = read_tokenizer(located.path, BaseModelError, **located.options)
    except LorakitError:
        raise
    # Any exception can mean that there is no tokenizer, or that it is damaged or needs a missing package.
    except Exception as error:
        has_files = any(fnmatch(name, pattern) for name in located.files for pattern in _FILES)
        if has_files:
            raise BaseModelError(_unreadable(located, error)) from error
        return None
    # For a folder without tokenizer files, transformers can return one without words.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None


def _unreadable(located: Located, error: Exception) -> str:
    source, path, reason = located.source, located.path, _reason(error)
    if reason is None:
        return (
            f"The tokenizer of '{source.name}' needs Python code of its own. Read that code, and if you trust it, set "
            "trust_remote_code."
        )
    advice = "restore its files from the model's source."
    if source.kind == "hub":
        commit = f" --revision {source.revision}" if source.revision else ""
        advice = f"run: hf download {path}{commit} --force-download"
    elif source.kind == "gguf":
        advice = f"delete '{path}' to convert the GGUF file again."
    return (
        f"The tokenizer of '{source.name}' cannot be read ({reason}). If it needs a package, install it; otherwise "
        f"{advice}"
    )


def _reason(error: Exception) -> str | None:
    """Return what made a tokenizer unreadable; None if it needs Python code of its own."""
    message = " ".join(str(error).split())
    if "trust_remote_code" in message:
        return None
    return f"{type(error).__name__}: {message[:500].rstrip('.')}"


def tokenizer_in(folder: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of an adapter's folder, which never runs code of the folder.

    Raises:
        AdapterFileError: It is damaged, or needs Python code of its own or a missing package.
    """
    try:
        return read_tokenizer(folder, AdapterFileError, local_files_only=True)
    # Its files are untrusted input; their readers raise almost any exception.
    except Exception as error:
        if isinstance(error, LorakitError) or is_momentary(error):
            raise
        reason, restore = _reason(error), "Restore its files. "
        if reason is None:
            reason = "it needs Python code of its own, which is never run from an adapter's folder"
            restore = ""
        raise AdapterFileError(
            f"The tokenizer in '{folder}' cannot be read ({reason}). {restore}To use the base's tokenizer, delete "
            f"'{Path(folder) / 'tokenizer_config.json'}'."
        ) from error


def read_tokenizer(
    path: str, error: type[LorakitError], *, trust_remote_code: bool = False, **options: Any
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or a hub id; `options` are those of transformers.

    Raises:
        error: Its `model_max_length` is not a whole number of 1 or more. Transformers accepts any value, and fails
            when a text is tokenized.
    """
    from transformers import AutoTokenizer

    # If trust_remote_code is not passed, transformers asks on standard input whether to run the code.
    with _rust_errors(path, error):
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, **options
        )
    length = tokenizer.model_max_length
    whole = isinstance(length, int | float) and not isinstance(length, bool) and length % 1 == 0
    if not (whole and length >= 1):
        raise error(
            f"'{Path(path) / TOKENIZER_CONFIG}' has {length!r:.40} as model_max_length; a whole number of 1 or "
            "more was expected. Correct it, or remove it to set no limit."
        )
    tokenizer.model_max_length = int(length)  # 512.0 fails in the first call that truncates
    _try(tokenizer, path, error)
    return tokenizer


def _try(tokenizer: PreTrainedTokenizerBase, path: str, error: type[LorakitError]) -> None:
    """Tokenize a text: a damaged vocabulary loads, and fails or gives other ids than its own only then."""
    with _rust_errors(path, error):
        try:
            ids = tokenizer.encode(_TRIAL)
        except Exception as failure:
            raise error(_damaged(path, failure)) from None
    if wrong := set(ids) - set(tokenizer.get_vocab().values()):
        raise error(
            f"The tokenizer in '{path}' is damaged: it gives the id {min(wrong):,}, which is not in its vocabulary. "
            "Restore its files from the model's source."
        )


def save_sentencepiece(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Copy a base's tokenizer.model, if it has one that can be read, to the folder of a saved tokenizer.

    transformers saves tokenizer.json in its place, and llama.cpp's converter needs it for Gemma 2 and Phi 3, among
    others. With it, the converter reads added tokens in tokenizer_config.json, where transformers 5 omits them.
    """
    from transformers.utils.hub import cached_file

    name, at, file = "tokenizer.model", source.revision, None
    with suppress(OSError):  # also for a GGUF file, which is no folder and no name of the hub
        file = cached_file(source.path_or_id, name, revision=at, local_files_only=source.from_cache)
    if file is None:
        return
    shutil.copyfile(file, folder / name)
    added = {i: token.__getstate__() for i, token in tokenizer.added_tokens_decoder.items()}
    path = folder / TOKENIZER_CONFIG
    config = {**json.loads(path.read_bytes()), "added_tokens_decoder": added}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


@contextmanager
def _rust_errors(path: str, error: type[LorakitError]) -> Iterator[None]:
    """Convert errors of the library tokenizers, which is written in Rust.

    Its panics are no `Exception`, and its errors of the system, such as a lack of file handles, are no `OSError`.
    """
    try:
        yield
    except BaseException as failure:
        number = re.search(r"\(os error (\d+)\)$", str(failure))
        if type(failure) is Exception and number is not None:
            raise OSError(int(number[1]), str(failure)) from failure
        if type(failure).__name__ != "PanicException":
            raise
        raise error(_damaged(path, failure)) from None


def _damaged(path: str, failure: BaseException) -> str:
    return (
        f"The tokenizer in '{path}' is damaged: it cannot be read, or fails on a first text "
        f"({type(failure).__name__}: {failure}). Restore its files from the model's source."
    )


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Return a SHA-256 of what determines the ids of a text: vocabulary, rules, special tokens, chat template.

    Settings of padding and truncation do not count: calls of the tokenizer change them, and `load_base` sets a
    padding token.

    Args:
        tokenizer: A tokenizer of transformers, or a processor that has one. Others, and None, have no digest.
    """
    from transformers import PreTrainedTokenizerBase

    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python: its class is its rules
        rules = f"{type(tokenizer).__name__}{sorted(tokenizer.get_vocab().items())}"
    else:
        rules = _SETTINGS.sub("", backend.to_str(), count=1)
    special = {n: t for n, t in tokenizer.special_tokens_map.items() if n != "pad_token"}
    others = json.dumps([special, tokenizer.chat_template], sort_keys=True, default=str)
    return hashlib.sha256(f"{rules}\0{others}".encode()).hexdigest()

"""Reads GGUF files (llama.cpp's format) by converting them once into a ``transformers`` folder."""

from __future__ import annotations

import importlib.util
import io
import os
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import filelock
import torch

from lorakit.errors import BaseModelError, LorakitError
from lorakit.storage import atomic_folder, read_json, sha256, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CONVERSION = 1
"""Raised when a conversion comes out different, so that older ones in the cache are not used."""
_RECORD = "conversion.json"

_GPT2_SPLIT = frozenset({"default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "mellum", "trillion"})
_GPT2_SPLIT_AFTER_DIGITS = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)
"""llama.cpp's names of pre-tokenizers that cut every digit off before they split like GPT-2."""


def cache_folder() -> Path:
    """Return the folder for converted models: ``$LORAKIT_CACHE``, else the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("LORAKIT_CACHE") or platformdirs.user_cache_dir("lorakit"))


def converted_folder(gguf: Path) -> Path:
    """Return a folder with the model, tokenizer and chat template of a GGUF file.

    Weights are stored in the smallest dtype that holds them exactly: float32 for quantised ones.
    The folder is in the cache, under the hash of the file, and is made on the first call, in some
    20 seconds for 135 million weights. Processes that ask at the same time wait for the first.

    Raises:
        BaseModelError: the file is damaged, of a kind that ``transformers`` cannot read, or needs
            a package that is not installed.
        RunFolderError: the cache cannot be written.
    """
    folder = _folder_of(gguf)
    if not _is_complete(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(f"{folder}.lock", is_singleton=False)
            lock.acquire()
        except OSError as error:
            raise BaseModelError(
                f"Cannot write the cache folder '{folder.parent}' ({error.strerror}). Set "
                "LORAKIT_CACHE to a folder that can be written."
            ) from error
        try:
            if not _is_complete(folder):
                _convert(gguf, folder)
        finally:
            lock.release()
    return folder


def conversion_of(gguf: Path) -> Path | None:
    """Return the folder that `converted_folder` made of a GGUF file before; None where it did not."""
    folder = _folder_of(gguf)
    return folder if _is_complete(folder) else None


def conversion_notices(folder: Path) -> list[str]:
    """Return what the conversion had to leave inexact."""
    return list(read_json(folder / _RECORD)["notices"])


def _folder_of(gguf: Path) -> Path:
    return cache_folder() / f"{gguf.stem}-{sha256(gguf)[:16]}-{_CONVERSION}"


def _is_complete(folder: Path) -> bool:
    # The folder appears in one step. A file may have been deleted since, by a cleaner of caches.
    names = ("config.json", "model.safetensors", "tokenizer.json", _RECORD)
    return all((folder / name).is_file() for name in names)


def _convert(gguf: Path, folder: Path) -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise BaseModelError(
                f"Reading '{gguf.name}' needs the package {package}: pip install 'lorakit[train]'"
            )
    try:
        metadata, dtype = _read_header(gguf)
        model = _read_model(gguf, dtype)
        tokenizer = _read_tokenizer(gguf)
    except LorakitError:
        raise
    # The readers trust the file: a damaged one fails anywhere in them, with any exception.
    except Exception as error:
        raise BaseModelError(
            f"'{gguf}' is damaged, or of a kind that transformers cannot read "
            f"({type(error).__name__}: {_first_line(error)}). If it was copied or downloaded, do "
            "that again."
        ) from error
    notices = _restore_pre_tokenizer(tokenizer, metadata)
    tokenizer.model_max_length = getattr(
        model.config, "max_position_embeddings", tokenizer.model_max_length
    )
    with atomic_folder(folder, overwrite=True) as temporary:
        model.save_pretrained(temporary, max_shard_size="1TB")
        tokenizer.save_pretrained(temporary)
        write_json(temporary / _RECORD, {"file": gguf.name, "notices": notices})


def _read_header(gguf: Path) -> tuple[dict[str, Any], torch.dtype]:
    """Return the settings that matter here, and the smallest dtype that holds every weight."""
    from gguf import GGMLQuantizationType as Kind
    from gguf import GGUFReader

    reader = GGUFReader(gguf)  # refuses a file that ends before its last tensor does
    names = ("tokenizer.ggml.model", "tokenizer.ggml.pre")
    metadata = {name: reader.fields[name].contents() for name in names if name in reader.fields}

    halves = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
    stored = {tensor.tensor_type for tensor in reader.tensors} - {Kind.F32}
    dtype = halves.get(next(iter(stored))) if len(stored) == 1 else None
    if dtype is not None:  # the norms of such a file are in float32, mostly without need
        full = (torch.tensor(t.data) for t in reader.tensors if t.tensor_type == Kind.F32)
        if not all(torch.equal(tensor.to(dtype).float(), tensor) for tensor in full):
            dtype = None
    return metadata, dtype or torch.float32


def _read_model(gguf: Path, dtype: torch.dtype) -> PreTrainedModel:
    import transformers

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    config = transformers.AutoConfig.from_pretrained(**where)
    auto = (
        transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # newer versions can keep the weights in their blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with redirect_stderr(io.StringIO()):  # its progress bar heeds no setting
        source, info = cast(Any, auto.from_pretrained(**where, **options))
    if info["missing_keys"]:
        raise BaseModelError(
            f"'{gguf}' lacks weights that a {config.model_type} model needs: "
            f"{', '.join(sorted(info['missing_keys'])[:3])} ({len(info['missing_keys'])} in all)."
        )
    settings = source.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        settings.pop(key, None)
    config = type(source.config).from_dict(settings)
    # transformers will not save a model that came from GGUF, so its tensors go into a fresh one.
    with torch.device("meta"):
        model = type(source)(config)
    model.load_state_dict(source.state_dict(), strict=True, assign=True)
    model.tie_weights()
    model.generation_config = source.generation_config
    return model


def _read_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)


def _restore_pre_tokenizer(
    tokenizer: PreTrainedTokenizerBase, metadata: dict[str, Any]
) -> list[str]:
    """Split text as the model was trained to, where transformers does not; return notices.

    GGUF names the rule, and transformers knows part of the names: for others it splits like GPT-2.
    For SmolLM that puts a space before a digit into another token than in training.
    """
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return []
    from tokenizers import pre_tokenizers

    rule = metadata.get("tokenizer.ggml.pre", "default")
    if rule in _GPT2_SPLIT_AFTER_DIGITS:
        backend = cast(Any, tokenizer).backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        return []
    if rule in _GPT2_SPLIT or rule in _rules_of_transformers():
        return []
    return [
        f"This GGUF file splits text by the rule '{rule}', which is not known here: some text may "
        "become other tokens than in training. Load the original model if that matters."
    ]


def _rules_of_transformers() -> frozenset[str]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import (
            GGUF_PRE_TOKENIZER_SPLITS,
        )
    except ImportError:  # a version that keeps them elsewhere
        return frozenset()
    return frozenset(GGUF_PRE_TOKENIZER_SPLITS)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]

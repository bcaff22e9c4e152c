"""Convert a GGUF file (llama.cpp's format) once into a cached ``transformers`` folder."""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import torch

from lorakit.errors import BaseModelError, LorakitError
from lorakit.formatting import counted, size
from lorakit.models.cache import cache_folder, cached, is_complete
from lorakit.models.devices import available_memory
from lorakit.models.gguf_config import read_config
from lorakit.models.gguf_header import Header, read_float32, read_header
from lorakit.models.gguf_tokenizer import read_tokenizer
from lorakit.storage import atomic_folder, read_json, sha256, write_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_CONVERSION = 6
"""Version of the conversion; raise it when the result changes, to ignore older cache entries."""
_RECORD = f"conversion-transformers-{version('transformers')}.json"
"""Names the version of transformers, on which the result depends: another version converts again."""
_DESCRIPTION = ("config.json", "tokenizer.json", "tokenizer_config.json", _RECORD)
_CONVERTED = (*_DESCRIPTION, "model.safetensors")

_DIGESTS: dict[tuple[Path, int, int, int], str] = {}
"""SHA-256 of files, by path, size, time of the last change and inode."""
_CLOCK_TICK = 2.0
"""Seconds of the coarsest file times (FAT). A second change within them may leave the time of the first."""

_UNUSED = ("rope_freqs", "attn_rot_embd", "rope_factors_long", "rope_factors_short")
"""Tensors of rotary embeddings, which the configuration replaces. Any other unused tensor is an error."""
_PATCHED = threading.Lock()
"""Held while `GGUFReader` is replaced, so that two threads do not restore each other's replacement."""


def converted_folder(gguf: Path) -> Path:
    """Return a folder with the model, tokenizer and chat template of a GGUF file.

    Weights are stored in the smallest dtype that holds them exactly: float32 for quantised ones.
    The folder is cached under the hash of the file. The first call converts the file, in about 20
    seconds for 135 million weights; concurrent processes wait for it.

    Raises:
        BaseModelError: the file is damaged, ``transformers`` cannot read its kind, or a required
            package is not installed.
        RunFolderError: the cache is not writable.
    """
    folder = _folder_of(gguf)
    return cached(folder, _CONVERTED, lambda: _convert(gguf, folder, weights=True))


def described_folder(gguf: Path) -> Path:
    """Return a folder with at least the configuration, tokenizer and chat template of a GGUF file.

    It is that of `converted_folder` if the file has been converted. Otherwise the weights are not read, which takes a
    few seconds once; the folder is cached.

    Raises:
        BaseModelError, RunFolderError: As for `converted_folder`.
    """
    converted = _folder_of(gguf)
    if is_complete(converted, _CONVERTED):
        return converted
    folder = converted.with_name(f"{converted.name}-description")
    return cached(folder, _DESCRIPTION, lambda: _convert(gguf, folder, weights=False))


def conversion_notices(folder: Path) -> list[str]:
    """Return the notices of a conversion that is not exact."""
    return list(read_json(folder / _RECORD)["notices"])


def _folder_of(gguf: Path) -> Path:
    return cache_folder() / f"{gguf.stem}-{_digest_of(gguf)[:16]}-{_CONVERSION}"


def _digest_of(gguf: Path) -> str:
    """Return the SHA-256 of a file, which is read once while it does not change: a command needs its folder often."""
    status = gguf.stat()
    state = (gguf, status.st_size, status.st_mtime_ns, status.st_ino)
    if (known := _DIGESTS.get(state)) is not None:
        return known
    digest = sha256(gguf)
    if time.time() - status.st_mtime > _CLOCK_TICK:
        _DIGESTS[state] = digest
    return digest


def _require_unchanged(gguf: Path, folder: Path) -> None:
    """Reject a file that was replaced since it was hashed: its content would be cached under another digest."""
    if not folder.name.startswith(_folder_of(gguf).name):
        raise BaseModelError(
            f"'{gguf}' was replaced while it was converted. Run the command again."
        )


def _convert(gguf: Path, folder: Path, *, weights: bool) -> None:
    """Convert a file into a folder; without `weights`, only its configuration, tokenizer and chat template."""
    converted: Any
    with _reading(gguf):
        header = read_header(gguf)
        config = converted = read_config(gguf, header)
        config.dtype = dtype = _smallest_dtype(gguf, header)
        if weights:
            _require_room(gguf, header, dtype, folder.parent)
            converted = _read_model(gguf, config, header)
            _require_finite(gguf, converted)
        tokenizer, notices = read_tokenizer(gguf, header.settings, config)
        _require_unchanged(gguf, folder)
    with atomic_folder(folder, overwrite=True) as temporary:
        converted.save_pretrained(temporary, **({"max_shard_size": "1TB"} if weights else {}))
        # Without a file for the chat template, which not every model has: `_DESCRIPTION` cannot list it.
        tokenizer.save_pretrained(temporary, save_jinja_files=False)
        write_json(temporary / _RECORD, {"file": gguf.name, "notices": notices})


@contextmanager
def _reading(gguf: Path) -> Iterator[None]:
    """Explain any error of the readers; parse the header once for all of them, which takes seconds."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise BaseModelError(
                f"Reading '{gguf.name}' needs the package {package}: pip install \"lorakit[train]\""
            )
    import gguf as library

    parse_once = functools.cache(library.GGUFReader)
    try:
        with (
            _PATCHED,
            mock.patch.object(library, "GGUFReader", lambda path: parse_once(os.fspath(path))),
        ):
            yield
    except LorakitError:
        raise
    except ImportError as error:
        raise BaseModelError(
            f"Reading '{gguf.name}' with transformers {version('transformers')} failed: {error}. Install the package "
            "that this names. If it names a part of transformers, install a newer lorakit or an older transformers."
        ) from error
    # Only the header is validated: other damage can make the readers raise any exception.
    except Exception as error:
        first_line = (str(error).strip().splitlines() or ["no message"])[0]
        raise BaseModelError(
            f"'{gguf}' is damaged, or of a kind that transformers cannot read "
            f"({type(error).__name__}: {first_line}). If it was copied or downloaded, copy or download "
            "it again."
        ) from error


def _smallest_dtype(gguf: Path, header: Header) -> torch.dtype:
    """Return the smallest dtype that holds every weight exactly."""
    from gguf import GGMLQuantizationType as Kind

    halves = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
    stored = {tensor.kind for tensor in header.tensors} - {Kind.F32}
    dtype = halves.get(Kind(next(iter(stored)))) if len(stored) == 1 else None
    # The norms are float32 even in a 16-bit file. Most fit in 16 bits; if one does not, use float32.
    if dtype is not None:
        entries = (tensor for tensor in header.tensors if tensor.kind == Kind.F32)
        full = (torch.from_numpy(read_float32(gguf, tensor)) for tensor in entries)
        if not all(torch.equal(tensor.to(dtype).float(), tensor) for tensor in full):
            dtype = None
    return dtype or torch.float32


def _require_room(gguf: Path, header: Header, dtype: torch.dtype, cache: Path) -> None:
    """Reject a model that does not fit into the free memory, or into the free space of the cache folder."""
    needed = sum(tensor.elements for tensor in header.tensors) * dtype.itemsize
    memory, disk = available_memory(torch.device("cpu")), shutil.disk_usage(cache).free
    if memory is not None and needed > memory:
        raise BaseModelError(
            f"The conversion of '{gguf.name}' needs {size(needed)} of memory, but {size(memory)} are free. Close other "
            "programs, or name the original model, which is not converted."
        )
    if needed > disk:
        raise BaseModelError(
            f"The conversion of '{gguf.name}' needs {size(needed)} in the cache folder '{cache}', but {size(disk)} are "
            "free. Set LORAKIT_CACHE to a folder on a larger disk, or name the original model, which is not converted."
        )


def _require_used(gguf: Path, header: Header, model: PreTrainedModel) -> None:
    """Reject a file with more weights than its model: transformers drops silently what the model has no place for."""
    head, embedding = cast(Any, model.get_output_embeddings()), model.get_input_embeddings()
    tied = {"output.weight"} if head.weight is embedding.weight else set()
    stored = {
        tensor.name: tensor.elements
        for tensor in header.tensors
        if tensor.name not in tied and not any(part in _UNUSED for part in tensor.name.split("."))
    }
    own = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    surplus = sum(stored.values()) - sum(own.values())
    if surplus <= 0:
        return
    unused = sorted(stored.keys() - _names_in_gguf(header, model))
    named = ""
    if (
        sum(stored[name] for name in unused) == surplus
    ):  # else the names of this architecture are not known
        named = f" {', '.join(repr(name) for name in unused[:3])} ({counted(len(unused), 'tensor')} in all) with"
    raise BaseModelError(
        f"'{gguf}' holds{named} {counted(surplus, 'weight')} that its {model.config.model_type} model of "
        f"{counted(model.config.num_hidden_layers, 'layer')} does not use, so it would compute something else. "
        "Download the file again, or name the original model."
    )


def _require_finite(gguf: Path, model: PreTrainedModel) -> None:
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise BaseModelError(
                f"'{gguf}' has weights that are NaN or infinite, the first in '{name}'. Download the file again."
            )


def _names_in_gguf(header: Header, model: PreTrainedModel) -> set[str]:
    """Return the names in the file of the model's tensors, as far as the package gguf knows them."""
    import gguf as library

    by_name = {name: kind for kind, name in library.MODEL_ARCH_NAMES.items()}
    kind = by_name.get(header.settings["general.architecture"])
    if kind is None:
        return set()
    names = library.get_tensor_name_map(kind, model.config.num_hidden_layers)
    known = (names.get_name(key, try_suffixes=(".weight", ".bias")) for key in model.state_dict())
    return {name for name in known if name is not None}


def _read_model(gguf: Path, config: PretrainedConfig, header: Header) -> PreTrainedModel:
    import transformers

    auto = (
        transformers.AutoModelForSeq2SeqLM
        if config.is_encoder_decoder
        else transformers.AutoModelForCausalLM
    )
    options: dict[str, Any] = {
        "gguf_file": gguf.name,
        "config": config,
        "dtype": config.dtype,
        "output_loading_info": True,
        "use_kernels": False,  # as in `loading`
    }
    if hasattr(transformers, "GgufConfig"):  # newer versions can keep the weights quantised
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with redirect_stderr(io.StringIO()):  # no setting disables its progress bar
        source, info = cast(Any, auto.from_pretrained(str(gguf.parent), **options))
    if info["missing_keys"]:
        raise BaseModelError(
            f"'{gguf}' lacks weights that a {config.model_type} model needs: "
            f"{', '.join(sorted(info['missing_keys'])[:3])} ({len(info['missing_keys'])} in all). "
            "Download the file again, or name the original model."
        )
    _require_used(gguf, header, source)
    if config.model_type == "llama" and "llama.attention.head_count_kv" not in header.settings:
        _restore_row_order(source)
    settings = source.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        settings.pop(key, None)
    config = type(source.config).from_dict(settings)
    # transformers refuses to save a model loaded from GGUF, so a new model gets its tensors.
    with torch.device("meta"):
        model = type(source)(config)
    model.load_state_dict(source.state_dict(), strict=True, assign=True)
    # A T5 model with a head of its own is not tied, although its configuration says so.
    model.all_tied_weights_keys = source.all_tied_weights_keys
    model.tie_weights(recompute_mapping=False)
    model.generation_config = source.generation_config
    return model


def _restore_row_order(model: PreTrainedModel) -> None:
    """Undo llama.cpp's order of query and key rows in a Llama with as many key heads as query heads.

    llama.cpp rotates neighbouring rows, transformers those of the two halves of a head. transformers reorders the rows
    only if the file has the number of key heads, which is optional.
    """
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows, columns = weight.shape
            heads = model.config.num_attention_heads
            pairs = weight.data.reshape(heads, rows // heads // 2, 2, columns)
            weight.data = pairs.transpose(1, 2).reshape(rows, columns)

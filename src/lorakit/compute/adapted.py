"""Open a base model with an adapter, by what the adapter's file records about its training."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path, PurePath

from torch import nn
from transformers import PreTrainedTokenizerBase

from lorakit.adapters.formats.stored import StoredAdapter
from lorakit.adapters.loading import load
from lorakit.compute.adapter_file import AdapterFile, opening_task
from lorakit.compute.base import OTHER_CLASSES, open_base, read_text_tokenizer
from lorakit.data import DataTask
from lorakit.errors import AdapterFileError, ConfigurationError
from lorakit.formatting import visible
from lorakit.models.base_config import BaseConfig, as_base_config
from lorakit.models.heads import input_embeddings, logits_layer
from lorakit.models.loading import NEW_WEIGHTS, Base, set_padding
from lorakit.models.sources import is_gguf, resolve
from lorakit.models.tree import is_inside

_LOG = logging.getLogger(__name__)

TEXT = DataTask(name="completion", labels=())
"""The task if neither the configuration nor the adapter's file names one: text generation."""

ADAPTER = "adapter"
"""Name of the adapter on its model."""


def tokenizer_of_adapted(
    base: BaseConfig | None, adapter: AdapterFile | None
) -> PreTrainedTokenizerBase:
    """Read the tokenizer that `open_adapted` returns, without the model.

    Raises:
        LorakitError: No model is named, or the tokenizer cannot be read.
    """
    own = None if adapter is None else adapter.tokenizer
    return read_text_tokenizer(base_of(base, adapter)) if own is None else own


def open_adapted(
    base: BaseConfig | str | None,
    adapter: AdapterFile | None,
    *,
    task: DataTask | None = None,
    allow_other_base: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Base:
    """Load a base, log its notices, and activate an adapter on it.

    Args:
        base: The base model; None is the one that the adapter records, as is one without a name.
        adapter: The adapter; None leaves the base as it is.
        task: The task, which determines the model's head; None is that of `opening_task`, else text generation.
        allow_other_base: Accept a base other than the one the adapter records.
        tokenizer: What `tokenizer_of_adapted` returned, if it has read the tokenizer before.

    Returns:
        The base, with the tokenizer of the adapter's folder if it has one.

    Raises:
        LorakitError: The base or the adapter cannot be read, or do not fit each other.
    """
    base = base_of(base, adapter)
    if adapter is None:
        opened = open_base(base, task or TEXT, tokenizer=tokenizer)
        _log(opened, opened.notices)
        return opened
    of_base = tokenizer if adapter.tokenizer is None else None
    task, outputs = (task, None) if task else opening_task(adapter)
    opened = open_base(base, task or TEXT, num_labels=outputs, tokenizer=of_base)
    require_new_weights(opened, adapter.stored, adapter.path)
    head = logits_layer(opened.model)
    has_head = head is not None and any(is_inside(name, head) for name in adapter.stored.trained)
    replaced = (NEW_WEIGHTS, OTHER_CLASSES) if has_head else NEW_WEIGHTS
    opened.notices = [n for n in opened.notices if not n.startswith(replaced)]
    _log(opened, opened.notices)
    opened.tokenizer = add_adapter(opened, adapter, allow_other_base=allow_other_base)
    if adapter.tokenizer is not None:
        known = len(opened.notices)
        set_padding(opened)  # a classifier looks for the padding that its tokenizer writes
        _log(opened, opened.notices[known:])
    return opened


def _log(base: Base, notices: Sequence[str]) -> None:
    for notice in notices:
        _LOG.warning("%s", visible(f"{base.source.name}: {notice}"))


def require_new_weights(base: Base, stored: StoredAdapter, path: str | Path) -> None:
    """Reject an adapter without the weights that its base lacks, such as a head: they would be random.

    Raises:
        AdapterFileError: The adapter lacks them.
    """
    if missing := [name for name in base.new_weights if name not in stored.trained]:
        raise AdapterFileError(
            f"'{path}' has no tensors for '{missing[0]}', which the base lacks: its answers would be random. Train the "
            "adapter with a head of its own (train_modules), or use a base that has a head."
        )


def base_of(base: BaseConfig | str | None, adapter: AdapterFile | None) -> BaseConfig:
    """Return `base`, with the name and revision that the adapter records if it has none, and for `auto` its dtype.

    The dtype of training makes results comparable. A quantised base is not loaded again in 4 or 8 bits by itself.

    Raises:
        ConfigurationError: `base` is no base, neither it nor the adapter names a model, or the adapter names a GGUF
            file that is not in this folder.
    """
    base = as_base_config(base)
    if adapter is None:
        if not base.name:
            raise ConfigurationError("Name a model: --base.name smollm2-135m, or --adapter FOLDER.")
        return base
    stored, dtype = adapter.stored, adapter.stored.setting("base", "dtype")
    if base.dtype == "auto" and dtype in ("float32", "bfloat16"):
        base = dataclasses.replace(base, dtype=dtype)
    if base.name:
        return base
    if (name := stored.base_name) is None:
        raise ConfigurationError(
            f"The adapter {adapter.path} does not say which base it was made for. Name it: --base.name MODEL."
        )
    # For a file of lorakit, the weights are compared: another commit of a hub base may have the same.
    return recorded_base(base, name, (stored.from_peft or {}).get("revision"))


def recorded_base(base: BaseConfig, name: str, revision: str | None) -> BaseConfig:
    """Return `base` with a recorded name, and with its revision if the name is one of the hub's and `base` has none.

    Raises:
        ConfigurationError: It is the name of a GGUF file, whose folder is not recorded, and not in this folder.
    """
    is_file_name = is_gguf(name) and PurePath(name).name == name
    if is_file_name and not os.path.exists(name):  # `resolve` explains a missing path
        raise ConfigurationError(
            f"The adapter was made for the GGUF file '{name}', which is not in this folder. Name its path: --base.name "
            f"PATH/{name}."
        )
    if base.revision is None and revision is not None and resolve(name).kind == "hub":
        return dataclasses.replace(base, name=name, revision=revision)
    return dataclasses.replace(base, name=name)


def add_adapter(
    base: Base, adapter: AdapterFile, *, name: str = ADAPTER, allow_other_base: bool = False
) -> PreTrainedTokenizerBase | None:
    """Load and activate an adapter on an open base; return the tokenizer of the adapter's folder, else the base's.

    Raises:
        LorakitError: The base and the adapter do not fit each other. The model is unchanged.
    """
    own = adapter.tokenizer
    if own is not None:
        require_known_tokens(base, own, adapter.path)
    load(
        base.model,
        dataclasses.replace(adapter.stored, path=adapter.path),
        name=name,
        allow_other_base=allow_other_base,
        tokenizer=base.tokenizer if own is None else None,
    )
    return base.tokenizer if own is None else own


def require_known_tokens(base: Base, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Reject the tokenizer of a fine-tuned model if it has added tokens without an embedding.

    Raises:
        AdapterFileError: There are such tokens.
    """
    embeddings = input_embeddings(base.model)
    known = {} if base.tokenizer is None else base.tokenizer.get_vocab()
    # The tokenizers of some bases have more tokens than the base has embeddings (Gemma 3 1B).
    added = (i for token, i in tokenizer.get_vocab().items() if known.get(token) != i)
    ids = 1 + max(added, default=-1)
    if isinstance(embeddings, nn.Embedding) and ids > embeddings.num_embeddings:
        raise AdapterFileError(
            f"The tokenizer in {path} has {ids:,} tokens, and the base has {embeddings.num_embeddings:,} "
            "embeddings: the vocabulary had grown before training. Save the grown base as a folder, and name it: "
            "--base.name FOLDER."
        )

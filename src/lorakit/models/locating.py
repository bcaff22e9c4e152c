"""Locate a base model on this machine or on the hub, and read its configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit import storage
from lorakit.errors import BaseModelError
from lorakit.models.declared_sizes import check_declared
from lorakit.models.gguf import conversion_notices, converted_folder, described_folder
from lorakit.models.hub import locate_on_hub
from lorakit.models.sources import ModelSource, adapter_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A base model that transformers can load, with notices for the user."""

    source: ModelSource
    """The source; for the hub, its revision is the commit."""
    path: str
    """The folder or hub id."""
    files: Sequence[str]
    """Names of the files there."""
    options: dict[str, Any]
    """Options of transformers for this path."""
    notices: list[str]


def locate(source: ModelSource, trust_remote_code: bool, *, weights: bool) -> Located:
    """Locate a base model. Without `weights`, a GGUF file is not converted."""
    path, notices = source.path_or_id, []
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.kind == "hub":
        found = locate_on_hub(source)
        source = replace(source, revision=found.commit, from_cache=bool(found.problem))
        options |= {"revision": found.commit, "local_files_only": source.from_cache}
        files = found.files
        if problem := found.problem:
            notices = [f"{problem[0].upper()}{problem[1:]}; the copy in the local cache is used."]
    else:
        if source.kind == "gguf":
            folder = (converted_folder if weights else described_folder)(Path(path))
            path, notices = str(folder), conversion_notices(folder)
        with storage.reading(path, BaseModelError):
            files = os.listdir(path)
    if adapter := adapter_file(files):
        notices.append(
            f"'{source.name}' also holds an adapter ({adapter}), which is not loaded: the weights are the base model's "
            "own."
        )
    return Located(source=source, path=path, files=files, options=options, notices=notices)


def read_config(located: Located) -> PretrainedConfig:
    """Read the configuration of a located model, after a check of its sizes. It can raise almost any exception."""
    from transformers import AutoConfig, PretrainedConfig

    path, options = located.path, located.options
    check_declared(located.source.name, PretrainedConfig.get_config_dict(path, **options)[0], path)
    return AutoConfig.from_pretrained(path, **options)

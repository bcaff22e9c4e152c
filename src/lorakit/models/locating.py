"""Locate a base model on this machine or on the hub, and read its configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.models.declared_sizes import check_declared
from lorakit.models.gguf import conversion_notices, converted_folder, described_folder
from lorakit.models.hub import locate_on_hub
from lorakit.models.sources import ModelSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def locate(
    source: ModelSource, trust_remote_code: bool, *, weights: bool
) -> tuple[ModelSource, str, dict[str, Any], list[str]]:
    """Return the located source, its path or hub id, options for transformers, and notices.

    Without `weights`, a GGUF file is not converted.
    """
    path, notices = source.path_or_id, []
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.kind == "hub":
        commit, reachable = locate_on_hub(source)
        source = replace(source, revision=commit)
        options |= {"revision": commit, "local_files_only": not reachable}
        if not reachable:
            notices = ["The hub cannot be reached; the copy in the local cache is used."]
    elif source.kind == "gguf":
        folder = (converted_folder if weights else described_folder)(Path(path))
        path, notices = str(folder), conversion_notices(folder)
    return source, path, options, notices


def read_config(name: str, path: str, options: dict[str, Any]) -> PretrainedConfig:
    """Read the configuration of a located model, after a check of its sizes. It can raise almost any exception."""
    from transformers import AutoConfig, PretrainedConfig

    check_declared(name, PretrainedConfig.get_config_dict(path, **options)[0], path)
    return AutoConfig.from_pretrained(path, **options)

"""Locate a model on the Hugging Face hub or in its local cache."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import BaseModelError
from lorakit.models.sources import ModelSource, check_files, did_you_mean


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the hub."""

    commit: str
    files: tuple[str, ...]
    """Names of its files outside folders; without the hub, of those in the local cache."""
    problem: str = ""
    """Why the hub cannot be used; empty if it can."""


_KEPT, _FAILURE_KEPT = 60, 10
"""Seconds for which an answer about a model, and a failed request, is kept: a command asks several times, and each
request can take long."""
_KNOWN: dict[tuple[str, str | None], tuple[float, HubModel]] = {}
"""The times and answers of the hub, by name and revision, and by name and commit."""


def locate_on_hub(source: ModelSource) -> HubModel:
    """Return the commit and the files of a model; without the hub, those of its copy in the local cache.

    Model and tokenizer then come from the same commit.

    Raises:
        BaseModelError: The model or revision does not exist, it is an adapter or a GGUF file, this user has no access
            to it, the hub is unreachable and the cache has no copy, or the cache is not writable.
    """
    name, revision = source.path_or_id, source.revision
    asked, found = _KNOWN.get((name, revision), (0.0, None))
    if found is None or time.monotonic() - asked > (_FAILURE_KEPT if found.problem else _KEPT):
        found = _locate(name, revision)
        _KNOWN[name, revision] = _KNOWN[name, found.commit] = time.monotonic(), found
    return found


def _locate(name: str, revision: str | None) -> HubModel:
    from huggingface_hub import HfApi, errors, hf_hub_download, try_to_load_from_cache

    try:
        # This request distinguishes a wrong name from a network failure; a download would retry for half a minute.
        info = HfApi().model_info(name, revision=revision, timeout=20)
    # Without a network, the exception is that of the HTTP library that the hub client uses.
    except Exception as error:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        refused = isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError)
        if refused or not isinstance(cached, str):
            raise _failure(name, revision, error) from error
        snapshot = Path(cached).parent
        return HubModel(snapshot.name, tuple(os.listdir(snapshot)), _problem(error))
    files = [file.rfilename for file in info.siblings or ()]
    check_files(name, files)
    try:
        # Under the name of the revision, not of its commit: the cache then records the commit of this revision, for
        # a load without the hub. This is also the first request that the hub refuses for a gated model.
        config = hf_hub_download(name, "config.json", revision=revision)
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        raise _failure(name, revision, error) from error
    except Exception as error:
        raise BaseModelError(
            f"'{name}' cannot be downloaded into the hub's cache ({type(error).__name__}: {str(error).rstrip('.')}). "
            "Check that $HF_HOME is a writable folder on a disk with free space. HF_HUB_OFFLINE=1 loads an older copy, "
            "if the cache has one."
        ) from error
    commit = info.sha or Path(config).parent.name
    return HubModel(commit, tuple(file for file in files if "/" not in file))


def _failure(name: str, revision: str | None, error: Exception) -> BaseModelError:
    """Return the error for a model that the hub refuses or cannot send."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return BaseModelError(
            f"'{name}' on the hub is gated. Accept its terms at https://huggingface.co/{name} and log "
            "in with: hf auth login"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return BaseModelError(
            f"No model '{name}' exists as a short name, a local path or a public model on the hub."
            f"{did_you_mean(name)} If it is private, log in with: hf auth login"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return BaseModelError(
            f"'{name}' on the hub has no revision '{revision}'. Name one of its branches, tags or commits, or leave "
            "the revision out."
        )
    return BaseModelError(
        f"'{name}' is not a short name, not a local path and not in the local cache, and {_problem(error)}."
        f"{did_you_mean(name)}"
    )


def _problem(error: Exception) -> str:
    from huggingface_hub import errors

    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE disables the hub"
    if isinstance(cause, errors.HfHubHTTPError | errors.FileMetadataError):
        message = " ".join(str(cause).split())
        return f"the hub answered with an error ({message[:300].rstrip('.')})"
    return "the hub cannot be reached"

"""Locate a model on the Hugging Face hub or in its local cache."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import BaseModelError
from lorakit.models.sources import ModelSource, check_files, did_you_mean

_KEPT = 60
"""Seconds for which the answer about a model is kept: a command asks several times, and each request can take long."""


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the hub.

    Attributes:
        commit: The commit.
        files: Names of its files; without the hub, of those in the local cache.
        problem: Why the hub cannot be used; empty if it can.
    """

    commit: str
    files: tuple[str, ...]
    problem: str = ""


def locate_on_hub(source: ModelSource) -> HubModel:
    """Return the commit and the files of a model; without the hub, those of its copy in the local cache.

    Model and tokenizer then come from the same commit.

    Raises:
        BaseModelError: The model or revision does not exist, it is an adapter or a GGUF file, this user has no access
            to it, or the hub is unreachable and the cache has no copy.
    """
    return _locate(source.path_or_id, source.revision, int(time.monotonic() / _KEPT))


@functools.lru_cache(maxsize=16)
def _locate(name: str, revision: str | None, _time: int) -> HubModel:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # The first request distinguishes a wrong name from a network failure; a download would retry for half a minute.
        info = HfApi().model_info(name, revision=revision, timeout=20)
        files = tuple(file.rfilename for file in info.siblings or ())
        check_files(name, files)
        # Under the name of the revision, not of its commit: the cache then records the commit of this revision, for
        # a load without the hub. This is also the first request that the hub refuses for a gated model.
        path = hf_hub_download(name, "config.json", revision=revision)
        return HubModel(Path(path).parent.name, files)
    except BaseModelError:
        raise
    except GatedRepoError as error:
        raise BaseModelError(
            f"'{name}' on the hub is gated. Accept its terms at https://huggingface.co/{name} and log "
            "in with: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseModelError(
            f"No model '{name}' exists as a short name, a local path or a public model on the hub."
            f"{did_you_mean(name)} If it is private, log in with: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise BaseModelError(
            f"'{name}' on the hub has no revision '{revision}'. Name one of its branches, tags or commits, or leave "
            "the revision out."
        ) from error
    # Without a network, the exception is that of the HTTP library that the hub client uses.
    except Exception as error:
        problem = _problem(error)
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            snapshot = Path(cached).parent
            return HubModel(snapshot.name, tuple(os.listdir(snapshot)), problem)
        raise BaseModelError(
            f"'{name}' is not a short name, not a local path and not in the local cache, and {problem}."
            f"{did_you_mean(name)}"
        ) from error


def _problem(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE disables the hub"
    if isinstance(error, HfHubHTTPError):
        message = " ".join(str(error).split())
        return f"the hub answered with an error ({message[:300].rstrip('.')})"
    return "the hub cannot be reached"

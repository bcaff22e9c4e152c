"""Locate a model on the Hugging Face hub or in its local cache."""

from __future__ import annotations

import os
from pathlib import Path

from lorakit.errors import BaseModelError
from lorakit.models.sources import ModelSource, did_you_mean


def locate_on_hub(source: ModelSource) -> tuple[str | None, bool]:
    """Return the model's commit, and whether the hub is reachable: if not, it is the commit in the local cache.

    One request distinguishes a wrong name from a network failure; ``from_pretrained`` would retry
    for half a minute. Model and tokenizer then come from the same commit.

    Raises:
        BaseModelError: the model or revision does not exist, this user has no access to it, or the
            hub is unreachable and the cache has no copy.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, revision = source.path_or_id, source.revision
    try:
        return HfApi().model_info(name, revision=revision, timeout=20).sha, True
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
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent.name, False
        if isinstance(error, OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE disables the hub"
        elif isinstance(error, HfHubHTTPError):
            reason = f"the hub answered with an error ({error})"
        else:
            reason = "the hub cannot be reached"
        raise BaseModelError(
            f"'{name}' is not a short name, not a local path and not in the local cache, and {reason}."
            f"{did_you_mean(name)}"
        ) from error


def files_on_hub(name: str, commit: str | None, *, reachable: bool) -> list[str]:
    """Return the names of a model's files on the hub; without the hub, those in the local cache."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if reachable:
        return HfApi().list_repo_files(name, revision=commit)
    cached = try_to_load_from_cache(name, "config.json", revision=commit)
    return os.listdir(Path(cached).parent) if isinstance(cached, str) else []

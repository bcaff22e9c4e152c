"""Where a model is on the Hugging Face hub, or in the local copy of it."""

from __future__ import annotations

from pathlib import Path

from lorakit.errors import BaseModelError
from lorakit.models.sources import ModelSource, did_you_mean


def locate_on_hub(source: ModelSource) -> tuple[str | None, bool]:
    """Return the model's commit, and whether the hub can be reached; else the cache must have it.

    Asking once tells a wrong name from a network that is down, at once; ``from_pretrained`` would
    retry for half a minute. Model and tokenizer then come from the same commit.

    Raises:
        BaseModelError: there is no such model or revision, it is closed to this user, or the hub
            cannot be reached and the cache has no copy.
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
            f"'{name}' on the hub is open only to those who accepted its terms. Accept them at "
            f"https://huggingface.co/{name} and log in with: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseModelError(
            f"There is no model '{name}': no such short name, local path, or public model on the "
            f"hub.{did_you_mean(name)} If it is private, log in with: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise BaseModelError(f"'{name}' on the hub has no revision '{revision}'.") from error
    # Without a network the exception is the HTTP library's, whichever the hub client uses.
    except Exception as error:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent.name, False
        if isinstance(error, OfflineModeIsEnabled):
            reason = "the hub is switched off by HF_HUB_OFFLINE"
        elif isinstance(error, HfHubHTTPError):
            reason = f"the hub answered with an error ({error})"
        else:
            reason = "the hub cannot be reached"
        raise BaseModelError(
            f"'{name}' is no short name, no local path and not in the local cache, and {reason}."
            f"{did_you_mean(name)}"
        ) from error

"""Log-probabilities of an answer's tokens under the base alone: what the adapters changed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from lorakit.serving.http.errors import unknown_model
from lorakit.serving.http.keys import Key
from lorakit.serving.http.logprobs import finite
from lorakit.serving.http.state import RequestRecord, Serving


def require_base(serving: Serving, key: Key) -> None:
    """Reject a request for the base's log-probabilities before its answer is computed. Runs in a worker thread.

    Raises:
        ApiError: The key may not use the base.
        AdapterStateError: The base cannot compute alone, because its head is not trained.
    """
    name = serving.settings.base_name
    if not key.allows(name):
        raise unknown_model(name, serving.models(key), "base_logprobs")
    serving.store.acquire(None).release()


async def base_logprobs(
    serving: Serving, record: RequestRecord, prompt: Sequence[int], tokens: Sequence[int]
) -> list[float]:
    """Return the log-probabilities of the tokens of an answer, by one forward pass of the base.

    The lease of the base is released after the pass, also if nobody waits for it any more.

    Args:
        serving: The server.
        record: The HTTP request.
        prompt: Token ids of the prompt.
        tokens: Token ids of the answer.

    Raises:
        LorakitError: The engine has ended.
    """
    # A record of its own: the metrics count the request under its adapters.
    own = RequestRecord(record.id, record.began, record.key)
    lease, _ = await serving.acquire_and_prepare(
        own, lambda lease: None, serving.settings.base_name
    )
    future = serving.submit_leased(
        lease, lambda: serving.engine.score([*prompt, *tokens], lease, start=len(prompt))
    )
    return [finite(value) for value in await asyncio.wrap_future(future)]

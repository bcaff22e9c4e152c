"""GET /v1/models, and the routes that load and unload adapters."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from lorakit.errors import LorakitError
from lorakit.serving.errors import EngineStoppedError, StoreFullError, UnknownAdapterError
from lorakit.serving.http.answers import LoadAnswer, Model, Models
from lorakit.serving.http.body import StrictRoute
from lorakit.serving.http.errors import ApiError, unknown_model, without_folders
from lorakit.serving.http.keys import Key
from lorakit.serving.http.schemas import LoadRequest, UnloadRequest
from lorakit.serving.http.state import Serving, record_of, serving_of
from lorakit.version import __version__

router = APIRouter(route_class=StrictRoute)

_SHOWN_LIMITS = (
    "max_tokens",
    "max_choices",
    "max_blend",
    "max_stops",
    "max_top_logprobs",
    "max_messages",
)
"""Limits in the details of every model, for clients that let users choose."""


@router.get("/v1/models")
async def list_models(request: Request) -> Models:
    """List the base, then each adapter that the key may use."""
    serving, key = serving_of(request), record_of(request).key

    def find() -> Models:
        described = serving.store.describe_base()
        return Models(data=[_model(serving, name, described) for name in serving.models(key)])

    return await serving.in_worker(find)


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> Model:
    """Describe a model."""
    serving, key = serving_of(request), record_of(request).key

    def find() -> Model:
        serving.require_model(key, model)
        return _model(serving, model, serving.store.describe_base())

    return await serving.in_worker(find)


@router.post("/v1/load_lora_adapter")
async def load_adapter(request: Request, body: LoadRequest) -> LoadAnswer:
    """Load an adapter from a folder inside the server's folder of adapters."""
    serving, name = serving_of(request), body.lora_name
    key = record_of(request).key
    _require_operator(serving, key, name)
    if name == serving.base_name:
        raise ApiError(
            400,
            f"'lora_name' is {name!r}, the name of the base. Choose another.",
            param="lora_name",
        )

    def add() -> None:
        if name in serving.store.names() and not body.load_inplace:
            raise ApiError(
                400,
                f"There is an adapter {name!r} already. Set load_inplace: true to replace it.",
                param="lora_name",
                code="name_taken",
            )
        try:
            serving.store.add(name, body.lora_path, replace=body.load_inplace, allows=key.allows)
        except (EngineStoppedError, StoreFullError, UnknownAdapterError):
            raise
        except LorakitError as error:
            message = without_folders(str(error))
            raise ApiError(400, message, param="lora_path", code="cannot_be_served") from error

    await asyncio.wrap_future(serving.loaders.submit(add))
    return LoadAnswer(id=name, status="loaded")


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(request: Request, body: UnloadRequest) -> LoadAnswer:
    """Unload an adapter. Requests in flight finish with it; then its memory is freed."""
    serving, name = serving_of(request), body.lora_name
    key = record_of(request).key
    _require_operator(serving, key, name)
    if name == serving.base_name:
        raise ApiError(
            400,
            f"'lora_name' is {name!r}, the base. Only adapters can be unloaded.",
            param="lora_name",
        )
    try:
        await serving.in_worker(partial(serving.store.remove, name))
    except UnknownAdapterError:
        known = await serving.in_worker(partial(serving.models, key))
        raise unknown_model(name, known, "lora_name") from None
    return LoadAnswer(id=name, status="unloaded")


def _require_operator(serving: Serving, key: Key, name: str) -> None:
    if not serving.config.allow_loading:
        raise ApiError(
            403,
            "This server does not load or unload adapters by HTTP. Start it with --allow_loading true.",
            code="allow_loading",
        )
    if not key.operator:
        raise ApiError(
            403,
            f"The key {key.name!r} may not load or unload adapters (operator).",
            code="operator",
        )
    if not key.allows(name):
        raise ApiError(
            403,
            f"The key {key.name!r} may not use the name {name!r:.200} (adapters).",
            param="lora_name",
        )


def _model(serving: Serving, name: str, described: dict[str, Any]) -> Model:
    """Describe a model; `described` is of the base."""
    base, created, engine = serving.base_name, int(serving.began), serving.engine
    limits = {name: getattr(serving.config, name) for name in _SHOWN_LIMITS}
    # Adapters have these too: a key may allow adapters without the base.
    shared = {"kind": described["kind"], "context": engine.limits.context, "limits": limits}
    if name == base:
        details = {
            **described,
            **shared,
            "engine": engine.name,
            "notice": engine.notice,
            "version": __version__,
        }
        return Model(id=name, created=created, root=base, parent=None, details=details)
    try:
        details = serving.store.describe(name)
    except LorakitError as error:  # the list stays whole where one adapter is damaged
        details = {"error": str(error)}
    if details.get("error"):
        details["error"] = without_folders(details["error"])
    root = Path(str(details.pop("path", None) or name)).name
    details.pop("base", None)
    return Model(id=name, created=created, root=root, parent=base, details={**details, **shared})

"""The application: all routes, inside the envelope that checks keys and answers errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from lorakit.serving.http import (
    adapters,
    chat,
    classify,
    completions,
    operations,
    playground,
    reports,
)
from lorakit.serving.http.envelope import Envelope
from lorakit.serving.http.errors import ErrorAnswer, answer_http_error, answer_validation_error
from lorakit.serving.http.keys import KeyRing
from lorakit.serving.http.state import Serving
from lorakit.serving.serve_config import ServeConfig
from lorakit.serving.store import AdapterStore
from lorakit.serving.threaded_engine import ThreadedEngine
from lorakit.serving.verification import Verifier
from lorakit.version import __version__

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in {
        400: "The request is invalid, or exceeds a limit",
        401: "There is no valid API key",
        403: "The key, or the server, does not allow it",
        404: "The model does not exist, or the key may not use it",
        405: "The route does not have this method",
        408: "The request, or its body, took too long",
        413: "The body is too large",
        415: "The body is not JSON by its content-type",
        429: "The queue is full, or the key's rate is exceeded",
        500: "The server failed",
        503: "The server cannot answer now",
    }.items()
}


def create_app(
    engine: ThreadedEngine,
    store: AdapterStore,
    config: ServeConfig,
    *,
    base_name: str,
    keys: KeyRing | None = None,
    verifier: Verifier | None = None,
) -> FastAPI:
    """Return the application.

    Args:
        engine: Generates text. A `ClassifyingEngine` computes classes and scores instead.
        store: The adapters.
        config: Options of `lorakit serve`. The application reads its limits, switches and allowed hosts.
        base_name: Name of the base in the field `model`.
        keys: The API keys; None answers everyone.
        verifier: Replays a share of the answers; None replays none.
    """
    app = FastAPI(
        title="lorakit",
        version=__version__,
        description="Many adapters on one base, with an OpenAI-compatible API.",
        docs_url=None,  # the pages load scripts of other sites
        redoc_url=None,
        redirect_slashes=False,  # a redirect repeats the client's Host header
        responses=_ERRORS,
    )
    app.state.serving = Serving(engine, store, config, base_name, keys, verifier)
    for module in (completions, chat, classify, adapters, reports, operations, playground):
        app.include_router(module.router)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(RequestValidationError, answer_validation_error)
    app.add_middleware(Envelope, serving=app.state.serving)
    document = app.openapi

    def openapi() -> dict[str, Any]:
        """Return the document without 422, FastAPI's status for what OpenAI and this server answer with 400."""
        for route in document()["paths"].values():
            for method in route.values():
                method["responses"].pop("422", None)
        return document()

    app.openapi = openapi
    return app

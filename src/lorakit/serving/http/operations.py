"""GET /health and /metrics."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from lorakit.serving.errors import EngineStoppedError
from lorakit.serving.http.answers import Health
from lorakit.serving.http.envelope import HEALTH
from lorakit.serving.http.errors import ApiError
from lorakit.serving.http.state import record_of, serving_of

router = APIRouter()


@router.get(HEALTH)
async def health(request: Request) -> Health:
    """Return 200 while the server answers requests; 503 once the engine is dead or the server shuts down."""
    if problem := serving_of(request).problem():
        raise EngineStoppedError(problem)
    return Health()


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Return the numbers of the server for Prometheus. They have the names of all adapters."""
    key = record_of(request).key
    if not key.operator:
        raise ApiError(
            403, f"The key {key.name!r} may not read the metrics (operator).", code="operator"
        )
    page = await serving_of(request).in_worker(serving_of(request).metrics.page)
    return Response(page, media_type=CONTENT_TYPE_LATEST)

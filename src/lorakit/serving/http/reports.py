"""GET /v1/reports/NAME: the report of the run that an adapter comes from."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorakit.serving.http.errors import ApiError
from lorakit.serving.http.state import record_of, serving_of
from lorakit.serving.reports import LARGEST, read_report

router = APIRouter()

_HEADERS = {
    # The file is the adapter maker's. In a sandbox it has an origin of its own, and runs no script.
    "content-security-policy": (
        "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:"
    ),
    "x-content-type-options": "nosniff",
}


@router.get(
    "/v1/reports/{model:path}",
    response_class=Response,
    responses={200: {"content": {"text/html": {"schema": {"type": "string"}}}}},
)
async def get_report(request: Request, model: str) -> Response:
    """Return the report of an adapter's run as a page without scripts."""
    serving, key = serving_of(request), record_of(request).key

    def read() -> bytes:
        serving.require_model(key, model)
        path = None if model == serving.base_name else serving.store.report(model)
        if path is None:
            raise ApiError(
                404,
                f"{model!r:.200} has no report: there is no report.html of at most {LARGEST:,} bytes in the run folder "
                "of an adapter. lorakit report RUN writes one.",
                param="model",
                code="report_not_found",
            )
        return read_report(path)

    page = await serving.in_worker(read)
    return Response(page, media_type="text/html", headers=_HEADERS)

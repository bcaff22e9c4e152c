"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from lorakit.errors import AdapterStateError, DataError, LorakitError, nearest
from lorakit.formatting import counted, listed, visible
from lorakit.serving.errors import EngineStoppedError, StoreFullError, UnknownAdapterError

LOG = logging.getLogger("lorakit.serving")

RETRY_SECONDS = 1
"""Value of Retry-After where nothing better is known."""
_FOLDERS = re.compile(
    r"""(?<=')(?:[A-Za-z]:(?=[\\/])|[\\/])[^'\n]*[\\/](?=[^'\\/]+[\\/]+[^'\\/]+')"""
)
"""The folders before the last two parts of a path between quotation marks, of POSIX or Windows. They are not the
client's business."""
PLAIN = "The server failed. Its log has the details, under the x-request-id of this answer."
"""Message of an unexpected exception: shows nothing of the server's inside."""


class ErrorContent(BaseModel):
    """What is wrong with a request, or with the server."""

    message: str
    type: str
    """`invalid_request_error`, `authentication_error`, `permission_error`, `rate_limit_error` or `server_error`."""
    param: str | None = None
    """The field at fault."""
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every answer with a status of 400 or more."""

    error: ErrorContent


class ApiError(HTTPException):
    """An error with its status, for the client.

    Args:
        status: The HTTP status.
        message: What was found, what was expected, and what to write instead.
        param: The field at fault.
        code: The kind of error, for programs.
        retry: Seconds after which the same request may succeed; None if it never does.
        final: Whether to stop OpenAI's client from sending the request again, as it does after 408 and 5xx.
        close: Whether to close the connection, because the rest of the body is not read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry: float | None = None,
        final: bool = False,
        close: bool = False,
    ) -> None:
        headers = {} if retry is None else {"retry-after": str(max(1, -int(-retry // 1)))}
        headers |= {"x-should-retry": "false"} if final else {}
        headers |= {"connection": "close"} if close else {}
        headers |= {"www-authenticate": "Bearer"} if status == 401 else {}
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    @property
    def content(self) -> dict[str, Any]:
        """The body of the answer."""
        types = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        status, message = self.status_code, self.detail
        kind = "server_error" if status >= 500 else types.get(status, "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


class ClientGone(ApiError):
    """The client closed the connection before the answer was complete. Only the metrics see this status, nginx's."""

    def __init__(self) -> None:
        super().__init__(499, "The client closed the connection.")


def error_answer(error: ApiError) -> JSONResponse:
    """Return the answer for an error."""
    return JSONResponse(error.content, error.status_code, headers=error.headers)


def api_error(error: Exception, request_id: str) -> ApiError:
    """Return an exception as an error for the client; logs a failure of the server under the request's id."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownAdapterError):
        # Its message lists all adapters, also those that the key may not use.
        return ApiError(
            404, "The adapter was just unloaded.", param="model", code="model_not_found"
        )
    message = without_folders(str(error))
    if isinstance(error, StoreFullError):
        return ApiError(503, message, code="adapter_memory_full", retry=RETRY_SECONDS)
    if isinstance(error, EngineStoppedError):
        return ApiError(503, message, code="unavailable", retry=RETRY_SECONDS)
    if isinstance(error, AdapterStateError | DataError):
        return ApiError(400, message, code="invalid_value")
    if isinstance(error, LorakitError):
        LOG.warning("request %s failed: %s", request_id, visible(str(error)))
        return ApiError(500, message, code="cannot_be_served", final=True)
    LOG.error("request %s failed", request_id, exc_info=error)
    return ApiError(500, PLAIN, code="internal_error")


def without_folders(message: str) -> str:
    """Return a message for clients, without the folders of the server."""
    return _FOLDERS.sub("", message)


def invalid_value(message: str, param: str | None) -> ApiError:
    """Return the 400 for a value of a field that cannot be used."""
    return ApiError(400, message, param=param, code="invalid_value")


def require_at_most(field: str, value: int, most: int, limit: str, unit: str = "") -> None:
    """Raise the 400 for a field that exceeds one of the server's limits; `unit` is what `value` counts."""
    if value > most:
        has = f"has {value:,} {unit}" if unit else f"is {value:,}"
        raise ApiError(
            400,
            f"'{field}' {has}; this server allows at most {most:,} ({limit}).",
            param=field,
            code=limit,
        )


def unknown_model(name: str, known: Iterable[str], param: str = "model") -> ApiError:
    """Return the 404 for a model that does not exist, or that the key may not use."""
    names = list(known)
    return ApiError(
        404,
        f"There is no model {name!r:.200}.{nearest(name, names)} Models: {listed(names) or 'none'}.",
        param=param,
        code="model_not_found",
    )


# --- errors of routing and validation ------------------------------------------------------------------


async def answer_http_error(_: Request, error: Exception) -> JSONResponse:
    """Answer an error of routing, or one of ours."""
    if isinstance(error, ApiError):
        return error_answer(error)
    assert isinstance(error, HTTPException)
    reasons = {
        404: ("There is no such route. /openapi.json lists the routes.", "not_found"),
        405: (
            "The route does not have this method. /openapi.json lists the methods.",
            "method_not_allowed",
        ),
    }
    message, code = reasons.get(error.status_code, (str(error.detail), None))
    own = ApiError(error.status_code, message, code=code)
    own.headers = error.headers  # of 405, Allow
    return error_answer(own)


async def answer_validation_error(_: Request, error: Exception) -> JSONResponse:
    """Answer a body that does not fit the route with its first problem."""
    assert isinstance(error, RequestValidationError)
    return error_answer(validation_error(error.errors()))


def validation_error(problems: Iterable[Mapping[str, Any]]) -> ApiError:
    """Return the 400 for problems that pydantic found, with the field at fault."""
    # In a union every member reports its problems; the longest path is the member that was meant.
    problem = max(problems, key=lambda p: len(_path(p)))
    path = _path(problem)
    param = ".".join(map(str, path)) or None
    kind, message, context = problem["type"], str(problem["msg"]), problem.get("ctx", {})
    name = f"'{param}'" if param else "The body"
    if kind == "missing":
        message = f"{name} is missing." if param else "The body is empty; send a JSON object."
        return ApiError(400, message, param=param, code="missing_field")
    if kind in ("unsupported", "unknown"):  # own kinds, whose path lacks the field
        param = ".".join(map(str, [*path, context["field"]]))
    if kind == "unsupported":
        return ApiError(400, message, param=param, code="unsupported_field")
    if kind == "unknown":
        message = f"'{param:.200}' is not a field of this route. /openapi.json lists the fields."
        return ApiError(400, message, param=param, code="unknown_field")
    expected = _expected(kind, message, context)
    return invalid_value(f"{name} is {_shown(problem.get('input'))}; it must {expected}.", param)


def _expected(kind: str, message: str, bounds: Mapping[str, Any]) -> str:
    """Return what a value must be or have, by the kind, the message and the bounds of pydantic's problem."""
    unit = "character" if kind.startswith("string_") else "item"
    if kind.endswith("too_short"):
        return f"have at least {counted(bounds['min_length'], unit)}"
    if kind.endswith("too_long"):
        return f"have at most {counted(bounds['max_length'], unit)}"
    return f"be {message.removeprefix('Value error, ').removeprefix('Input should be ')}"


def _path(problem: Mapping[str, Any]) -> list[str | int]:
    """Return the path of a field, without the names of union members that pydantic puts in."""
    path = [part for part in problem["loc"] if part not in ("body", "query", "path")]
    return [p for p in path if isinstance(p, int) or (p.isidentifier() and p not in _MEMBERS)]


_MEMBERS = frozenset({"str", "int", "float", "bool", "TextPart"})
"""Names of union members that look like fields."""


def _shown(value: object) -> str:
    """Return the first characters of a value as JSON."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 100 else f"{text[:100]}..."

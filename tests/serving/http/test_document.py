"""The OpenAPI document describes what the server does: generated requests, and answers held to their schemas."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import FakeClassifier, FakeStore
from hypothesis import HealthCheck, settings

schemathesis = pytest.importorskip("schemathesis")

from served import ANY_HOST, BASE

from lorakit.serving.http.app import create_app
from lorakit.serving.serve_config import ServeConfig

_store = FakeStore()
_app = create_app(
    FakeClassifier(),
    _store,
    ServeConfig(allow_loading=True, **ANY_HOST),
    base_name=BASE,
)
schema = schemathesis.openapi.from_asgi("/openapi.json", _app)


@schema.parametrize()
@pytest.mark.slow
@settings(max_examples=12, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_route_answers_by_its_document(case: Any) -> None:
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "sql"
    response = case.call()
    assert response.status_code < 500, response.text
    checks = schemathesis.checks
    case.validate_response(
        response,
        checks=[
            checks.not_a_server_error,
            *checks.CHECKS.get_by_names(
                [
                    "status_code_conformance",
                    "content_type_conformance",
                    "response_schema_conformance",
                ]
            ),
        ],
    )

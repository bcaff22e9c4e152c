"""The page for the browser: its files, their headers, and what needs no key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from served import Serve
from test_errors import error_of
from test_keys import ALL, bearer, ring

from lorakit.serving.http import playground
from lorakit.serving.http.playground import FILES, INDEX

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "img-src 'self' data:; frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def test_the_page_and_its_files(serve: Serve) -> None:
    client = serve().client
    page = client.get("/")
    assert page.content == FILES[INDEX].content
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
    for name, file in FILES.items():
        answer = client.get(f"/playground/{name}")
        assert answer.content == file.content
        assert answer.headers["content-type"].split(";")[0] == kinds[Path(name).suffix]
    assert {INDEX, "playground.css", "main.js"} <= FILES.keys()


@pytest.mark.parametrize("path", ["/", "/playground/main.js"])
def test_the_headers_of_the_page(serve: Serve, path: str) -> None:
    client = serve().client
    answer = client.get(path)
    tag = answer.headers["etag"]
    for known in (tag, f'"other", W/{tag}'):
        again = client.get(path, headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    changed = client.get(path, headers={"if-none-match": '"other"'})
    assert changed.content == answer.content != b""
    for one in (answer, again):
        assert one.headers["content-security-policy"] == POLICY
        assert one.headers["x-content-type-options"] == "nosniff"
        assert one.headers["referrer-policy"] == "no-referrer"
        assert one.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "name",
    ["", "nothing.js", "main.js/", "../playground.py", "..%2fplayground.py", "%2e%2e%2fapp.py",
     "%2fetc%2fpasswd", "main.js%00", "sub/main.js", "MAIN.JS"],
)  # fmt: skip
def test_another_name_is_no_route(serve: Serve, name: str) -> None:
    error = error_of(serve().client.get(f"/playground/{name}"), 404)
    assert error["code"] == "not_found"


def test_only_the_page_needs_no_key(serve: Serve, tmp_path: Path) -> None:
    client = serve(keys=ring(tmp_path, {"name": "all", "key": ALL})).client
    for path in playground.PUBLIC:
        assert client.get(path).status_code == 200
        assert client.get(path, headers={"authorization": "Bearer wrong"}).status_code == 200
        error_of(client.post(path), 401)
    for path in ("/playground/nothing.js", "/playground", "/playground/../v1/models"):
        error_of(client.get(path), 401)
    error_of(client.get("/playground/nothing.js", headers=bearer(ALL)), 404)


def test_the_page_has_its_host_only(serve: Serve) -> None:
    client = serve(host="127.0.0.1").client
    for path in playground.PUBLIC:
        error_of(client.get(path, headers={"host": "evil.example"}), 403)
        assert client.get(path, headers={"host": "127.0.0.1:8000"}).status_code == 200


def test_no_page_of_another_origin_reads_an_answer(serve: Serve) -> None:
    """A browser gives an answer to another origin only if a header allows it."""
    served = serve()
    headers = {"origin": "https://evil.example"}
    asked: dict[str, Any] = {"access-control-request-method": "POST"}
    answers = [
        *(served.client.get(path, headers=headers) for path in ("/", "/v1/models", "/health")),
        served.client.post(
            "/v1/completions", json={"model": "sql", "prompt": "a"}, headers=headers
        ),
        served.client.options("/v1/completions", headers={**headers, **asked}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 405]
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control")]


SIMPLE = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "")
"""Types that a page of another origin can send without a preflight request."""


@pytest.mark.parametrize("kind", [*SIMPLE, None])
def test_no_form_of_another_origin_is_accepted(serve: Serve, kind: str | None) -> None:
    served = serve(allow_loading=True)
    routes = served.client.get("/openapi.json").json()["paths"].items()
    posts = [path for path, methods in routes if "post" in methods]
    assert len(posts) >= 5
    for path in posts:
        own = {} if kind is None else {"content-type": kind}
        headers = {"origin": "https://evil.example", **own}
        answer = served.client.post(path, content=b'{"model": "sql"}', headers=headers)
        assert error_of(answer, 415)["code"] == "unsupported_media_type"

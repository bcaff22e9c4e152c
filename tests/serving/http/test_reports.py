"""The report of an adapter's run: which file is shown, and that its scripts never run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import BASE, Serve
from test_errors import error_of
from test_keys import SQL, bearer, ring
from whole import served

from lorakit.serving import reports
from lorakit.serving.reports import find_report
from lorakit.serving.store import AdapterStore

PAGE = "<!doctype html><script>alert(1)</script>é"


@pytest.fixture
def runs(text: Path, tmp_path: Path) -> Path:
    """A folder of adapters: a plain one, and two runs with a report."""
    root = tmp_path / "adapters"
    shutil.copytree(text / "adapters/e2e", root / "plain")
    for name in ("run", "other"):
        shutil.copytree(text / "adapters/sql", root / name / "adapter")
        (root / name / "report.html").write_text(PAGE, encoding="utf-8")
    (tmp_path / "base").symlink_to(text / "base")
    return root


@pytest.fixture
def client(runs: Path) -> Iterator[Any]:
    with served(runs.parent, allow_loading=True) as (client, _):
        yield client


def test_a_report_is_a_page_without_scripts(client: Any) -> None:
    answer = client.get("/v1/reports/run")
    assert (answer.status_code, answer.content.decode("utf-8")) == (200, PAGE)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"] == (
        "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; font-src data:"
    )
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_list_says_who_has_a_report(client: Any, runs: Path) -> None:
    (runs / "other/report.html").unlink()
    models = client.get("/v1/models").json()["data"]
    found = {model["id"]: model["details"].get("report") for model in models}
    assert found == {"base": None, "other": False, "plain": False, "run": True}
    for name in ("base", "other", "plain"):
        error = error_of(client.get(f"/v1/reports/{name}"), 404)
        assert (error["param"], error["code"]) == ("model", "report_not_found")
        assert "lorakit report RUN" in error["message"]


@pytest.mark.parametrize(
    "name",
    ["", "nothing", "run/adapter", "../run", "..%2fother", "%2fetc%2fpasswd", "run/", "run%00",
     "run/report.html"],
)  # fmt: skip
def test_a_name_is_not_a_path(client: Any, name: str) -> None:
    error = error_of(client.get(f"/v1/reports/{name}"), 404)
    assert error["code"] in ("model_not_found", "not_found")


def hostile(kind: str, path: Path, outside: Path) -> None:
    outside.mkdir()
    (outside / "report.html").write_text("secret")
    run = path.parent
    if kind == "a link to a file outside":
        path.symlink_to(outside / "report.html")
    elif kind == "a relative link":
        path.symlink_to("../../outside/report.html")
    elif kind == "a link to the password file":
        path.symlink_to("/etc/passwd")
    elif kind == "a broken link":
        path.symlink_to(run / "nothing")
    elif kind == "a link to itself":
        path.symlink_to(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a large file":
        with path.open("wb") as file:
            file.truncate(reports.LARGEST + 1)
    elif kind == "a linked run":
        shutil.copytree(run / "adapter", outside / "adapter")
        shutil.rmtree(run)
        run.symlink_to(outside)
    else:
        raise AssertionError(kind)


KINDS = (
    "a link to a file outside",
    "a relative link",
    "a link to the password file",
    "a broken link",
    "a link to itself",
    "a folder",
    "a pipe",
    "a large file",
    "a linked run",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_not_the_runs_own_is_not_shown(client: Any, runs: Path, kind: str) -> None:
    path = runs / "run/report.html"
    path.unlink()
    hostile(kind, path, runs.parent / "outside")
    error = error_of(client.get("/v1/reports/run"), 404)
    assert "secret" not in str(error)
    models = client.get("/v1/models").json()["data"]
    assert [m["details"]["report"] for m in models if m["id"] == "run"] in ([], [False])


def test_a_link_within_the_folder_is_followed(client: Any, runs: Path) -> None:
    (runs / "run/report.html").unlink()
    (runs / "run/report.html").symlink_to(runs / "other/report.html")
    assert client.get("/v1/reports/run").status_code == 200


@pytest.mark.parametrize("path", ["run", "run/adapter", "run/adapter/"])
def test_an_adapter_under_another_name_has_its_runs_report(client: Any, path: str) -> None:
    body = {"lora_name": "again", "lora_path": path}
    assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert client.get("/v1/reports/again").status_code == 200


def test_a_file_that_grows_is_cut(client: Any, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_report(str(runs / "run/adapter"), runs)
    monkeypatch.setattr(reports, "LARGEST", 9)
    assert found is not None
    assert reports.read_report(found) == b"<!doctype"


def test_a_followed_run_shows_its_own_report(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(text / "adapters/sql", run / "best")
    with served(text, follow=[f"live={run}"]) as (client, opened):
        assert opened.store.report("live") is None
        (run / "report.html").write_text(PAGE, encoding="utf-8")
        assert client.get("/v1/reports/live").content.decode() == PAGE
        (run / "report.html").unlink()
        (run / "report.html").symlink_to(text / "adapters/sql/adapter_config.json")
        error_of(client.get("/v1/reports/live"), 404)
        models = client.get("/v1/models").json()["data"]
        assert [m["details"]["report"] for m in models if m["id"] == "live"] == [False]


def test_a_followed_run_without_an_adapter_has_none(text: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(PAGE)
    with served(text, follow=[f"live={tmp_path}"]) as (client, opened):
        assert isinstance(opened.store, AdapterStore)
        error_of(client.get("/v1/reports/live"), 404)
        assert opened.store.describe("live")["report"] is False


def test_a_key_reads_the_reports_of_its_own_models(serve: Serve, tmp_path: Path) -> None:
    served = serve(keys=ring(tmp_path, {"name": "sql", "key": SQL, "adapters": ["sql"]}))
    (tmp_path / "report.html").write_text(PAGE, encoding="utf-8")
    for name in ("sql", "e2e"):
        served.store.records[name] = {"task": "completion", "report": tmp_path / "report.html"}
    error_of(served.client.get("/v1/reports/sql"), 401)
    assert served.client.get("/v1/reports/sql", headers=bearer(SQL)).status_code == 200
    for name in ("e2e", BASE, "nobody"):
        error = error_of(served.client.get(f"/v1/reports/{name}", headers=bearer(SQL)), 404)
        assert error["code"] == "model_not_found"

"""The playground in Chromium loses nothing that people typed, and none of their conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from browser import HOSTILE, Browser, Opened
from playground_site import Site, answers, finish, panes, playground, send, site_of, until

from lorakit.serving.http.keys import KeyRing, read_keys

pytestmark = pytest.mark.slow  # each test opens pages


def test_nothing_typed_is_lost_before_the_models_are_there(browser: Browser, site: Site) -> None:
    link = site.link("sql", prompt="from the link")
    with browser.open("about:blank") as opened:
        page = opened.page
        page.route("**/v1/models", lambda route: route.abort())
        page.goto(link)
        page.wait_for_selector("#notice:visible")
        page.fill("#prompt", "The river")
        page.press("#prompt", "Enter")
        page.click("#settings summary")
        assert "does not answer" in page.inner_text("#notice")
        assert (page.input_value("#prompt"), page.url) == ("The river", link)
        assert "Send to try again" in page.inner_text("#notice")
        page.unroute("**/v1/models")
        page.click("#send")
        page.wait_for_selector(".pane")
        assert not page.is_visible("#notice")
        assert page.input_value("#prompt") == "The river"
        page.press("#prompt", "Enter")
        page.wait_for_selector(".turn .answer:not(.waiting)")
        assert answers(opened) == [site.chat("sql", "The river")]


def test_a_message_without_a_pane_stays(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("sql")) as opened:
        opened.page.click(".remove")
        opened.page.fill("#prompt", "The river")
        opened.page.press("#prompt", "Enter")
        assert "Add model" in opened.page.inner_text("#notice")
        assert opened.page.input_value("#prompt") == "The river"
        opened.page.click("#add-pane")
        opened.page.press("#prompt", "Enter")
        assert not opened.page.is_visible("#notice")


@pytest.mark.parametrize("end", ["send", "text"])
def test_a_draft_comes_back_after_an_edit(browser: Browser, site: Site, end: str) -> None:
    with playground(browser, site.link("base")) as opened:
        send(opened)
        opened.page.fill("#prompt", "a draft")
        opened.page.locator(".user button").first.click()
        if end == "send":
            send(opened, "The pub")
            assert panes(opened)[0].locator(".user p").all_text_contents() == ["The pub"]
        else:
            opened.page.check("[name=mode][value=text]")
        assert not opened.page.is_visible("#editing")
        assert opened.page.input_value("#prompt") == "a draft"


def test_a_key_asked_for_later_leaves_the_conversation(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("sql", "base")) as opened:
        page = opened.page
        send(opened)
        before = answers(opened)
        refused = {"status": 401, "json": {"error": {"message": "Send a key."}}}
        page.route("**/v1/chat/completions", lambda route: route.fulfill(**refused))
        page.fill("#prompt", "And the park?")
        page.press("#prompt", "Enter")
        page.wait_for_selector("#key-dialog[open]")
        for key in ("schlüssel" * 3, "k k"):
            page.fill("#key", key)
            page.press("#key", "Enter")
            assert "ASCII" in page.inner_text("#key-error")
        page.unroute("**/v1/chat/completions")
        page.fill("#key", f" {'k' * 24}")
        page.press("#key", "Enter")
        assert not page.is_visible("#key-dialog")
        for pane, first in zip(panes(opened), before, strict=True):
            pane.locator(".again").click()
            finish(opened)
            assert pane.locator(".answer").first.text_content() == first
        assert answers(opened) == [
            site.chat(name, "The river", first, "And the park?")
            for name, first in zip(("sql", "base"), before, strict=True)
        ]


def test_a_failed_answer_stays_marked_and_is_not_sent_on(browser: Browser, site: Site) -> None:
    cut = 'data: {"choices": [{"delta": {"content": "half"}}], "system_fingerprint": "base=1;sql=2"}\n\n'
    with playground(browser, site.link("sql")) as opened:
        page = opened.page
        page.route("**/v1/chat/completions", lambda route: route.fulfill(body=cut))
        send(opened)
        page.unroute("**/v1/chat/completions")
        assert "connection ended" in page.inner_text(".alert")
        send(opened, "And the park?")
        assert not page.is_visible(".alert")
        first, second = page.locator(".turn").all()
        assert first.locator(".answer").text_content() == "half"
        assert first.locator(".note").all_inner_texts() == [
            "The connection ended before the answer did.",
            "Later messages are sent without this message and its answer.",
        ]
        assert not [note for note in second.locator(".note").all_inner_texts() if "Later" in note]
        assert answers(opened) == [site.chat("sql", "And the park?")]


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ({"status": 429, "json": {"error": "slow down"}}, "The server answered 429"),
        ({"status": 502, "json": {"error": {"code": 1}}}, "The server answered 502"),
        ({"body": 'data: {"error": "slow down"}\n\n'}, "The server answered with an error: {"),
    ],
)
def test_an_error_in_another_form_is_shown(
    browser: Browser, site: Site, answer: dict[str, Any], shown: str
) -> None:
    with playground(browser, site.link("sql")) as opened:
        opened.page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer))
        send(opened)
        assert shown in opened.page.inner_text(".alert")
        assert "empty" not in opened.page.inner_text(".log")


def test_the_login_of_a_proxy_goes_with_requests(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("sql")) as opened:
        opened.run("void (document.cookie = 'login=1')")
        with opened.page.expect_request("**/v1/models") as found:
            opened.page.click(".card")
        assert found.value.all_headers()["cookie"] == "login=1"


def test_a_link_in_the_tab_of_the_page_opens(browser: Browser, site: Site) -> None:
    model = "document.querySelector('.model').value"
    with playground(browser, site.link("sql", top_k=5)) as opened:
        page = opened.page
        send(opened)
        page.fill("#prompt", "typed")
        page.goto(site.link("base", temperature=0))
        until(opened, f"{model} === 'base'")
        assert (page.input_value("#temperature"), page.input_value("#top_k")) == ("0", "0")
        assert page.input_value("#prompt") == "typed"
        assert page.locator(".turn").count() == 0
        page.goto(site.link("e2e", prompt="The river", temperature=0))
        until(opened, f"{model} === 'e2e'")
        assert page.input_value("#prompt") == "The river"
        page.press("#prompt", "Enter")
        page.wait_for_selector(".turn .answer:not(.waiting)")
        assert answers(opened) == [site.chat("e2e", "The river", temperature=0)]
        page.go_back()
        until(opened, f"{model} === 'base'")


def test_a_reader_of_an_earlier_turn_stays_there(browser: Browser, site: Site) -> None:
    piece = {"choices": [{"delta": {"content": "word\n" * 80}}], "system_fingerprint": "base=1"}
    stream = f"data: {json.dumps(piece)}\n\ndata: [DONE]\n\n"
    top = "document.querySelector('.log').scrollTop"
    with playground(browser, site.link("base")) as opened:
        page, held = opened.page, []
        page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream))
        send(opened)
        assert opened.run(top) > 0  # a reader at the end follows it
        page.unroute("**/v1/chat/completions")
        page.route("**/v1/chat/completions", lambda route: held.append(route))
        with page.expect_request("**/v1/chat/completions"):
            page.fill("#prompt", "And the park?")
            page.press("#prompt", "Enter")
        opened.run(f"{top} = 0")
        opened.run("getSelection().selectAllChildren(document.querySelector('.answer'))")
        while not held:
            page.wait_for_timeout(10)
        held[0].fulfill(body=stream)
        finish(opened)
        assert page.locator(".turn").count() == 2
        assert opened.run(top) == 0
        assert "word" in opened.run("getSelection().toString()")
        page.click("#settings summary")
        page.uncheck("#colours")
        assert opened.run(top) == 0


def test_a_session_comes_back_from_its_file(browser: Browser, site: Site, tmp_path: Path) -> None:
    with playground(browser, site.link("base", blend={"sql": 0.75})) as opened:
        send(opened, HOSTILE)
        before = answers(opened)
        opened.page.check("[name=mode][value=text]")
        send(opened, "Once upon")
        continued = answers(opened)
        opened.page.click("[data-opens=session-dialog]")
        with opened.page.expect_download() as download:
            opened.page.click("#export")
        file = tmp_path / "session.json"
        download.value.save_as(file)
    with playground(browser, site.address) as opened:
        bring(opened, file, "The session is open.")
        assert answers(opened) == continued
        opened.page.check("[name=mode][value=chat]")
        assert answers(opened) == before
        assert opened.page.title() == "lorakit playground"
        assert opened.page.locator(".user p").first.text_content() == HOSTILE
        for content in ("[]", "{", '{"format": "lorakit-playground", "version": 9}'):
            file.write_text(content)
            bring(opened, file, "not a session|version 9")
        assert answers(opened) == before


def bring(opened: Opened, file: Path, told: str) -> None:
    """Import a session, and wait for what the page says."""
    opened.page.click("[data-opens=session-dialog]")
    opened.page.set_input_files("#import", file)
    until(opened, f"/{told}/.test(document.getElementById('session-message').textContent)")
    opened.page.locator("#session-dialog [data-closes]").click()


def test_a_session_of_version_1_opens(browser: Browser, site: Site, tmp_path: Path) -> None:
    turns = [{"user": "Once upon", "answer": {"text": " a time"}}]
    session = {
        "format": "lorakit-playground",
        "version": 1,
        "settings": {"mode": "text"},
        "panes": [{"choice": {"model": "sql"}, "turns": turns}],
        "votes": {"sql": {"won": 1, "shown": 1}},
    }
    file = tmp_path / "session.json"
    file.write_text(json.dumps(session))
    with playground(browser, site.link("base")) as opened:
        bring(opened, file, "The session is open.")
        assert answers(opened) == [" a time"]
        assert opened.page.locator(".given").text_content() == "Once upon"
        opened.page.check("[name=mode][value=chat]")
        assert opened.page.locator(".turn").count() == 0


KEY = "k" * 24


def keys_of(folder: Path, *adapters: str) -> KeyRing:
    """Write and read a key that allows some adapters, and not the base."""
    keys = [{"name": "one", "key": KEY, "adapters": adapters}]
    (folder / "keys.json").write_text(json.dumps(keys))
    return read_keys(folder / "keys.json")


def test_the_page_asks_for_the_key(browser: Browser, text: Path, live: Any, tmp_path: Path) -> None:
    with (
        site_of(text, live, keys=keys_of(tmp_path, "sql")) as site,
        browser.open(site.link("sql")) as opened,
    ):
        for key in ("wrong", KEY):
            opened.page.wait_for_selector("#key-dialog[open]")
            opened.page.fill("#key", key)
            opened.page.click("#key-form button")
        # The key does not allow the base, so there is nothing to compare with.
        send(opened)
        assert opened.page.locator(".token").count() == 0
        assert answers(opened)[0]
        assert not opened.page.locator(".alert:visible").count()
        # A blend is a request to the base, so neither list nor button offers one.
        opened.page.click("#add-pane")
        finish(opened)
        for pane in panes(opened):
            assert pane.locator("option").all_inner_texts() == ["sql"]


def test_a_key_without_the_base_classifies(
    browser: Browser, classes: Path, live: Any, tmp_path: Path
) -> None:
    with (
        site_of(classes, live, keys=keys_of(tmp_path, "two", "three")) as site,
        browser.open(site.address) as opened,
    ):
        opened.page.fill("#key", KEY)
        opened.page.click("#key-form button")
        opened.page.wait_for_selector(".pane")
        assert opened.page.inner_text("#send") == "Classify"
        send(opened, "A fine film")
        assert len(panes(opened)) == 2
        for pane in panes(opened):
            assert pane.locator(".bars").inner_text()

"""The playground in Chromium: what its panes show is what the API answers, and people can use it in every way."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import HOSTILE, Browser, Opened
from playground_site import (
    MOST,
    SEED,
    Site,
    answers,
    clean,
    finish,
    panes,
    playground,
    send,
    site_of,
    until,
)
from served import wait_for

pytestmark = pytest.mark.slow  # each test opens pages

# --- the answers -------------------------------------------------------------------------------------


def test_each_pane_shows_what_the_api_answers(browser: Browser, site: Site) -> None:
    blend = {"e2e": 0.5, "sql": 0.5}
    with playground(browser, site.link("base", "e2e", "sql", blend=blend)) as opened:
        send(opened)
        shown = answers(opened)
        expected = [site.chat(name, "The river") for name in ("base", "e2e", "sql")]
        expected.append(site.chat("base", "The river", lora=blend))
        assert shown == expected
        assert len(set(shown)) == 4
        # A second message continues each pane's own conversation.
        send(opened, "And the park?")
        again = [
            site.chat(name, "The river", first, "And the park?")
            for name, first in zip(("base", "e2e", "sql"), shown, strict=False)
        ]
        assert answers(opened)[:3] == again
        clean(opened, site)


def test_a_text_is_continued_as_the_api_does(browser: Browser, site: Site) -> None:
    link = site.link("base", "sql", mode="text", top_p=0.9, top_k=20, stop="e")
    with playground(browser, link) as opened:
        send(opened)
        body = {"prompt": "The river", "temperature": 1, "top_p": 0.9, "top_k": 20, "stop": ["e"]}
        expected = [
            site.ask("completions", model=name, seed=SEED, max_tokens=MOST, **body)["choices"][0][
                "text"
            ]
            for name in ("base", "sql")
        ]
        assert answers(opened) == expected
        assert opened.page.locator(".given").first.text_content() == "The river"


def test_the_base_in_an_adapters_place_is_caught(browser: Browser, site: Site) -> None:
    """The receipt of an answer must name what the pane asked for."""
    acquire = site.opened.store.acquire

    def wrong(name: Any) -> Any:
        return acquire("sql" if name is None else None)

    with playground(browser, site.link("base", "sql")) as opened:
        site.opened.store.acquire = wrong  # type: ignore[method-assign]
        send(opened)
        base, adapter = (pane.locator(".alert").text_content() for pane in panes(opened))
        assert "names sql, not the base alone" in base
        assert "names the base alone, not sql" in adapter


def test_tokens_show_what_the_adapter_changed(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("base", "sql")) as opened:
        send(opened)
        base, adapter = panes(opened)
        assert base.locator(".token").count() == 0
        assert adapter.locator(".token[class*=up], .token[class*=down]").count() > 0
        # The numbers are those of the API.
        body = {"temperature": 1, "seed": SEED, "max_completion_tokens": MOST}
        messages = [{"role": "user", "content": "The river"}]
        answer = site.ask(
            "chat/completions",
            model="sql",
            messages=messages,
            logprobs=True,
            base_logprobs=True,
            **body,
        )["choices"][0]
        own, under_base = answer["logprobs"]["content"][0]["logprob"], answer["base_logprobs"][0]
        first = adapter.locator(".token").first
        first.hover()
        shown = opened.page.locator("#tip").text_content()
        for value in (own, under_base):
            share = 100 * 2.718281828459045**value
            assert share < 0.1 or f"{share:.1f} %" in shown or f"{share:.0f} %" in shown
        first.focus()
        opened.page.keyboard.press("Control+ArrowRight")  # of the browser
        assert opened.run("document.activeElement === document.querySelectorAll('.token')[0]")
        opened.page.keyboard.press("ArrowRight")
        assert opened.run("document.activeElement === document.querySelectorAll('.token')[1]")
        assert opened.page.locator("#tip").is_visible()
        opened.page.click("#settings summary")
        opened.page.uncheck("#colours")
        assert adapter.locator(".token").count() == 0
        assert answers(opened)[1] == site.chat("sql", "The river")
        with site.holding():
            opened.page.fill("#prompt", "And the park?")
            opened.page.click("#send")
            opened.page.check("#colours")
        finish(opened)
        assert adapter.locator(".turn").first.locator(".token").count() > 0


# --- while answers are computed ----------------------------------------------------------------------


def test_stop_ends_one_pane_and_the_others_go_on(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("base", "sql", temperature=0, max_tokens=60)) as opened:
        base = panes(opened)[0]
        with site.holding(after=20):
            opened.page.fill("#prompt", "The river")
            opened.page.click("#send")
            until(
                opened,
                "document.querySelectorAll('.pane')[0].querySelector('.answer').textContent.length > 3",
            )
            base.locator(".stop").click()
        finish(opened)
        stopped, whole = answers(opened)
        alone = {"temperature": 0, "max_completion_tokens": 60}
        assert whole == site.chat("sql", "The river", **alone)
        assert "Stopped." in base.text_content()
        assert 0 < len(stopped) < len(site.chat("base", "The river", **alone))
        assert site.chat("base", "The river", **alone).startswith(stopped)
        engine, store = site.opened.engine, site.opened.store
        wait_for(lambda: not engine.status().running and not store.stats().leases)


def test_a_slider_computes_the_blend_again(browser: Browser, site: Site) -> None:
    link = site.link("base", blend={"e2e": 0.5, "sql": 0.5}, temperature=0)
    with playground(browser, link) as opened:
        send(opened)
        before = answers(opened)
        slider = opened.page.locator("input[type=range]").first
        with site.holding():
            slider.fill("0")
            until(opened, "location.hash.includes('%22e2e%22%3A0%2C')")
            opened.page.wait_for_selector("#stop-all:enabled")
        finish(opened)
        after = answers(opened)
        assert after[0] == before[0]
        blend = site.chat("base", "The river", temperature=0, lora={"sql": 0.5})
        assert after[1] == blend != before[1]


def test_a_slider_computes_where_the_address_cannot_change(browser: Browser, site: Site) -> None:
    """Safari throws after 100 changes of the address in 30 seconds."""
    with playground(browser, site.link(blend={"e2e": 0.5}, temperature=0)) as opened:
        send(opened)
        opened.run(
            "void (history.replaceState = () => { window.calls = (window.calls ?? 0) + 1; throw Error() })"
        )
        for value in ("1", "1.5", "2"):  # as a finger that moves, until it lifts
            opened.run(
                f"document.querySelector('[type=range]').value = {value};"
                "document.querySelector('[type=range]').dispatchEvent(new Event('input'))"
            )
        with site.holding():
            opened.page.locator("[type=range]").dispatch_event("change")
            opened.page.wait_for_selector("#stop-all:enabled")
        finish(opened)
        assert answers(opened) == [site.chat("base", "The river", temperature=0, lora={"e2e": 2})]
        assert opened.run("window.calls") == 1


def test_the_enter_that_ends_a_composition_does_not_send(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("base")) as opened:
        opened.page.fill("#prompt", "日本")
        opened.page.dispatch_event("#prompt", "keydown", {"key": "Enter", "keyCode": 229})
        assert opened.page.input_value("#prompt") == "日本"
        assert opened.page.locator(".turn").count() == 0


def test_an_adapter_that_is_unloaded_meanwhile_is_an_error_of_its_pane(
    browser: Browser, site: Site
) -> None:
    with playground(browser, site.link("base", "sql")) as opened:
        send(opened)
        answer = httpx.post(
            f"{site.address}/v1/unload_lora_adapter", json={"lora_name": "sql"}, timeout=10
        )
        assert answer.status_code == 200
        send(opened, "And the park?")
        base, adapter = panes(opened)
        assert adapter.locator(".alert").is_visible()
        assert "sql" in adapter.locator(".alert").text_content()
        assert not base.locator(".alert").is_visible()
        assert answers(opened)[0]
        until(
            opened,
            "document.querySelectorAll('.model')[1].selectedOptions[0].text.includes('not served')",
        )


def test_each_kind_of_prompt_keeps_its_turns(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("sql")) as opened:
        send(opened)
        chat = answers(opened)
        opened.page.check("[name=mode][value=text]")
        assert opened.page.locator(".turn").count() == 0
        send(opened, "Once upon")
        assert opened.page.locator(".given").text_content() == "Once upon"
        opened.page.check("[name=mode][value=chat]")
        assert answers(opened) == chat


def test_nothing_is_lost_by_an_edit_or_a_second_send(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("base", temperature=0, max_tokens=60)) as opened:
        send(opened)
        opened.page.fill("#prompt", "a draft")
        opened.page.locator(".user button").first.click()
        opened.page.click("#cancel-edit")
        assert opened.page.input_value("#prompt") == "a draft"
        with site.holding():
            opened.page.click("#send")
            opened.page.fill("#prompt", "another")
            opened.page.keyboard.press("Enter")
            assert "still being computed" in opened.page.inner_text("#notice")
            assert opened.page.input_value("#prompt") == "another"
        finish(opened)
        assert opened.page.locator(".user p").all_text_contents() == ["The river", "a draft"]


def test_an_invalid_setting_is_told_and_does_not_count(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("base", temperature=0)) as opened:
        opened.page.click("#settings summary")
        opened.page.fill("#temperature", "9")
        opened.page.keyboard.press("Tab")
        assert "It stays 0." in opened.page.inner_text("#settings-note")
        assert opened.page.input_value("#temperature") == "0"
        assert opened.run("document.activeElement.id") == "top_p"
        send(opened)
        assert answers(opened) == [site.chat("base", "The river", temperature=0)]


def test_a_fraction_between_two_steps_counts(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("base")) as opened:
        opened.page.click("#settings summary")
        for name, value in (("temperature", "0.75"), ("top_p", "0.995"), ("top_k", "1.5")):
            opened.page.fill(f"#{name}", value)
            opened.page.keyboard.press("Tab")
            is_whole = name == "top_k"
            assert bool(opened.page.inner_text("#settings-note")) == is_whole
            assert opened.page.input_value(f"#{name}") == ("0" if is_whole else value)
        send(opened)
        assert answers(opened) == [site.chat("base", "The river", temperature=0.75, top_p=0.995)]


def with_report(text: Path, folder: Path, report: str) -> Path:
    """Return a copy of the served folders in which the run `run` has a report."""
    copy = shutil.copytree(text, folder / "text")
    run = copy / "adapters" / "run"
    shutil.copytree(copy / "adapters" / "sql", run / "adapter")
    (run / "report.html").write_text(report)
    return copy


def test_a_report_opens_again_and_runs_no_script(
    browser: Browser, text: Path, live: Any, tmp_path: Path
) -> None:
    hostile = f"<p>report</p><a href='#x'>part</a><p id='x'>end</p><script>parent.owned = 1</script>{HOSTILE}"
    folder = with_report(text, tmp_path, f"<!doctype html><title>r</title>{hostile}")
    with site_of(folder, live) as site, playground(browser, site.link("run")) as opened:
        for _ in range(2):
            opened.page.click(".card")
            opened.page.click("#show-report")
            frame = opened.page.frame_locator("#report-place iframe")
            assert frame.locator("p").first.inner_text() == "report"
            frame.locator("a").click()
            assert frame.locator("#x").inner_text() == "end"
            opened.page.locator("#report-dialog [data-closes]").click()
            opened.page.locator("#card-dialog [data-closes]").click()
        assert opened.page.title() == "lorakit playground"
        assert not opened.run("window.owned")


def test_regenerate_edit_and_a_new_pane(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("base", "sql", seed="")) as opened:
        send(opened)
        first = answers(opened)
        panes(opened)[1].locator(".again").click()
        finish(opened)
        assert answers(opened)[0] == first[0]
        send(opened, "And the park?")
        opened.page.locator(".user button").first.click()
        assert opened.page.input_value("#prompt") == "The river"
        send(opened, "The pub")
        for pane in panes(opened):
            assert pane.locator(".user p").all_text_contents() == ["The pub"]
        opened.page.click("#add-pane")
        finish(opened)
        assert panes(opened)[2].locator(".model").input_value() == "e2e"
        assert "tokens" in panes(opened)[2].locator(".figures").inner_text()
        opened.page.click("#add-pane")
        finish(opened)
        assert panes(opened)[3].locator("output").inner_text() == "0.50"


def test_an_empty_answer_is_sent_back(browser: Browser, site: Site) -> None:
    first = site.chat("base", "The river", temperature=0)
    with playground(browser, site.link("base", temperature=0, stop=first[0])) as opened:
        send(opened)
        assert answers(opened) == [""]
        send(opened, "And the park?")
        settings = {"temperature": 0, "stop": [first[0]]}
        whole = site.chat("base", "The river", "", "And the park?", **settings)
        assert answers(opened) == [whole]
        assert whole != site.chat("base", "And the park?", **settings)
        assert not panes(opened)[0].locator(".alert").is_visible()
        clean(opened, site)


def test_all_panes_can_be_stopped_while_one_computes_again(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("base", "sql", temperature=0, max_tokens=60)) as opened:
        send(opened)
        with site.holding():
            panes(opened)[1].locator(".again").click()
            opened.page.click("#stop-all")
        finish(opened)
        assert "Stopped." in panes(opened)[1].text_content()


# --- what people do beside ---------------------------------------------------------------------------


def test_the_code_of_a_request_gives_its_answer(
    browser: Browser, site: Site, tmp_path: Path
) -> None:
    with playground(browser, site.link("sql", blend={"e2e": 0.5, "sql": 0.25})) as opened:
        send(opened, 'It\'s the river\nand "the pub"')
        for pane, shown in zip(panes(opened), answers(opened), strict=True):
            pane.locator(".code").click()
            curl = opened.page.text_content("#code-text")
            opened.page.click("#tab-openai")
            python = opened.page.text_content("#code-text")
            opened.page.locator("#code-dialog [data-closes]").click()
            command = ["bash", "-c", curl.replace("curl ", "curl -s ", 1)]
            answer = json.loads(subprocess.check_output(command, timeout=60))
            assert answer["choices"][0]["message"]["content"] == shown
            assert printed(python).startswith(shown)


@pytest.mark.parametrize("mode", ["chat", "text"])
def test_lorakit_in_python_computes_the_answer(
    browser: Browser, site: Site, text: Path, mode: str
) -> None:
    link = site.link(
        *("base", "sql"),
        blend={"e2e": 0.5, "sql": 0.25},
        mode=mode,
        temperature=0,
        stop="e",
        system='Say it\'s "short".',
    )
    with playground(browser, link) as opened:
        send(opened)
        send(opened, "And the park?")
        assert len(set(answers(opened))) == 3
        for pane, shown in zip(panes(opened), answers(opened), strict=True):
            pane.locator(".code").click()
            opened.page.click("#tab-lorakit")
            code = opened.page.text_content("#code-text")
            opened.page.locator("#code-dialog [data-closes]").click()
            for name, place in (("base", "base"), ("path/to/", "adapters/")):
                code = code.replace(f'("{name}', f'("{text}/{place}')
            assert printed(code) == f"{shown}\n"
        opened.page.click("#settings summary")
        opened.page.fill("#temperature", "0.5")
        opened.page.fill("#top_k", "9")
        opened.page.press("#top_k", "Tab")
        opened.page.locator(".code").first.click()
        opened.page.click("#tab-lorakit")
        code = opened.page.text_content("#code-text")
        assert f"Decoding(max_new_tokens={MOST}, temperature=0.5, top_k=9, seed={SEED})" in code


def test_code_keeps_the_path_of_the_page(browser: Browser, site: Site) -> None:
    address = f"{site.address}/lora"
    with browser.open("about:blank") as opened:
        opened.page.route(
            f"{address}/**",
            lambda route: route.fulfill(
                response=route.fetch(url=route.request.url.replace("/lora/", "/"))
            ),
        )
        opened.page.goto(site.link("sql").replace(site.address, address))
        opened.page.locator(".code").click()
        assert f"curl {address}/v1/chat/completions" in opened.page.text_content("#code-text")
        opened.page.click("#tab-openai")
        assert f'base_url="{address}/v1"' in opened.page.text_content("#code-text")


def test_a_second_click_on_copy_leaves_its_label(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("sql")) as opened:
        opened.page.click(".code")
        opened.run("void (window.timers = [])")
        opened.run("void (window.setTimeout = (call) => timers.push(call))")
        for clicks in (1, 2):
            opened.page.click("#copy-code")
            until(opened, f"timers.length === {clicks}")
        assert opened.page.text_content("#copy-code") != "Copy"
        opened.run("timers.forEach((call) => call())")
        assert opened.page.text_content("#copy-code") == "Copy"


def printed(python: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(python, {})
    return output.getvalue()


def test_a_blind_vote_hides_the_names_until_it_is_cast(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("base", "sql")) as opened:
        opened.page.check("#blind")
        send(opened)
        for pane in panes(opened):
            visible = pane.inner_text()
            assert not any(name in visible for name in ("base", "sql", "tokens/s", "seed"))
            assert "base" not in pane.locator(".log").get_attribute("aria-label")
        assert [p.locator("h2").inner_text() for p in panes(opened)] == ["Model A", "Model B"]
        opened.page.click("#vote-buttons button >> nth=1")
        text = opened.page.inner_text("#vote-question")
        chosen = text.rpartition("You chose ")[2].rstrip(".")
        assert f"B is {chosen}" in text
        assert panes(opened)[1].locator(".model").input_value() == chosen
        opened.page.click("[data-opens=session-dialog]")
        rows = opened.page.locator("#tally tbody tr").all_inner_texts()
        assert rows[0].split() == [chosen, "1", "1"]
        assert rows[1].split()[1:] == ["0", "1"]


def test_the_address_tells_no_name_before_the_vote(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("base", "sql")) as opened:
        # The panes change places.
        opened.run("void (crypto.getRandomValues = (numbers) => numbers.fill(0))")
        opened.page.check("#blind")
        send(opened)
        opened.page.fill("#prompt", "next")
        opened.page.keyboard.press("Tab")
        assert "model=base&model=sql" in opened.page.url
        assert "prompt=next" in opened.page.url
        opened.page.click("#vote-buttons button >> nth=0")
        assert "model=sql&model=base" in opened.page.url


def test_a_model_in_two_panes_has_one_vote(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("sql", "sql")) as opened:
        opened.page.check("#blind")
        send(opened)
        opened.page.click("#vote-buttons button >> nth=0")
        opened.page.click("[data-opens=session-dialog]")
        rows = opened.page.locator("#tally tbody tr").all_inner_texts()
        assert [row.split() for row in rows] == [["sql", "1", "1"]]


def test_an_address_brings_back_panes_settings_and_prompt(browser: Browser, site: Site) -> None:
    with playground(
        browser, site.link("sql", blend={"e2e": 1.5}, top_k=5, prompt=HOSTILE)
    ) as opened:
        assert opened.page.input_value("#prompt") == HOSTILE
        assert opened.page.input_value("#top_k") == "5"
        send(opened, "The river")
        address, shown = opened.page.url, answers(opened)
    with playground(browser, address) as opened:
        send(opened, "The river")
        assert answers(opened) == shown
    wrong = f"{site.address}/#model=&blend=[1]&temperature=x&seed=1.5&mode=song&top_p=-3"
    with playground(browser, wrong) as opened:
        assert len(panes(opened)) == 3
        assert opened.page.input_value("#temperature") == "0.7"
        clean(opened, site)


def test_new_adapters_are_offered_when_the_page_has_the_focus_again(
    browser: Browser, text: Path, live: Any, tmp_path: Path
) -> None:
    adapters = shutil.copytree(text, tmp_path / "text") / "adapters"
    with (
        site_of(adapters.parent, live) as site,
        playground(browser, site.link("sql", blend={"e2e": 0.5})) as opened,
    ):
        send(opened)  # loads the adapters, which changes their facts only
        opened.run("void (window.slider = document.querySelector('[type=range]'))")
        opened.page.click(".card")
        opened.page.wait_for_selector("#card-dialog[open]")
        opened.page.locator("#card-dialog [data-closes]").click()
        assert opened.run("slider.isConnected")
        offered = "[...document.querySelector('.model').options].map(({ value }) => value)"
        assert "new" not in opened.run(offered)
        shutil.copytree(adapters / "sql", adapters / "new")
        opened.run("window.dispatchEvent(new Event('focus'))")
        until(opened, f"{offered}.includes('new')")
        assert opened.page.input_value(".model") == "sql"


def test_a_card_shows_what_the_server_knows_now(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("sql")) as opened:
        send(opened)  # loads the adapter
        opened.page.click(".card")
        opened.page.wait_for_selector("#card-dialog[open]")
        text = opened.page.inner_text("#card-facts").split("\n")
        facts = dict(zip(text[::2], text[1::2], strict=True))
        assert (facts["method"], facts["rank"], facts["task"]) == ("LoRA", "4", "completion")
        assert facts["size"].endswith(" kB")
        digest = site.opened.store.describe("sql")["digest"]
        assert facts["digest"] == digest


def test_a_pane_says_if_its_adapter_was_trained_on_other_prompts(
    browser: Browser, site: Site
) -> None:
    """The adapters of these tests were trained on texts, so that is also what the page begins with."""
    with playground(browser, site.address) as opened:
        assert opened.page.is_checked("[name=mode][value=text]")
        assert opened.page.locator(".hint:visible").count() == 0
        opened.page.check("[name=mode][value=chat]")
        assert opened.page.locator(".hint:visible").all_inner_texts() == [
            f"{name} was trained on texts, not on chats. Choose “Continue a text” below."
            for name in ("e2e", "sql")
        ]


def test_classes_side_by_side(browser: Browser, classes: Path, live: Any) -> None:
    with site_of(classes, live) as site, playground(browser, site.address) as opened:
        send(opened, "A fine film")
        names = [pane.locator(".model").input_value() for pane in panes(opened)]
        assert "base" not in names
        for name, pane in zip(names, panes(opened), strict=True):
            (row,) = site.ask("classify", model=name, input="A fine film")["data"]
            shown = pane.locator(".bars").inner_text()
            expected = [f"{100 * s:.1f} %" for s in row["scores"].values()]
            for value in expected or [f"{row['score']:.3f}"]:
                assert value in shown
        clean(opened, site)


# --- everybody can use it ----------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_accessible_and_nothing_overflows(
    browser: Browser, site: Site, width: int, scheme: str
) -> None:
    link = site.link("base", "sql", blend={"e2e": 0.5, "sql": 0.5})
    with playground(browser, link, width=width, color_scheme=scheme) as opened:
        opened.page.click("#settings summary")
        send(opened)
        found = [Axe().run(opened.page)]
        assert opened.run("document.documentElement.scrollWidth <= innerWidth")
        for opener, dialog in (
            (".code", "#code-dialog"),
            (".card", "#card-dialog"),
            ("[data-opens=session-dialog]", "#session-dialog"),
        ):
            opened.page.locator(opener).first.click()
            found.append(Axe().run(opened.page))
            assert opened.run(
                f"document.querySelector('{dialog}').scrollWidth <= document.querySelector('{dialog}').clientWidth"
            )
            opened.page.keyboard.press("Escape")
        opened.page.check("#blind")
        send(opened)
        found.append(Axe().run(opened.page))
        assert [result.generate_report() for result in found if result.violations_count] == []
        clean(opened, site)


def test_by_keyboard_alone(browser: Browser, site: Site) -> None:
    with playground(browser, site.link("base", "sql")) as opened:
        press = opened.page.keyboard.press
        press("Tab")
        press("Enter")  # the link to the prompt
        assert opened.run("document.activeElement.id === 'prompt'")
        opened.page.keyboard.type("The river")
        press("Enter")
        finish(opened)
        assert answers(opened)[1] == site.chat("sql", "The river")
        reach(opened, ".pane:last-child .token")
        assert opened.page.locator("#tip").is_visible()
        reach(opened, ".pane:last-child .code")
        press("Enter")
        press("Tab")
        press("Escape")
        assert opened.run("document.activeElement.matches('.code')")


def test_a_comment_in_a_stream_is_skipped(browser: Browser, site: Site) -> None:
    pieces = [
        {"choices": [{"delta": {"content": text}}], "system_fingerprint": "base=1"}
        for text in ("The river", " pub.")
    ]
    first, second = (f"data: {json.dumps(piece)}\n\n" for piece in pieces)
    stream = f"{first}: continued by replica b\n\n{second}data: [DONE]\n\n"
    with playground(browser, site.link("base")) as opened:
        opened.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream))
        send(opened)
        assert answers(opened) == ["The river pub."]


def test_texts_have_the_direction_of_their_language(browser: Browser, site: Site) -> None:
    def direction(selector: str) -> str:
        return opened.run(f"getComputedStyle(document.querySelector('{selector}')).direction")

    piece = {"choices": [{"delta": {"content": "עולם."}}], "system_fingerprint": "base=1"}
    stream = f"data: {json.dumps(piece)}\n\ndata: [DONE]\n\n"
    with playground(browser, site.link("base")) as opened:
        opened.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream))
        opened.page.fill("#prompt", "שלום!")
        assert direction("#prompt") == "rtl"
        send(opened, "שלום!")
        assert answers(opened) == ["עולם."]
        assert [direction(name) for name in (".user p", ".answer", "#prompt")] == [
            "rtl",
            "rtl",
            "ltr",
        ]
        opened.page.check("[name=mode][value=text]")
        send(opened, "שלום!")
        # The answer continues the text on its left.
        assert direction(".given") == direction(".answer") == "rtl"


def test_a_changed_blend_keeps_the_focus(browser: Browser, site: Site) -> None:
    with playground(browser, site.link(blend={"e2e": 0.5})) as opened:
        opened.page.wait_for_selector(".blend")
        focused = "document.activeElement.ariaLabel ?? document.activeElement.textContent"
        opened.page.press(".blend > button", "Enter")  # Add adapter
        assert opened.page.locator(".blend .part").count() == 2
        assert opened.run(focused) == "Adapter of the blend"
        opened.page.press(".part:first-child [type=range]", "ArrowRight")
        opened.page.press(".part:first-child button", "Enter")
        assert opened.run(focused) == "Weight of sql"  # the last adapter cannot be removed
        opened.page.select_option(".part select", "e2e")
        assert opened.run("document.activeElement.matches('input')")
        opened.page.focus(".part select")
        opened.page.select_option(".part select", "sql")
        assert opened.run(focused) == "Adapter of the blend"


def test_messages_are_announced_where_people_are(
    browser: Browser, text: Path, live: Any, tmp_path: Path
) -> None:
    folder = with_report(text, tmp_path, "<p>report</p>")
    with site_of(folder, live) as site, playground(browser, site.link("run")) as opened:
        opened.page.click("#send")
        assert "Write something" in opened.page.get_by_role("status").first.inner_text()
        opened.run("sessionStorage.setItem('lorakit-key', 'k')")  # so the page reads the report
        opened.page.route("**/v1/reports/*", lambda route: route.abort())
        opened.page.click(".card")
        message = opened.page.locator("#card-dialog").get_by_role("status")
        assert message.inner_text() == ""
        opened.page.click("#show-report")
        until(opened, "document.getElementById('card-message').textContent")
        assert "does not answer" in message.inner_text()
        opened.page.keyboard.press("Escape")
        opened.page.route("**/v1/models", lambda route: route.abort())
        opened.page.click(".card")
        opened.page.wait_for_selector("#card-dialog[open]")
        assert "may be old" in message.inner_text()


def reach(opened: Opened, selector: str) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(80):
        if opened.run(f"document.activeElement.matches({selector!r})"):
            return
        opened.page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not reach {selector}")


def test_pages_load_nothing_from_elsewhere_and_run_no_foreign_script(
    browser: Browser, site: Site
) -> None:
    answer = httpx.get(site.address)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    for text in ("<script>", "onclick=", "http://", "https://"):
        assert text not in answer.text

"""The page in headless Chromium, against a server with a tiny model."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator

import pytest
from served import HEADS, MODEL, running, save_head, serving_folder, slow_steps, tiny_tokenizer

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH; on Debian: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))) as started:
        yield started


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
        browser = started.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened_page(browser, server) -> Iterator["playwright.Page"]:
    """The page, freshly opened; nothing on it may fail, nor ask another address."""
    with browser.new_context() as context:
        opened = context.new_page()
        problems: list[str] = []
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on("console", lambda message: problems.append(message.text))
        opened.on("request", lambda request: request.url.startswith(server.url) or problems.append(request.url))
        opened.goto(server.url)
        opened.wait_for_selector("[role=tab]")
        yield opened
        assert [text for text in problems if "Failed to load resource" not in text] == []


@pytest.fixture
def page(browser, server) -> Iterator["playwright.Page"]:
    with opened_page(browser, server) as opened:
        yield opened


def finished(page) -> None:
    page.wait_for_selector("#export:not([disabled])")


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def set_up(page, **values: str) -> None:
    page.click("summary")
    for name, value in values.items():
        page.fill(f"#{name}", value)


def test_a_text_is_continued_token_by_token(page, server):
    set_up(page, max_tokens="12", seed="7")
    page.fill("#prompt", "the quick")
    page.press("#prompt", "Control+Enter")
    finished(page)
    body = {"max_tokens": 12, "seed": 7, "temperature": 0.8, "top_k": 50, "logprobs": 5}
    choice = server.complete(**body).json["choices"][0]
    assert page.locator("#output").text_content() == "the quick" + choice["text"]
    assert page.locator("#numbers").text_content().startswith("12 tokens, ")
    assert "tokens/s, first after " in page.locator("#numbers").text_content()
    first = page.locator("#output .token").first
    assert float(first.evaluate("place => place.style.getPropertyValue('--surprise')")) == pytest.approx(
        min(1, -choice["logprobs"]["token_logprobs"][0] / 7), abs=2e-3
    )
    first.hover()  # its alternatives
    assert page.locator("#tip .bar").count() in (5, 6)
    assert page.locator("#tip .chosen").count() == 1
    first.focus()
    shown = page.locator("#tip").text_content()
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").text_content() != shown
    with page.expect_download() as download:
        page.click("#export")
    exported = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert exported["answer"] == choice["text"]
    assert exported["request"]["seed"] == 7
    assert [token["logprob"] for token in exported["tokens"]] == choice["logprobs"]["token_logprobs"]
    assert len(exported["tokens"][0]["top"]) == 5


def test_stop_ends_the_text_and_frees_the_row(page, server):
    set_up(page, max_tokens="110")
    page.fill("#prompt", "the")
    with slow_steps(server):
        page.click("#run")
        page.wait_for_selector("#output .token")
        page.keyboard.press("Escape")
        finished(page)
        assert 0 < page.locator("#output .token").count() < 100
        assert page.locator("#numbers").text_content().endswith("(stopped)")
        server.until_idle()


def test_settings_and_text_stay_after_a_reload(page):
    set_up(page, temperature="0.35", seed="11")
    page.fill("#prompt", "a text that stays")
    tab(page, "Score a text")
    page.reload()
    page.wait_for_selector("[role=tab]")
    assert page.input_value("#temperature") == "0.35"
    assert page.input_value("#seed") == "11"
    assert page.input_value("#prompt") == "a text that stays"
    assert page.locator("[role=tab][aria-selected=true]").text_content() == "Score a text"


def test_a_pasted_text_is_scored(page, server):
    tab(page, "Score a text")
    page.fill("#prompt", "the quick brown héllo")
    page.click("#run")
    finished(page)
    logprobs = server.complete(prompt="the quick brown héllo", echo=True, max_tokens=0, logprobs=5).json["choices"][0][
        "logprobs"
    ]
    loss = -sum(logprobs["token_logprobs"][1:]) / (len(logprobs["tokens"]) - 1)
    assert page.locator("#output").text_content() == "the quick brown héllo"
    assert (
        f"{len(logprobs['tokens']) - 1} tokens predicted, loss {loss:.3f}, " in page.locator("#numbers").text_content()
    )


def test_a_conversation_keeps_its_turns(page, server):
    tab(page, "Chat")
    set_up(page, max_tokens="6", seed="3", system="be short")
    for text in ("the quick", "brown fox"):
        page.fill("#prompt", text)
        page.click("#run")
        finished(page)
    turns = page.locator(".turn").all_text_contents()
    assert turns[0::2] == ["the quick", "brown fox"]
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": "the quick"}]
    for reply, text in zip(turns[1::2], ("brown fox", ""), strict=True):
        body = {"model": MODEL, "messages": messages, "max_tokens": 6, "seed": 3, "temperature": 0.8, "top_k": 50}
        expected = server.request("POST", "/v1/chat/completions", body).json["choices"][0]["message"]["content"]
        assert reply == expected
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": text}]


def test_an_error_is_a_sentence(page, server):
    page.fill("#prompt", "the " * 500)
    page.click("#run")
    error = page.get_by_role("alert")
    error.wait_for()
    assert error.text_content().endswith(" but this model has 128 positions.")
    page.route("**/v1/completions", lambda route: route.abort())
    page.fill("#prompt", "the")
    page.click("#run")
    error.filter(has_text="does not answer").wait_for()


@pytest.mark.parametrize("task", HEADS)
def test_a_model_with_a_head_shows_what_it_finds(browser, tmp_path, task):
    text = "\U0001f98a the quick brown fox"  # one character, two of JavaScript's
    save_head(task, tiny_tokenizer(tmp_path), tmp_path / "model")
    with serving_folder(tmp_path / "model") as server, opened_page(browser, server) as page:
        if task == "question-answering":
            page.fill("#question", "who jumps?")
        page.fill("#prompt", text)
        page.click("#run")
        finished(page)
        output, marks = page.locator("#output"), page.locator("#output mark")
        shown = [mark.evaluate("mark => mark.firstChild.textContent") for mark in marks.all()]
        if task == "text-classification":
            answer = server.request("POST", "/v1/classify", {"model": "model", "input": text})
            labels = answer.json["data"][0]["labels"]
            bars = output.locator(".bar").all_text_contents()
            assert len(bars) == 3
            assert all(label["label"] in bar for label, bar in zip(labels, bars, strict=True))
            return
        if task == "token-classification":
            answer = server.request("POST", "/v1/entities", {"model": "model", "input": text})
            found = [(entity["start"], entity["end"]) for entity in answer.json["data"][0]["entities"]]
        else:
            body = {"model": "model", "input": {"question": "who jumps?", "context": text}}
            best = server.request("POST", "/v1/answer", body).json["data"][0]["answers"][0]
            found = [(best["start"], best["end"])]
        begins = [max([start, *(end for _, end in found[:i])]) for i, (start, _) in enumerate(found)]
        assert shown == [text[begin:end] for begin, (_, end) in zip(begins, found, strict=True)]
        assert "".join(shown)
        parts = "place => [...place.childNodes].map(node => (node.firstChild ?? node).textContent).join('')"
        assert output.evaluate(parts) == text  # without the names of the marks


def test_it_fits_a_phone_and_follows_the_theme(browser, server):
    colours = []
    for scheme in ("light", "dark"):
        with browser.new_context(viewport={"width": 360, "height": 640}, color_scheme=scheme) as context:
            page = context.new_page()
            page.goto(server.url)
            page.wait_for_selector("[role=tab]")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(set(colours)) == 2


def test_the_policy_is_strict(server):
    answer = server.request("GET", "/")
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; ")
    assert "unsafe" not in policy
    assert b"http" not in answer.data
    assert b"<style" not in answer.data
    assert b"style=" not in answer.data

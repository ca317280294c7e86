"""The chat page in a real browser. Skipped where there is no Chromium."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.servers import Server, get, serving

webdriver: Any = pytest.importorskip("selenium.webdriver", reason="looking at the page needs selenium")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
browsing = [
    pytest.mark.skipif(not CHROMIUM, reason="needs chromium or google-chrome on PATH"),
    pytest.mark.skipif(not DRIVER, reason="needs chromedriver on PATH"),
]
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=900,800"),
)


class Page:
    """The chat, open in the browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def texts(self, role: str) -> list[str]:
        code = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return [str(text) for text in self.driver.execute_script(code, f"#messages .{role}")]

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> Any:
        limit = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < limit, self.find("body").text
            time.sleep(0.02)
        return found

    def say(self, text: str) -> None:
        self.find("#text").send_keys(text)
        self.find("#send").click()

    @property
    def quiet(self) -> bool:
        """Nothing is being answered."""
        return bool(self.find("#send").is_enabled())


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def page(server: Server, tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path) as driver:
        driver.get(f"{server.url}/")
        yield Page(driver)
        assert driver.get_log("browser") == []
        fetched = driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
        assert all(name.startswith(server.url) for name in fetched), fetched


def browser_test(test: Any) -> Any:
    for mark in browsing:
        test = mark(test)
    return test


@browser_test
def test_type_send_and_see_the_answer_grow(page: Page, server: Server) -> None:
    page.until(lambda: page.find("#model").text == "tiny")
    page.say("Hello there")
    lengths = set()
    limit = time.monotonic() + 60
    while not page.quiet or not lengths:
        answers = page.texts("assistant")
        if answers and answers[0]:
            lengths.add(len(answers[0]))
        if len(lengths) > 5 and not page.quiet:
            page.find("#stop").click()
        assert time.monotonic() < limit
    assert len(lengths) > 2, "the answer did not grow"
    assert page.texts("user") == ["Hello there"]
    assert page.until(lambda: page.find("#speed").text).endswith("tokens/s")
    assert page.until(lambda: "of steps" in page.find("#graphs").text)
    assert page.find("#graphs").text.startswith("0.0 %")  # a CPU has no graphs
    server.wait_for("num_requests_running", 0)


@browser_test
def test_a_conversation_remembers_and_a_new_one_does_not(page: Page, server: Server) -> None:
    page.until(lambda: page.find("#model").text)

    def prompt_tokens(text: str) -> float:
        before = server.metric("prompt_tokens_total")
        page.say(text)
        page.until(lambda: page.texts("assistant") and page.texts("assistant")[-1])
        if not page.quiet:
            page.find("#stop").click()
        page.until(lambda: page.quiet)
        return server.metric("prompt_tokens_total") - before

    first = prompt_tokens("one")
    second = prompt_tokens("two")
    assert second > first + len("one")
    page.find("#fresh").click()
    assert page.texts("user") == []
    assert prompt_tokens("two") == first


@browser_test
def test_an_error_is_shown(page: Page, server: Server) -> None:
    page.until(lambda: page.find("#model").text)
    page.driver.execute_script("document.getElementById('text').value = 'long '.repeat(2000)")
    page.find("#send").click()
    (text,) = page.until(lambda: page.texts("error"))
    assert "max_model_len=4096" in text
    page.until(lambda: page.quiet)
    (entry,) = page.driver.get_log("browser")  # the browser reports every 400 by itself
    assert "400" in entry["message"]


def test_the_page_names_nothing_outside(server: Server) -> None:
    status, page, headers = get(f"{server.url}/")
    assert status == 200
    assert b"http://" not in page
    assert b"https://" not in page
    assert "connect-src 'self'" in headers["content-security-policy"]


@browser_test
def test_a_browser_with_the_key_as_password(model: Path, tmp_path: Path) -> None:
    limits = ("--max-num-seqs", "2", "--max-num-batched-tokens", "64", "--api-key", "secret")
    with serving(str(model), *limits, folder=tmp_path) as locked, browser(tmp_path / "profile") as driver:
        driver.get(locked.url.replace("http://", "http://me:secret@"))
        page = Page(driver)
        page.until(lambda: page.find("#model").text == "tiny")
        page.say("Hello")
        page.until(lambda: page.texts("assistant") and page.texts("assistant")[0])
        page.find("#stop").click()

"""The page of the graph report in a real browser. Skipped where there is no Chromium."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ostinato.graphs.report import GraphReport, KeyReport, html
from tests.unit.test_report import EMPTY, EVIL, EXAMPLE, synthetic_chain

webdriver: Any = pytest.importorskip("selenium.webdriver", reason="looking at the page needs selenium")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="needs chromium or google-chrome on PATH"),
    pytest.mark.skipif(not DRIVER, reason="needs chromedriver on PATH"),
]
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1240,1000",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """A report, open in the browser."""

    def __init__(self, browser: Any, folder: Path, report: GraphReport, **options: Any) -> None:
        self.browser, self.report = browser, report
        path = folder / "report.html"
        path.write_text(html(report, **options), encoding="utf-8")
        browser.get_log("browser")  # what an earlier page left
        browser.get(path.as_uri())

    def js(self, code: str, *args: object) -> Any:
        return self.browser.execute_script(code, *args)

    def text(self, selector: str) -> str:
        return str(self.js("return document.querySelector(arguments[0]).innerText", selector))

    def texts(self, selector: str) -> list[str]:
        code = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return [str(text) for text in self.js(code, selector)]

    def choose(self, box: str, value: str) -> None:
        code = "const b = document.getElementById(arguments[0]); b.value = arguments[1];"
        self.js(code + "b.dispatchEvent(new Event(b.tagName === 'INPUT' ? 'input' : 'change'))", box, value)

    def click(self, selector: str) -> None:
        """A real click, as far as the browser is concerned: the element has to be in sight."""
        element = self.browser.find_element("css selector", selector)
        self.js("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", element)
        element.click()

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Page]:
    opened = Page(browser, tmp_path, GraphReport.from_json(EXAMPLE.read_text(encoding="utf-8")))
    yield opened
    assert opened.complaints() == []


def test_the_page_shows_the_report_and_fetches_nothing(page: Page) -> None:
    assert page.text("h1") == page.report.model
    assert len(page.texts("#tiles li")) >= 4
    assert len(page.texts("#keys tbody tr")) == len(page.report.keys)
    assert len(page.texts("#kernels tbody tr")) == len(page.report.kernels)
    assert page.js("return performance.getEntriesByType('resource').length") == 0
    assert page.js("return document.documentElement.scrollWidth <= innerWidth")


def test_a_click_on_a_heading_sorts_and_another_turns_the_order(page: Page) -> None:
    rows, heading = "#keys tbody tr [class~=key]", "#keys th:nth-child(9)"
    hits = {key.key: key.hits for key in page.report.keys}
    page.click(f"{heading} button")
    downward = [hits[key] for key in page.texts(rows)]
    assert downward == sorted(hits.values(), reverse=True)
    assert page.js("return document.querySelector(arguments[0]).ariaSort", heading) == "descending"
    page.click(f"{heading} button")
    assert [hits[key] for key in page.texts(rows)] == downward[::-1]
    page.click("#keys th:first-child button")
    numbers = [
        int(text.split("seqs=")[1].split(",")[0])
        for text in page.texts(rows)
        if re.match(r"decode.*greedy", text)
    ]
    assert numbers == sorted(numbers)  # 2 comes before 16


def test_another_key_shows_another_step(page: Page) -> None:
    chains = [key for key in page.report.keys if key.chain]
    first, last = chains[0], chains[-1]
    page.choose("key", first.key)
    before = page.texts("#step")
    assert len(page.texts("#strip rect")) == len(first.chain)
    page.choose("key", last.key)
    assert page.texts("#step") != before
    assert page.texts("#keys tr.on .key") == [last.key]
    page.click(f"#keys tr[data-key='{first.key}'] button")
    assert page.js("return document.getElementById('key').value") == first.key
    assert page.texts("#step") == before


def test_hovering_and_arrow_keys_name_the_kernel(page: Page) -> None:
    key = next(key for key in page.report.keys if key.chain)
    page.choose("key", key.key)
    node = max(key.chain, key=lambda n: n.us or 0.0)
    target = page.browser.find_element("css selector", f"#strip rect[data-i='{key.chain.index(node)}']")
    webdriver.ActionChains(page.browser).move_to_element(target).perform()
    shown = page.text("#tip")
    assert all(words in shown for words in (node.kernel, node.op, "×".join(map(str, node.grid)), "block"))
    strip = page.browser.find_element("id", "strip")
    page.js("arguments[0].focus()", strip)
    webdriver.ActionChains(page.browser).send_keys("\ue011\ue014").perform()  # Home, right
    assert key.chain[1].kernel in page.text("#tip")


def test_two_keys_are_compared(page: Page) -> None:
    chains = [key for key in page.report.keys if key.chain]
    page.choose("left", chains[0].key)
    page.choose("right", chains[0].key)
    assert "No field differs" in page.text("#diff")
    assert "nodes are the same" in page.text("#diff")
    page.choose("right", chains[-1].key)
    shown = page.text("#diff")
    assert "Fields that differ" in shown
    assert chains[0].key in shown
    assert chains[-1].key in shown
    changed = {node.kernel for node in chains[-1].chain} - {node.kernel for node in chains[0].chain}
    assert all(kernel in shown for kernel in changed)


def test_the_difference_of_two_given_keys_is_shown_first(browser: Any, tmp_path: Path) -> None:
    report = GraphReport.from_json(EXAMPLE.read_text(encoding="utf-8"))
    pair = (report.keys[-1].key, report.keys[0].key)
    opened = Page(browser, tmp_path, report, compare=pair)
    assert opened.js("return ['left', 'right'].map(id => document.getElementById(id).value)") == list(pair)
    assert opened.complaints() == []


def test_the_page_says_what_a_batch_would_do(page: Page) -> None:
    for size in page.report.ladder[:4]:
        page.choose("batch", str(size))
        assert "on the ladder" in page.text("#answer")
    page.choose("batch", str(page.report.max_num_seqs + 1))
    assert "Never happens" in page.text("#answer")
    page.choose("batch", "0")
    assert "1 or more" in page.text("#answer")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_not_blank(page: Page, tmp_path: Path, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    shot = tmp_path / f"{scheme}.png"
    page.browser.save_screenshot(str(shot))
    blank = tmp_path / "blank.png"
    page.js("document.body.style.visibility = 'hidden'")
    page.browser.save_screenshot(str(blank))
    assert shot.stat().st_size > 4 * blank.stat().st_size  # a plain area compresses to nothing
    background = page.js("return getComputedStyle(document.body).backgroundColor")
    channels = [int(part) for part in background[4:-1].split(",")]
    assert (max(channels) < 64) == (scheme == "dark")


LONG = dataclasses.replace(
    KeyReport("decode[tokens=1, seqs=1, greedy]", "decode", 1, 1, "greedy", "captured"),
    chain=synthetic_chain(1, "greedy", layers=99),
)
UNTIMED = tuple(dataclasses.replace(node, us=None) for node in LONG.chain)
HALF = LONG.chain[:250] + UNTIMED[250:]
FEW = dataclasses.replace(EMPTY, mode="FULL_DECODE_ONLY", ladder=(1,))


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (EMPTY, "No graph keys"),
        (dataclasses.replace(FEW, keys=(LONG,)), "add up to"),
        (dataclasses.replace(FEW, keys=(dataclasses.replace(LONG, chain=UNTIMED),)), "not measured"),
        (dataclasses.replace(FEW, keys=(dataclasses.replace(LONG, chain=HALF),)), "250 nodes were not timed"),
        (dataclasses.replace(FEW, keys=(dataclasses.replace(LONG, chain=()),)), "was not recorded"),
        (
            dataclasses.replace(FEW, model=EVIL, keys=(dataclasses.replace(LONG, key=EVIL, state=EVIL),)),
            "alert(1)",
        ),
    ],
    ids=["empty", "500 nodes", "untimed", "half timed", "no chain", "hostile names"],
)
def test_unusual_reports_render(browser: Any, tmp_path: Path, report: GraphReport, expected: str) -> None:
    opened = Page(browser, tmp_path, report)
    assert expected in opened.text("body")
    assert opened.complaints() == []
    chain = report.keys[0].chain if report.keys else ()
    assert len(opened.texts("#strip rect")) == len(chain)

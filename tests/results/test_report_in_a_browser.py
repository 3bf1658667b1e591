"""The report in a real browser: what it asks for, whether it fits, and whether it can be used without eyes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from job.manifest import Manifest
from job.results.report import render
from tests.results.test_report import SHAPES, at
from tests.support.browser import DESKTOP, MISSING, PHONE, chromium, installed, opened
from tests.support.report_example import example, photos

View = tuple[tuple[int, int], Literal["light", "dark"]]
EVERY_VIEW: tuple[View, ...] = ((PHONE, "light"), (PHONE, "dark"), (DESKTOP, "light"), (DESKTOP, "dark"))
# Place, exact value and text of every quoted value, as the browser has them in its document.
QUOTED = "Array.from(document.querySelectorAll('[data-path]'), e => [e.dataset.path, e.dataset.value, e.textContent])"
UNFOLD = "document.querySelectorAll('details').forEach(details => details.open = true)"
OVERFLOW = "document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = installed()
    if path is None:
        pytest.skip(MISSING)
    with chromium(path) as running:
        yield running


def check(browser: Browser, record: Manifest, folder: Path, views: Sequence[View] = EVERY_VIEW) -> None:
    """Open the report of ``record`` in windows of these sizes and colour schemes, and look for anything wrong."""
    path = folder / "report.html"
    path.write_text(render(record, photos(record, 48)), encoding="utf-8")
    document = json.loads(record.to_json())
    for size, scheme in views:
        with opened(browser, path, size, scheme) as seen:
            page = seen.page
            assert page.evaluate(OVERFLOW) == 0
            page.evaluate(UNFOLD)
            assert page.evaluate(OVERFLOW) == 0
            assert page.locator("h1").is_visible()
            assert all(image.evaluate("image => image.naturalWidth") == 48 for image in page.locator("img").all())
            quoted = page.evaluate(QUOTED)
            assert quoted
            for pointer, exact, text in quoted:
                assert (text if exact is None else json.loads(exact)) == at(document, pointer)
            found = Axe().run(page)
            assert found.violations_count == 0, found.generate_report()
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(255, 255, 255)") == (scheme == "light")
        assert [address for address in seen.requests if not address.startswith("data:")] == [path.as_uri()]
        assert seen.console == []


def test_the_page_opens_without_a_request_or_a_complaint_and_fits(browser: Browser, tmp_path: Path) -> None:
    check(browser, SHAPES["hostile"](), tmp_path, [(PHONE, "dark"), (DESKTOP, "light")])


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_pages_of_every_shape_open_and_fit(browser: Browser, shape: str, tmp_path: Path) -> None:
    check(browser, SHAPES[shape](), tmp_path)


@pytest.mark.slow
def test_a_page_of_forty_results_opens_and_fits_and_stays_below_two_megabytes(browser: Browser, tmp_path: Path) -> None:
    record = example(arms=("frozen", "fine_tune"))
    assert len(record.results) == 40
    assert len(render(record, photos(record, 160))) < 2_000_000
    check(browser, record, tmp_path)


def test_a_page_that_asks_for_something_would_be_noticed(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text(
        '<!DOCTYPE html><html><title>x</title><img src="http://127.0.0.1:9/x.png"><p style="width: 500px">x</p></html>',
        encoding="utf-8",
    )
    with opened(browser, path, PHONE) as seen:
        assert seen.page.evaluate(OVERFLOW) > 0
        assert Axe().run(seen.page).violations_count > 0
    assert "http://127.0.0.1:9/x.png" in seen.requests
    assert seen.console

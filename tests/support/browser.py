"""A real browser, headless, that tells what a page asked for and complained of."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page, sync_playwright

PHONE, DESKTOP = (360, 740), (1280, 900)
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = "no Chromium: apt-get install chromium, or python -m playwright install chromium"


def installed() -> str | None:
    """Return the browser's path: the system's, else Playwright's own, else None."""
    system = next(filter(None, map(shutil.which, _NAMES)), None)
    if system:
        return system
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


@contextmanager
def chromium(path: str) -> Iterator[Browser]:
    """Start the browser."""
    # Chromium refuses its own sandbox to root, who runs tests in a container
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@dataclass
class Opened:
    """An open page, the addresses that it asked for, and what stood on the console."""

    page: Page
    requests: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)


@contextmanager
def opened(
    browser: Browser, path: Path, size: tuple[int, int] = DESKTOP, scheme: Literal["light", "dark"] = "light"
) -> Iterator[Opened]:
    """Open a local file in a window of ``size`` CSS pixels."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    seen = Opened(page)
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("console", lambda message: seen.console.append(message.text))
    page.on("pageerror", lambda error: seen.console.append(str(error)))
    page.goto(path.as_uri(), wait_until="networkidle")
    yield seen
    page.close()

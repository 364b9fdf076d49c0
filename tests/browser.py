"""A real headless Chromium for tests of pages: what it shows, what it complains of, what it looks like."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, Response, sync_playwright

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LOAD_MS = 30_000  # a loaded machine takes long to draw a page; an absent text fails after this


@dataclass
class Tab:
    """A page and all it complained of."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def open(self, url: str, text: str) -> None:
        """Go there and wait until the text can be seen."""
        self.page.goto(url)
        self.page.get_by_text(text).first.wait_for(timeout=LOAD_MS)

    def check(self) -> None:
        """Nothing failed, and there is something to see: a blank page has one colour or two."""
        assert self.complaints == []
        pixels = np.asarray(Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")).reshape(-1, 3)
        colours, counts = np.unique(pixels, axis=0, return_counts=True)
        assert len(colours) > 50
        assert counts.max() < 0.99 * counts.sum()


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A headless Chromium with a profile of its own. Skips the test where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here, so pages are not looked at; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield opened
        opened.close()


@contextmanager
def open_tab(browser: Browser) -> Iterator[Tab]:
    """An empty page whose complaints are kept."""
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    found = Tab(page)

    def console(message: ConsoleMessage) -> None:
        if message.type == "error":
            found.complaints.append(message.text)

    def response(answer: Response) -> None:
        if answer.status >= 400:
            found.complaints.append(f"{answer.status} {answer.url}")

    page.on("console", console)
    page.on("response", response)
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.on("requestfailed", lambda request: found.complaints.append(f"{request.failure}: {request.url}"))
    yield found
    page.close()

"""A headless Chromium for tests, the one that the system has or the one that playwright installed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


class Complaints(list[str]):
    """What a page should never do: say something on the console, fail, ask the network, open a dialog."""

    def watch(self, page) -> None:
        page.on("console", lambda said: self.append(f"console {said.type}: {said.text}"))
        page.on("pageerror", lambda error: self.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.append(f"dialog: {dialog.message}"), dialog.dismiss()))

    def watch_network(self, page, allowed: tuple[str, ...] = ("file:", "data:", "blob:")) -> None:
        page.on("request", lambda asked: asked.url.startswith(allowed) or self.append(f"request: {asked.url}"))


@contextmanager
def chromium() -> Iterator:
    """The browser; skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra test")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as started:
        if path is None and not Path(started.chromium.executable_path).exists():
            pytest.skip("no Chromium here: apt-get install chromium, or playwright install chromium")
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser, address: str, complaints: Complaints, viewport: dict = DESKTOP, **options) -> Iterator:
    """A page at `address`, all its charts drawn."""
    context = browser.new_context(viewport=viewport, **options)
    page = context.new_page()
    complaints.watch(page)
    complaints.watch_network(page)
    page.goto(address)
    page.wait_for_selector("html[data-drawn]", timeout=60_000)
    try:
        yield page
    finally:
        context.close()

"""A real Chromium, the one on PATH, driven by Playwright: for the tests of the page and the serving benchmark."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def open_window(**context: Any) -> Iterator[Page]:
    """A page of a fresh profile; the arguments are those of Playwright's `Browser.new_page`."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield browser.new_page(**context)
        finally:
            browser.close()

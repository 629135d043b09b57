"""A real Chromium, driven by Playwright's protocol.

The browser is the machine's own: `STATEWISE_CHROMIUM` names one, or it is found on the path; none is downloaded.  One
browser serves a file of tests and no more: while it runs, Playwright holds this thread's event loop, which others need.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright

__all__ = ["browser"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WITHOUT = (
    "there is no Chromium: `make browser-tests` as root, or `apt-get install chromium`, or name one: "
    "STATEWISE_CHROMIUM=/path/to/chrome"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The machine's Chromium; without one the test is skipped."""
    path = os.environ.get("STATEWISE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(WITHOUT)
    with sync_playwright() as playwright:
        # Its sandbox needs rights that containers and root do not have; all it opens here is a page of ours.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()

"""A page of ours in a real Chromium, with no network: whatever it asks for or complains of fails the test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = "/usr/bin/chromium"
LOCAL = ("file:", "data:", "blob:")


@contextmanager
def opened(path: Path, **context: Any) -> Iterator[Any]:
    """The page of a file. context: of playwright's new_context, e.g. color_scheme="dark" """
    from playwright.sync_api import sync_playwright

    wrong: list[str] = []
    arguments = ["--enable-unsafe-swiftshader", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_context(offline=True, **context).new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: request.url.startswith(LOCAL) or wrong.append(f"asked for {request.url}"))
        page.on("console", lambda message: message.type == "error" and wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(path.as_uri())
        yield page
        browser.close()
    assert wrong == []

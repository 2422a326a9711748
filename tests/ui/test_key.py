"""A server with a key: the page loads without it, asks for it once, and sends it from then on."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.serving import tiny
from transept.serving.run import Running

pytestmark = pytest.mark.xdist_group("browser")
KEY = "a-very-secret-key"


def test_the_page_asks_for_the_key_once(browser: Browser, tmp_path: Path) -> None:
    with Running(tiny.settings(tmp_path, keys=(KEY,))) as server:
        context = browser.new_context(reduced_motion="reduce")
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.goto(server.address)
        dialog = page.locator("#key-dialog")
        expect(dialog).to_contain_text("started with a key")
        assert page.locator("body[data-ready]").count() == 0
        for wrong in ("not the key", ""):
            # A key has no spaces: the field says so, and nothing is sent.
            page.fill("#key", wrong)
            page.press("#key", "Enter")
            assert dialog.count() == 1 and page.eval_on_selector("#key", "node => !node.validity.valid")
        page.fill("#key", "another-key")
        page.press("#key", "Enter")
        expect(dialog.locator("[role=alert]")).to_contain_text("not the key of this server")
        page.fill("#key", KEY)
        page.press("#key", "Enter")
        page.wait_for_selector("body[data-ready]")
        page.fill("#prompt", "Tell me of the fox")
        page.press("#prompt", "Enter")
        page.wait_for_selector("article.assistant .stats")
        assert page.evaluate("Object.values(localStorage).concat(document.cookie).join().includes('secret')") is False
        page.reload()
        page.wait_for_selector("body[data-ready]")
        assert dialog.count() == 0 and page.locator("footer a:visible").count() == 0
        other = context.new_page()
        other.goto(server.address)
        other.click("#key-dialog button:text-is('Cancel')")
        expect(other.locator("main .error")).to_contain_text("Authorization")
        context.close()

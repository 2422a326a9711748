"""Writes the playground's pictures into docs/, from real models in a real browser; needs the test extra and Chromium."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def answered(page: Page, text: str) -> None:
    """Asks the chat page, greedily and briefly."""
    page.click("#settings summary")
    page.fill("#set-temperature", "0")
    page.fill("#set-max_tokens", "48")
    page.click("#settings summary")
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector("article.assistant .stats", timeout=120_000)


def looked(page: Page, view: str) -> None:
    """Opens a view of the Inspector and waits for what it shows."""
    page.click(f"#tab-{view}")
    page.wait_for_selector(f"#inspector-out[data-view={view}][aria-busy=false]", timeout=120_000)


def light(page: Page) -> None:
    """An answer with its tokens, and a map of attention beside it."""
    answered(page, "What is the capital of France?")
    page.click("button:has-text('Probabilities')")
    page.click(".token >> nth=0")
    page.click("nav a:has-text('Inspector')")
    page.fill("#inspected", "The animal did not cross the street because it was too tired.")
    looked(page, "attention")
    page.select_option("#inspector-panel select >> nth=1", "12")
    page.wait_for_timeout(1500)
    page.click("nav a:has-text('Chat')")
    page.click("article.assistant button:has-text('Inspect')")
    page.wait_for_selector("#inspector-out[aria-busy=false]", timeout=120_000)
    page.wait_for_timeout(1500)
    page.click("text=Inspect a text instead")
    page.fill("#inspected", "The animal did not cross the street because it was too tired.")
    page.click("text=Look inside")
    page.wait_for_timeout(2500)
    page.evaluate("scrollTo(0, 0)")


def dark(page: Page) -> None:
    """The embeddings' map, and the logit lens beside it."""
    page.click("nav a:has-text('Tasks')")
    page.click("#task-embeddings button[type=submit]")
    page.wait_for_selector("#map", timeout=120_000)
    page.click("#task-embeddings button:has-text('Inspect')")
    page.wait_for_selector("#inspector-out[aria-busy=false]", timeout=120_000)
    page.select_option("#inspector select >> nth=0", "smollm2-135m-instruct")
    page.fill("#inspected", "The capital of France is")
    looked(page, "lens")
    page.click("text=Look inside")
    page.wait_for_timeout(2500)
    page.evaluate("scrollTo(0, 0)")


def phone(page: Page) -> None:
    """A head switched off, on a narrow screen."""
    page.click("nav a:has-text('Inspector')")
    page.fill("#inspected", "The capital of France is")
    looked(page, "ablation")
    page.click(".head[data-key='self/0/3']")
    page.click(".head[data-at='1/-1']")
    page.mouse.move(0, 0)
    page.wait_for_timeout(2500)
    page.wait_for_selector("#inspector-out[aria-busy=false]", timeout=120_000)


def main() -> None:
    """All pictures."""
    from tests.ui.conftest import executable
    from transept.serving.run import Running
    from transept.serving.shelf import Settings

    wide, narrow = {"width": 1240, "height": 1040}, {"width": 400, "height": 1320}
    plans: list[Any] = [("light", "light", wide, light), ("dark", "dark", {**wide, "height": 960}, dark), ("phone", "light", narrow, phone)]
    with Running(Settings(models=("smollm2-135m-instruct", "minilm"), rows=4)) as server, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        for name, scheme, size, steps in plans:
            page = browser.new_page(viewport=size, color_scheme=scheme)
            page.goto(server.address)
            page.wait_for_selector("body[data-ready]")
            steps(page)
            path = ROOT / "docs" / f"playground-{name}.png"
            page.screenshot(path=path)
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()

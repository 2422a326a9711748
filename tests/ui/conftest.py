"""One server of tiny models and one headless Chromium for all tests of the playground."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import torch

import transept
from tests.contracts.conftest import one_thread
from tests.contracts.decoders import initialised
from tests.serving import tiny
from transept.core.registry import family
from transept.data.text.bpe import train_bpe
from transept.door import Model
from transept.serving.run import Running

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")

__all__ = ["one_thread"]
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def executable() -> str | None:
    """A Chromium of this machine: $TRANSEPT_BROWSER, or one on the path; None leaves it to playwright, which may have fetched one."""
    return os.environ.get("TRANSEPT_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="session")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as p:
        try:
            # Without its sandbox, which does not start for root in a container; it opens only the pages of this repository.
            found = p.chromium.launch(executable_path=executable(), args=["--no-sandbox", "--disable-gpu"])
        except sync_api.Error as error:
            if executable() is not None:
                raise
            pytest.skip(f"needs Chromium: apt-get install chromium-headless-shell, or set TRANSEPT_BROWSER ({str(error).splitlines()[0]})")
        yield found
        found.close()


@pytest.fixture(scope="session")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Six tiny models; without the checks of shapes at run time, which make their steps ten times as long."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    root = tmp_path_factory.mktemp("models")
    settings = tiny.settings(root, encoders=True)
    models = (settings.models[0], str(tiny.decoder(root / "other", seed=1)), *settings.models[1:], str(encoder_decoder(root / "t5")))
    with Running(replace(settings, models=models)) as server:
        yield server
    jaxtyping.config.update("jaxtyping_disable", before)


def encoder_decoder(folder: Path) -> Path:
    """A T5 of two layers over the decoders' vocabulary."""
    torch.manual_seed(0)
    family_page = family("t5")
    tokenizer = train_bpe(tiny.TEXT, vocab=320)
    spec = family_page.tiny["2019"].replace(vocab=tokenizer.vocab_size)
    form = family_page.published[0]
    transept.save(Model(initialised((form.build or family_page.build)(spec)), family_page, form, spec, tokenizer), folder)
    return folder


@pytest.fixture
def page(browser: sync_api.Browser, playground: Running) -> Iterator[sync_api.Page]:
    """The playground in a fresh window; at the end nothing was asked of another machine and no error was logged."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, accept_downloads=True, reduced_motion="reduce")
    context.set_default_timeout(30_000)
    shown = context.new_page()
    outside: list[str] = []
    wrong: list[str] = []
    own = (playground.address + "/", f"blob:{playground.address}/")
    shown.on("request", lambda request: None if request.url.startswith(own) else outside.append(request.url))
    shown.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.goto(playground.address)
    shown.wait_for_selector("body[data-ready]")
    yield shown
    context.close()
    assert not outside and not wrong, (outside, wrong)
    tiny.settle(playground.app)

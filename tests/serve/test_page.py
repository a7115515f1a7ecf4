"""The page at /, in headless Chromium, as wide as a phone."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from dit_serve.app import Settings
from tests.serve.browser import Browser, chromium
from tests.serve.serving import WAIT, running
from tests.serve.test_load import Slow

WIDTH, HEIGHT = 375, 740
KEY = "0123456789abcdef"

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium: make browser")


def until(browser: Browser, script: str) -> None:
    end = time.monotonic() + WAIT
    while not browser.evaluate(script):
        assert time.monotonic() < end, (script, browser.console, browser.evaluate("document.body.innerText"))
        time.sleep(0.05)


def test_a_picture_on_a_phone(handmade, tmp_path: Path) -> None:
    """Give the key, choose a class, draw two pictures, draw many and stop, and read what was wrong."""
    settings = Settings(grace=5, key=KEY.encode())
    with running(handmade("labels"), settings) as server, chromium(tmp_path / "profile", WIDTH, HEIGHT) as browser:
        browser("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
        until(browser, "typeof at === 'function' && !at('key-label').hidden")
        until(browser, "at('status').textContent === 'no API key, or a wrong one'")
        browser.console.clear()  # the browser reports the 401 by itself
        browser.type("key", KEY)
        browser.evaluate("at('key').dispatchEvent(new Event('change'))")
        until(browser, "at('model').options.length === 1 && at('labels').options.length === 5")
        assert browser.evaluate("at('prompt').placeholder") == "a class: ant, bee, honey bee …"

        for field, text in (("prompt", "bee"), ("n", "2"), ("steps", "6"), ("seed", "5")):
            browser.type(field, text)
        browser.click("draw")
        until(browser, "at('status').textContent === 'done'")
        captions = browser.evaluate("[...document.querySelectorAll('figcaption')].map((one) => one.textContent)")
        assert [caption.split(",")[0] for caption in captions] == ["seed 5", "seed 6"]
        until(browser, "[...document.images].every((one) => one.naturalWidth === 32) && document.images.length === 2")
        assert browser.evaluate("at('progress').value") == 1
        expected = server.draw("bee", n=2, seed=5, num_inference_steps=6).status
        assert expected == 401  # the page sent the key, a client without it draws nothing

        # It fits: nothing is cut off at the side, and fingers hit what they aim at.
        assert browser.evaluate("document.documentElement.scrollWidth") <= WIDTH
        shown = "[...document.querySelectorAll('input, select, button')].filter((one) => one.offsetParent)"
        heights = f"{shown}.map((one) => one.offsetHeight)"
        assert min(browser.evaluate(heights)) >= 44

        engines = server.model.batcher.pipe.engines
        engines._opened["denoiser"] = Slow(engines.opened["denoiser"])  # for seconds, so that it can be stopped
        for field, text in (("steps", "250"), ("n", "8")):
            browser.type(field, text)
        browser.click("draw")
        until(browser, "!at('stop').disabled")
        browser.click("stop")
        until(browser, "at('status').textContent === 'the request was cancelled' && !at('draw').disabled")
        assert server.model.batcher.active == 0

        browser.console.clear()
        browser.type("prompt", "wasp")
        browser.click("draw")
        until(browser, "at('status').className === 'bad'")
        assert browser.evaluate("at('status').textContent").startswith("class 'wasp' is not known")
        assert all("400" in line for line in browser.console)  # no script failed, and the policy refused nothing

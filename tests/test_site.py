"""The documentation site: strict about links, and fit for a phone and a desk, light and dark."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from tests.serve.browser import chromium
from tests.serve.test_page import until

SITE = Path(__file__).parents[1] / "docs" / "site"


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_site", SITE / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "zensical"
    command = [program, "build", "--strict", "--config-file", folder / "zensical.toml"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | {"NO_COLOR": "1"})


@pytest.fixture(scope="module")
def site(make: ModuleType, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    make.write(folder / "pages")
    shutil.copy(SITE / "zensical.toml", folder)
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_reference_is_the_code(site: Path) -> None:
    text = (site / "pages" / "reference-cli.md").read_text(encoding="utf-8")
    assert {"### dit-export tune", "### dit-run sample", "## dit-serve"} <= set(text.splitlines())
    assert "--guidance-interval" in text
    text = (site / "pages" / "reference-python.md").read_text(encoding="utf-8")
    assert "### Pipeline.sample" in text and "### Request.check" in text


def test_every_page_is_in_the_navigation(site: Path) -> None:
    listed = (site / "zensical.toml").read_text(encoding="utf-8")
    assert all(f'"{page.name}"' in listed for page in (site / "pages").glob("*.md"))


@pytest.mark.parametrize("link", ["int8.md#no-such-heading", "nowhere.md"])
def test_a_broken_link_fails(site: Path, tmp_path: Path, link: str) -> None:
    (tmp_path / "pages").mkdir()
    shutil.copy(site / "pages" / "int8.md", tmp_path / "pages")
    (tmp_path / "pages" / "index.md").write_text(f"# Start\n\n[a link]({link})\n")
    (tmp_path / "zensical.toml").write_text('[project]\nsite_name = "x"\ndocs_dir = "pages"\n')
    assert build(tmp_path).returncode


def test_a_link_to_a_file_that_is_gone_fails(make: ModuleType, tmp_path: Path) -> None:
    links = make._Links(make.ROOT / "README.md", {}, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"README.md links to docs/gone.md"):
        make.LINK.sub(links, "[gone](docs/gone.md)")


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site over HTTP: from a file, scripts of the page do not run."""
    handler = partial(QuietHandler, directory=str(site / "html"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium: make browser")
@pytest.mark.parametrize(("scheme", "palette"), [("light", "default"), ("dark", "slate")])
@pytest.mark.parametrize(("width", "height"), [(375, 740), (1280, 900)])
def test_it_fits_the_screen(address: str, tmp_path: Path, width: int, height: int, scheme: str, palette: str) -> None:
    with chromium(tmp_path / "profile", width, height) as browser:
        browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for page in ("index", "reference-cli", "benchmarks"):
            browser("Page.navigate", url=f"{address}/{page}.html")
            ready = f"document.readyState === 'complete' && location.pathname === '/{page}.html'"
            until(browser, f"{ready} && document.body.dataset.mdColorScheme === '{palette}'")
            assert browser.evaluate("document.documentElement.scrollWidth") <= width, page
            assert browser.evaluate("[...document.images].every((one) => one.naturalWidth > 0)"), page
        assert not browser.console

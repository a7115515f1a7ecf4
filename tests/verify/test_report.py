"""report.html in a real browser: nothing from outside, nothing on the console, all pictures there, at any width."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_export.cli import main
from dit_export.verify import curves, report
from dit_runtime import images
from dit_runtime.bundle import manifest
from dit_runtime.errors import BundleError
from tests.tamper import edit, seal, swap_vectors

WIDTHS = {"phone": 390, "desk": 1280}
HEIGHT = 2600
SCHEMES = {"light": "1", "dark": "0"}  # Blink's preferredColorScheme
# What a page's own script can tell; it goes into a copy, for the report itself has no script and allows none.
PROBE = """<script>addEventListener("load", () => { document.title = JSON.stringify({
  pictures: [...document.images].map(image => image.complete && image.naturalWidth),
  sizes: [...document.images].map(image => image.clientWidth),
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
}) })</script></body>"""
LAYERS = [
    {"layer": f"blocks.{n}.mlp.fc2", "error": 0.02 / (n + 1), "kept": n < 2, "why": "budget" if n < 2 else ""}
    for n in range(30)
]


def chromium(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probe(page: Path, folder: Path, width: int) -> dict:
    """Return what a browser finds in the page."""
    copy = folder / "probed.html"
    text = page.read_text(encoding="utf-8")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>\n', text)
    assert policy
    copy.write_text(text.replace(policy[0], "").replace("</body>", PROBE), encoding="utf-8")
    done = chromium(copy, folder, f"--window-size={width},{HEIGHT}", "--dump-dom")
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stderr
    return json.loads(title[1])


def screenshot(page: Path, folder: Path, width: int, scheme: str) -> np.ndarray:
    path = folder / f"{page.stem}-{width}-{scheme}.png"
    options = [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", f"--screenshot={path}"]
    done = chromium(page, folder, f"--window-size={width},{HEIGHT}", *options)
    assert not console(done)
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture(scope="module")
def failed(shared_embedders, tmp_path_factory) -> Path:
    """The page of a bundle that was broken, with everything on it that a page can have."""
    folder = tmp_path_factory.mktemp("report")
    bundle = Path(shutil.copytree(shared_embedders.bundle, folder / "bundle"))
    swap_vectors(bundle, 2)
    (bundle / report.SENSITIVITY).write_text(json.dumps(LAYERS))
    edit(bundle, lambda table: table["files"].update({report.SENSITIVITY: {}}))
    seal(bundle)
    page = folder / "failed.html"
    arguments = ["--against", str(shared_embedders.bundle), "--threads", "1", "--report", str(page)]
    assert main(["regress", str(bundle), *arguments]) == 1
    return page


@pytest.mark.parametrize("text", ["[{}]", "{", "[1]", '[{"layer": "a", "error": "b", "kept": true}]'])
def test_a_damaged_table_is_one_line(shared_embedders, tmp_path, text):
    (tmp_path / report.SENSITIVITY).write_text(text)
    contract = manifest.read(shared_embedders.bundle)
    assert report.read_sensitivity(tmp_path, contract) == []
    contract = replace(contract, files=manifest.describe_files(tmp_path))
    for words in ("sensitivity.json cannot be read", "does not have the sha256"):
        with pytest.raises(BundleError, match=words) as caught:
            report.read_sensitivity(tmp_path, contract)
        assert "\n" not in str(caught.value)
        (tmp_path / report.SENSITIVITY).write_text("x" * len(text))


@pytest.fixture(scope="module")
def built(shared_embedders) -> Path:
    """The page that the build itself has written."""
    return shared_embedders.bundle / report.NAME


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("page", ["built", "failed"])
def test_a_browser_shows_it(request, tmp_path, page, width):
    path = request.getfixturevalue(page)
    measured = probe(path, tmp_path, width)
    assert measured["pictures"] == [64] * 6  # two samples: PyTorch's, ours, the difference; of 64 pixels each
    assert min(measured["sizes"]) > 90 and measured["wide"] == 0  # to be seen, and nothing to scroll sideways
    light, dark = (screenshot(path, tmp_path, width, scheme) for scheme in SCHEMES)
    assert light.shape == dark.shape == (HEIGHT, width, 3)
    assert light[:4].mean() > 240 and dark[:4].mean() < 40
    for shot in (light, dark):
        colours = np.unique(shot.reshape(-1, 3), axis=0)
        assert len(colours) > 2000  # the pictures' own; a page without them has some hundreds
        assert (shot[600:1600] != shot[0, 0]).any(2).mean() > 0.03  # and the middle is not empty


def test_the_browser_tests_can_fail(failed, tmp_path):
    """A picture that does not decode, a script that throws, something too wide: each is seen."""
    text = failed.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(re.sub(r"(data:image/png;base64,).{40}", r"\1AAAA", text, count=1))
    measured = probe(broken, tmp_path, 390)
    assert measured["pictures"] == [0] + [64] * 5
    broken.write_text(text.replace("<header>", '<div style="width: 900px">wide</div><script>boom()</script><header>'))
    assert probe(broken, tmp_path, 390)["wide"] > 0
    assert console(chromium(broken, tmp_path, "--dump-dom"))  # the policy refuses the script, and says so


def test_it_needs_nothing_from_outside(built, failed):
    for page in (built, failed):
        text = page.read_text(encoding="utf-8")
        assert page.stat().st_size < 3_000_000
        sources = re.findall(r'\b(?:src|href|srcset|data)="([^"]*)"', text)
        assert sources and all(source.startswith("data:") for source in sources)
        assert not re.findall(r"<script|@import|url\(|https?://", text)
        assert "default-src 'none'" in text


def test_it_says_what_was_found(shared_embedders, built, failed):
    contract = manifest.read(shared_embedders.bundle)
    assert report.NAME in contract.files
    text = built.read_text(encoding="utf-8")
    assert "all gates passed" in text and "FAILED" not in text
    assert "3x64/2 at 64 px in fp32 on onnxruntime" in text and "proof: another condition" in text
    assert contract.built_with["versions"]["torch"] in text and "Sensitivity" not in text
    text = failed.read_text(encoding="utf-8")
    assert "a gate failed" in text and "denoiser: first moved: blocks.1.attn (residual sum 3 of 6)" in text
    assert text.count("<polyline") == 5 and "thing 250, item 250 (250), seed 0, guidance 4" in text
    assert text.count('class="bar kept"') == 2 and "the other 6 layers" in text and "2 of 30 stay in float" in text


def test_without_a_decoder(meta):
    text = (meta.bundle / report.NAME).read_text(encoding="utf-8")
    assert "<img" not in text and "Error by step" in text


def test_a_report_in_the_bundle_keeps_it_whole(meta_copy, tmp_path, capsys):
    """Its size and sha256 are the manifest's, or the bundle would be refused."""
    report_file = meta_copy / report.NAME
    before = report_file.read_text(encoding="utf-8")
    assert main(["regress", str(meta_copy), "--threads", "1", "--report", str(report_file)]) == 0
    assert report_file.read_text(encoding="utf-8") != before
    contract = manifest.read(meta_copy)
    manifest.check_files(meta_copy, contract, [report.NAME])
    for name in ("manifest.json", "other.html"):
        arguments = ["--threads", "1", "--report", str(meta_copy / name)]
        assert main(["regress", str(meta_copy), *arguments]) == 2
        assert "only report.html may stand" in capsys.readouterr().err
    assert manifest.read(meta_copy) == contract


def test_large_pictures_are_bounded():
    """Noise, which no PNG makes smaller: a 512 px picture is shown at half."""
    picture = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    assert len(report._data(picture)) < 270_000
    flat = np.full((512, 512, 3), 7, np.uint8)
    flat[::2] = 9
    assert report._data(flat) == report._data(np.full((256, 256, 3), 8, np.uint8))
    assert report._data(flat[:, :256]) == report._data(np.full((256, 128, 3), 8, np.uint8))
    assert report._data(flat[:256]) == report._data(np.full((128, 256, 3), 8, np.uint8))


def test_curves_of_strange_errors():
    svg = curves.svg({"a <b>": {1: 0.0, 2: 1e-3, 3: float("nan")}, "c": {1: float("inf")}}, steps=3)
    assert svg.count("<circle") == 2 and "nan" not in svg and "a &lt;b&gt;" in svg
    assert "No step" in curves.svg({"a": {1: float("nan")}}, steps=1)
    assert "<circle" in curves.svg({"a": {1: 1e-3}}, steps=1)


def test_png_is_what_others_read():
    picture = np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(images.png(picture)))), picture)

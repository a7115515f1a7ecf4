"""report.html: what a bundle is and how near it is to PyTorch, as one page that needs nothing from outside."""

from __future__ import annotations

import base64
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_export.verify import curves
from dit_export.verify.metrics import kept_in_float, number, sentence, text_in_fp32
from dit_runtime import backends, images
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.bundle.records import LABELS
from dit_runtime.errors import BundleError, UsageError
from dit_runtime.files import write_file
from dit_runtime.verify import Figure, Reference, Replay, relative_error, worst

if TYPE_CHECKING:
    from dit_export.verify.check import Built
    from dit_export.verify.gate import Result

NAME = "report.html"
SENSITIVITY = "sensitivity.json"
PAGE = Path(__file__).with_name("report.page.html")
SIDE = 256  # larger pictures are shown at half, a third, … so that the page stays below 2 MB
SMALL = 128  # pictures up to this size are shown with their pixels as squares
BARS = 24  # layers that are always shown
CURVES = ("prediction", "unguided", "null condition", "variance")


class Exhibit(NamedTuple):
    """A sheet of samples, and what is said of it."""

    caption: str
    sheet: NDArray[np.uint8]


@dataclass(frozen=True)
class Page:
    name: str
    contract: Manifest
    reference: Reference
    replay: Replay
    figures: Sequence[Figure]
    failures: Sequence[str]  # in words, the first by cause first
    passed: bool
    exhibits: Sequence[Exhibit] = ()  # of several bundles, to be looked at side by side


def page(name: str, contract: Manifest, built: Built) -> Page:
    """Return the page of a build."""
    failures = [sentence(figure) for figure in built.checks if not figure.passed][:1]
    return Page(name, contract, built.reference, built.replay, built.checks, failures, built.passed)


def page_of_gate(name: str, result: Result) -> Page:
    failures = [] if result.first is None else [sentence(result.first), *result.located]
    return Page(name, result.contract, result.reference, result.replay, result.checks, failures, result.passed)


def require_place(path: Path, bundle: Path) -> bool:
    """Return whether it is the bundle's own report; refuse any other path inside the bundle."""
    within = path.resolve().is_relative_to(bundle.resolve())
    if within and path.resolve() != bundle.resolve() / NAME:
        raise UsageError(f"{path}: inside the bundle, where only {NAME} may stand; choose another place")
    return within


def write(path: Path, bundle: Path, page: Page) -> None:
    """The bundle's own report goes into its manifest, with its size and sha256."""
    within = require_place(path, bundle)
    write_file(path, html(bundle, page))
    if within:
        files = {**page.contract.files, NAME: manifest.describe(path)}
        manifest.write(bundle, replace(page.contract, files=files))


def html(bundle: Path, page: Page) -> str:
    contract = page.contract
    model, step = contract.model, contract.step
    size = f" at {model['resolution']} px" if "resolution" in model else ""
    title = f"{model.get('name', 'A network')}{size} in {step.precision} on {step.backend}"
    failures = "".join(f'<p class="failure">{escape(text)}</p>\n' for text in page.failures)
    sections = [
        _pictures(page),
        _exhibits(page.exhibits),
        _curves(page),
        _sensitivity(read_sensitivity(bundle, contract), contract),
        _sizes(page),
        _gates(page.figures),
        _origin(contract),
    ]
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        subtitle=escape(f"{page.name}: how near these engines are to PyTorch in fp32"),
        mood="good" if page.passed else "bad",
        verdict="all gates passed" if page.passed else "a gate failed",
        failures=failures,
        sections="\n".join(section for section in sections if section),
    )


def _pictures(page: Page) -> str:
    reference, pictures = page.reference, page.replay.pictures
    if pictures is None:
        return ""
    samples = []
    for index, (ours, theirs) in enumerate(zip(pictures, reference.images, strict=True)):
        gap = np.abs(ours.astype(int) - theirs.astype(int))
        gain = 1
        while gap.max() and gap.max() * gain * 2 <= 255:
            gain *= 2
        largest = f"largest {gap.max()} of 255, shown × {gain}" if gap.max() else "none"
        parts = (("PyTorch, fp32", theirs), ("engine", ours), (f"difference: {largest}", (gap * gain).astype(np.uint8)))
        trio = "".join(
            f'<figure><img {"class=small " if max(images.still(ours).shape) <= SMALL else ""}alt="{escape(text)}" '
            f'src="{_data(images.still(picture))}"><figcaption>{escape(text)}</figcaption></figure>'
            for text, picture in parts
        )
        name = _asked(page, index)
        psnr = images.psnr(ours, theirs)
        near = "equal" if math.isinf(psnr) else f"{psnr:.1f} dB PSNR"
        line = f"{name}, seed {reference.seeds[index]}, guidance {reference.guidance[index]:g}: {near}, "
        line += f"SSIM {images.ssim(ours, theirs):.4f}"
        samples.append(f'<div class="sample"><div class="trio">{trio}</div><p class="quiet">{escape(line)}</p></div>')
    title = "<h2>Pictures of the same seeds</h2>\n"
    if count := reference.frames.size:
        title += f'<p class="quiet">{count} frames of each video, which stand for all of them</p>\n'
    return title + "\n".join(samples)


def _asked(page: Page, sample: int) -> str:
    """Name a sample by its class, or by its number."""
    labels = page.reference.condition.get(LABELS)
    if labels is None or not page.contract.classes:
        return f"condition {sample}"
    label, names = int(labels[sample]), page.contract.labels
    return f"{names[label]} ({label})" if names else f"label {label}"


def _exhibits(exhibits: Sequence[Exhibit]) -> str:
    if not exhibits:
        return ""
    sheets = "".join(
        f'<figure><img alt="{(text := escape(caption))}" src="{_png(sheet)}"><figcaption>{text}</figcaption></figure>'
        for caption, sheet in exhibits
    )
    return f'<h2>Samples side by side</h2>\n<div class="sheets">{sheets}</div>'


def _data(picture: NDArray[np.uint8]) -> str:
    factor = math.ceil(max(picture.shape[:2]) / SIDE)
    if factor > 1:
        rows, columns = (side // factor for side in picture.shape[:2])
        cut = picture[: rows * factor, : columns * factor].astype(np.float64)
        picture = np.rint(cut.reshape(rows, factor, columns, factor, 3).mean((1, 3))).astype(np.uint8)
    return _png(picture)


def _png(picture: NDArray[np.uint8]) -> str:
    return "data:image/png;base64," + base64.b64encode(images.png(picture)).decode("ascii")


def _curves(page: Page) -> str:
    reference, steps = page.reference, len(page.reference.timesteps)
    lines: dict[str, dict[int, float]] = {}
    for name in CURVES:
        points = {answer.step + 1: answer.error for answer in page.replay.answers if answer.name == name}
        if points:
            lines["prediction, guided" if name == "prediction" else name] = points
    run = enumerate(page.replay.latents)
    lines["latents of the free run"] = {i + 1: relative_error(x, reference.latents[i + 1]) for i, x in run}
    return (
        "<h2>Error by step</h2>\n"
        '<p class="quiet">Relative L2 beside PyTorch. Each step is asked what PyTorch was asked, so its error is its '
        "own; only in the free run does one step's error go on to the next.</p>\n" + curves.svg(lines, steps)
    )


class Sensitivity(NamedTuple):
    """A layer of `sensitivity.json`."""

    layer: str
    error: float  # that quantizing it alone causes
    in_float: bool
    reason: str


def read_sensitivity(bundle: Path, contract: Manifest) -> list[Sensitivity]:
    """Return the layers of a searched build, the most sensitive first; none of another build."""
    name = contract.own(SENSITIVITY)
    if name not in contract.files:
        return []
    manifest.check_files(bundle, contract, [name])
    try:
        table = json.loads(manifest.inside(bundle, name).read_text(encoding="utf-8"))
        layers = [
            Sensitivity(str(row["layer"]), float(row["error"]), bool(row["kept"]), str(row.get("why") or ""))
            for row in table
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{bundle}: {name} cannot be read: {error}; rebuild the bundle") from None
    return sorted(layers, key=lambda layer: -layer.error)


def _sensitivity(layers: Sequence[Sensitivity], contract: Manifest) -> str:
    if not layers:
        return ""
    most = layers[0].error or 1.0

    def bar(layer: Sensitivity) -> str:
        reason = f' <span class="why">{escape(layer.reason)}</span>' if layer.in_float and layer.reason else ""
        note = f"{layer.error:.2e}" + (" · float" if layer.in_float else "")
        width = f"{100 * layer.error / most:.1f}%"
        return (
            f'<div><span class="name">{escape(layer.layer)}{reason}</span><span class="track">'
            f'<span class="bar{" kept" if layer.in_float else ""}" style="width:{width}"></span>'
            f'</span><span class="value">{note}</span></div>'
        )

    in_float = sum(layer.in_float for layer in layers)
    text = f'<div class="bars">{"".join(map(bar, layers[:BARS]))}</div>'
    if rest := layers[BARS:]:
        more = "".join(map(bar, rest))
        text += f'<details><summary>the other {len(rest)} layers</summary><div class="bars">{more}</div></details>'
    lines = [f"The error that quantizing one layer alone causes. {in_float} of {len(layers)} stay in float."]
    if cost := contract.built_with.get("kept_float"):
        lines += kept_in_float(cost, contract.step.precision)
    head = "".join(f'<p class="quiet">{escape(line)}</p>\n' for line in lines)
    return f"<h2>Sensitivity of layers</h2>\n{head}{text}"


def _sizes(page: Page) -> str:
    contract = page.contract
    rows = []
    for stage in contract.stages:
        size = sum(contract.files[file].size for file in stage.files)
        precision = backends.computed(stage.backend, stage.precision)
        rows.append([stage.name, stage.runs, precision, stage.backend, f"{size / 1e6:.1f} MB"])
    size_table = _table(["stage", "runs once per", "precision", "backend", "size"], rows, numbers={4})
    seconds = page.replay.seconds[1:] or page.replay.seconds
    batch = len(page.reference.guidance)
    line = (
        f"A guided step of {batch} pictures took {_time(statistics.median(seconds))}, the median of {len(seconds)} "
        "timed here while the reference was replayed; <code>dit-run bench</code> measures with care."
    )
    if all(figure.name.startswith(("proof: ", "twin: ")) for figure in page.figures):
        line = "The engines do not run where this was built; their graphs were verified through their rounding twins."
    more = f'\n<p class="quiet">{escape(text)}</p>' if (text := text_in_fp32(contract)) else ""
    return f'<h2>Size and speed</h2>\n{size_table}\n<p class="quiet">{line}</p>{more}' + _wide(contract)


def _wide(contract: Manifest) -> str:
    """Show what a half-precision graph keeps in fp32, and the largest value seen there."""
    overflows = contract.built_with.get("wide", {})
    rows = [[stage, name, f"{peak:.4g}"] for stage, peaks in overflows.items() for name, peak in peaks.items()]
    if not rows:
        return ""
    head = ["stage", "kept in fp32, for fp16 ends at 65504", "largest seen"]
    return "\n" + _table(head, rows, numbers={2})


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _gates(figures: Sequence[Figure]) -> str:
    body = []
    for row in worst(figures):
        mark, mood, limit = ("ok", "good", "") if row.passed else ("FAILED", "bad", "")
        if row.limit is None:
            mark, mood = "–", ""
        else:
            limit = f"{'≥' if row.at_least else '≤'} {number(row, row.limit)}"
        cells = f'<td class="{mood}">{mark}</td><td>{escape(row.name)}</td><td class="n">{number(row, row.value)}</td>'
        body.append(f'<tr>{cells}<td class="n">{limit}</td><td>{escape(row.where)}</td></tr>')
    head = '<tr><th></th><th>gate, at its worst</th><th class="n">value</th><th class="n">limit</th><th>where</th></tr>'
    return f'<h2>Gates</h2>\n<div class="scroll"><table class="gates">{head}{"".join(body)}</table></div>'


def _origin(contract: Manifest) -> str:
    source = contract.source
    rows = [[key, str(source[key])] for key in ("kind", "path", "hub", "revision", "seed") if key in source]
    sums = source.get("sha256") or {}
    rows += [[f"sha256 of {name}", value] for name, value in sums.items()]
    rows += [["solver", contract.process.sampler.solver]]
    rows += [[name, version] for name, version in contract.built_with.get("versions", {}).items()]
    return "<h2>Made from, and with</h2>\n" + _table(["", ""], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: frozenset[int] | set[int] = frozenset()) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        marked = ((' class="n"' if index in numbers else "", cell) for index, cell in enumerate(cells))
        return "<tr>" + "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in marked) + "</tr>"

    top = line(head, "th") if any(head) else ""
    return f'<div class="scroll"><table>{top}{"".join(line(row, "td") for row in rows)}</table></div>'

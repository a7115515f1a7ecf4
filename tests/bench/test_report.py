"""The table and the chart of a made-up result."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from dit_export.bench.chart import WIDTH, svg
from dit_export.bench.report import table
from dit_export.bench.run import spread
from tests.bench.conftest import row

Result = dict[str, Any]
SVG = "{http://www.w3.org/2000/svg}"


def of_class(root: ET.Element, tag: str, kind: str) -> list[ET.Element]:
    return [element for element in root.iter(SVG + tag) if kind in element.get("class", "").split()]


def timed(*seconds: float, faster: float) -> dict[str, Any]:
    return spread(seconds) | {"times_faster": spread([faster])}


def test_table(result: Result) -> None:
    text = table(result)
    lines = text.splitlines()
    assert lines[0] == "DiT S/2 at 256 px, one guided step, batch 1, 2 threads"
    assert "Processor <& Sons>, 2 cores (AVX512-BF16)" in lines[1]
    (ours,) = [line for line in lines if line.startswith("dit-export on OpenVINO bf16  ")]
    fields = re.split(r"\s{2,}", ours)
    assert fields[1:5] == ["40.0 ms", "39.2 ms–44.0 ms", "2.50", "75%"]
    assert fields[-4:] == ["2.50 s", "1.23 GB", "330 MB", "2e-06"]
    assert "dit-export on OpenVINO bf16: 1.25× the plain export" in text
    slower = {**result["rows"][1]["step"], "times_faster": {"median": 1.5}}  # in a group of its own, where all are
    result["rows"][1] |= {"group": 2, "step": slower}
    assert "dit-export on OpenVINO bf16: 1.67× the plain export" in table(result)
    assert "dit-export on ONNX Runtime fp32: " not in text  # no plain export of that precision ran
    assert "floor fp32: 60.0 ms = 12.00 GFLOP at 200 GFLOP/s" in text
    assert "left out: gemm-openvino: ModuleNotFoundError" in text
    assert "groups" not in text and "WRONG" not in text and "~" not in text


def test_table_of_a_gpu(result: Result) -> None:
    result["machine"]["gpu"] = {"name": "GPU of a test", "compute_capability": "8.9", "memory_bytes": 24e9}
    result["floors"]["bf16"] |= {"bytes": 9e8, "bytes_per_second": 1e12}
    text = table(result)
    assert "GPU of a test (8.9), 24 GB; Processor" in text
    assert ", or 900 ms to read" not in text and ", or 0.900 ms to read its 900 MB of weights at 1000 GB/s" in text


def test_table_tells_what_a_reader_must_know(result: Result) -> None:
    result |= {"groups": 3, "problems": ["a floor is above a measurement"]}
    for one in result["rows"]:
        one["image_derived"] = True
    text = table(result)
    assert "3 groups, PyTorch eager fp32 in each, so compare the ratios" in text
    assert "WRONG: a floor is above a measurement" in text
    assert "derived from the two (~)" in text and "~2.50 s" in text


def test_pictures_with_presets_beside_diffusers(result: Result) -> None:
    assert "preset" not in table(result)
    default = {"solver": "dpm++", "steps": 25, "agreement": 0.992, "frechet": 0.15}
    measured = {"agreement": 0.98, "frechet": 0.2, "pictures": 10, "engine": "fp32", "default": default}
    result["presets"] = {"fast": {"steps": 9, "measured": measured}}
    # In the first round the machine was half as fast for both.
    result["rows"].append(row("diffusers", "pytorch", "fp32", 90, image=timed(8.0, 4.0, 4.2, faster=0.9)))
    ours = result["rows"][2]
    ours["presets"] = {
        "fast": timed(1.0, 0.5, 0.4, faster=7.0) | {"decode": timed(0.1, 0.1, 0.1, faster=1), "rows": 14}
    }

    def line(title: str, plan: str) -> list[str]:
        (one,) = [line for line in table(result).splitlines() if re.match(rf"{title} +{plan} ", line)]
        return re.split(r"\s{2,}", one)[2:]

    assert line("diffusers DiTPipeline fp32", "25 steps of dpm\\+\\+") == [
        "50",
        "4.20 s",
        "1.00",
        "36%",
        "99.20%",
        "0.150",
    ]
    assert line("dit-export on OpenVINO bf16", "preset fast") == ["14", "500 ms", "8.00", "20%", "98.00%", "0.200"]
    ours["group"] = 2  # no round in common: by both ratios to the yardstick
    assert line("dit-export on OpenVINO bf16", "preset fast")[2] == f"{7.0 / 0.9:.2f}"
    assert "not on this one" in table(result)
    for one in result["rows"]:
        one["image_derived"] = True
    assert "preset fast" not in table(result)


def test_chart_is_well_formed_with_a_bar_a_row(result: Result) -> None:
    root = ET.fromstring(svg(result))
    assert root.get("width") == str(WIDTH) == "720"
    bars = of_class(root, "rect", "bar")
    widths = [float(bar.get("width", "0")) for bar in bars]
    assert len(bars) == len(result["rows"])
    assert widths == sorted(widths, reverse=True)  # the slowest first
    assert widths[0] / widths[-1] == pytest.approx(100 / 40, rel=0.01)
    assert len(of_class(root, "rect", "ours")) == 2
    text = " ".join("".join(element.itertext()) for element in root.iter(SVG + "text"))
    assert "40.0 ms · 2.50×" in text and "DiT S/2 at 256 px" in text
    assert "Processor <& Sons>" in text  # escaped in the file
    assert "Processor <& Sons>" not in svg(result)


def test_chart_marks_the_floor_of_each_bars_precision(result: Result) -> None:
    root = ET.fromstring(svg(result))
    bars, lines = of_class(root, "rect", "bar"), of_class(root, "line", "floor")
    left, scale = float(bars[0].get("x", "")), float(bars[0].get("width", "")) / 0.1
    marks = [line for line in lines if line.get("x1") == line.get("x2")]
    expected = [0.06, 0.06, 0.03, 0.03]  # fp32, fp32, bf16, bf16: seconds
    assert [(float(mark.get("x1", "")) - left) / scale for mark in marks] == pytest.approx(expected, abs=1e-3)


def test_chart_stands_alone_in_both_themes_and_inside_its_frame(result: Result) -> None:
    result["rows"][0]["step"]["most"] = 60.0  # one hiccup of a minute
    text = svg(result)
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"href|url\(|@import|@font-face|<script|https?://(?!www\.w3\.org/2000/svg)", text)
    root = ET.fromstring(text)
    for element in root.iter():
        for attribute in ("x", "x1", "x2"):
            assert 0 <= float(element.get(attribute, "0")) <= WIDTH
    for bar in of_class(root, "rect", "bar"):
        assert float(bar.get("x", "")) + float(bar.get("width", "")) <= WIDTH

"""Tables on docs/benchmarks.md and a chart over time, from committed results of `dit-export bench` (`make benchmarks`).

A result stands in docs/benchmarks/DATE-NAME.json; on the page a comment names it, and its table follows. A result with
a `note` was measured in another way than the rest: it has a table and no place in the chart. `from_table` marks a
result whose file was made from its printed table: its figures have the digits that were printed.
"""

from __future__ import annotations

import json
import re
import sys
from datetime import date
from html import escape
from pathlib import Path
from typing import Any

from dit_export.bench import chart, report
from dit_runtime.errors import UsageError
from dit_runtime.files import write_file

Result = dict[str, Any]
PLACE = re.compile(r"(<!-- ([\w.-]+\.json) -->\n```text\n)(.*?)(^```$)", re.MULTILINE | re.DOTALL)
LEFT, RIGHT, TOP, PANEL, GAP = 48, 210, 64, 190, 44
OURS = "dit-export on "
COLOURS = {"OpenVINO fp32": "#0969da", "OpenVINO bf16": "#8250df", "OpenVINO int8": "#1a7f37"}
COLOURS |= {"ONNX Runtime fp32": "#bf8700", "ONNX Runtime int8": "#cf222e"}


def read(folder: Path) -> dict[str, Result]:
    """Return the results of a folder by file name, the oldest first."""
    results = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return dict(sorted(results.items(), key=lambda item: item[1]["date"]))


def page(text: str, results: dict[str, Result]) -> str:
    """Return the page with the table of each result in its place; each result has one."""
    named = [name for _, name, *_ in PLACE.findall(text)]
    if sorted(named) != sorted(results):
        raise UsageError(f"the page shows {', '.join(sorted(named))}; the folder has {', '.join(sorted(results))}")
    return PLACE.sub(lambda place: f"{place[1]}{report.table(results[place[2]])}\n{place[4]}", text)


def svg(results: dict[str, Result]) -> str:
    """Return a panel a model: how many times as fast as PyTorch eager in the same rounds each of our forms was."""
    shown = [result for result in results.values() if "note" not in result]
    days = sorted({date.fromisoformat(result["date"]) for result in shown})
    span = max((days[-1] - days[0]).days, 1)
    models = sorted({result["model"]["name"] for result in shown})
    across = chart.WIDTH - LEFT - RIGHT
    parts = [
        chart.text(16, 26, "A guided step over time: times as fast as PyTorch eager fp32 in the same rounds", "title"),
        chart.text(16, 45, f"{days[0]} to {days[-1]}; machines and commands are in the tables", "small"),
    ]
    for index, model in enumerate(models):
        series = _series([result for result in shown if result["model"]["name"] == model])
        most = max(ratio for points in series.values() for _, ratio in points)
        foot = TOP + index * (PANEL + GAP) + PANEL
        parts += [chart.text(16, foot - PANEL + 8, model, "ours"), chart.line(LEFT, foot, LEFT + across, foot, "axis")]
        parts += [
            chart.text(LEFT + across * (day - days[0]).days / span, foot + 14, f"{day:%d %b}", "small") for day in days
        ]
        ends = []
        for name, points in series.items():
            places = [
                (LEFT + across * (day - days[0]).days / span, foot - (PANEL - 24) * ratio / most)
                for day, ratio in points
            ]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="1.5"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLOURS[name]}"/>' for x, y in places]
            ends.append((places[-1][1], f"{name} {points[-1][1]:.2f}×", COLOURS[name]))
        low = foot + 4.0
        for y, label, colour in sorted(ends, reverse=True):  # from below, 14 apart
            low = min(y + 4, low)
            parts.append(f'<rect x="{LEFT + across + 12}" y="{low - 8:.1f}" width="8" height="8" fill="{colour}"/>')
            parts.append(chart.text(LEFT + across + 26, low, label, "small"))
            low -= 14
    height = TOP + len(models) * (PANEL + GAP)
    body = "\n  ".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{chart.WIDTH}" height="{height}" '
        f'viewBox="0 0 {chart.WIDTH} {height}" role="img" aria-label="{escape("Speedups over time")}">\n'
        f"  <style>{chart.STYLE}  </style>\n  {body}\n</svg>\n"
    )


def _series(results: list[Result]) -> dict[str, list[tuple[date, float]]]:
    """Return our forms' speedups by date; of several results of a day the last one counts."""
    series: dict[str, dict[date, float]] = {name: {} for name in COLOURS}
    for result in results:
        for row in result["rows"]:
            if (name := row["title"].removeprefix(OURS)) in series:
                series[name][date.fromisoformat(result["date"])] = row["step"]["times_faster"]["median"]
    return {name: sorted(points.items()) for name, points in series.items() if points}


def write(docs: Path) -> None:
    results = read(docs / "benchmarks")
    text = docs / "benchmarks.md"
    write_file(text, page(text.read_text(encoding="utf-8"), results))
    write_file(docs / "benchmarks.svg", svg(results))


if __name__ == "__main__":
    write(Path(sys.argv[1]))

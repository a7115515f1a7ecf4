"""A run's steps as a bar chart: SVG that follows the reader's light or dark theme, with nothing from outside."""

from __future__ import annotations

from html import escape
from typing import Any

from dit_export.bench.competitors import YARDSTICK
from dit_export.bench.report import heading, time, where

WIDTH, LEFT, RIGHT = 720, 244, 116
TOP, ROW, BAR = 78, 26, 16
HICCUP = (
    1.1  # a whisker ends at this part of the longest bar: one hiccup does not shrink the picture, the table tells it
)
STYLE = """
  text { font: 12px ui-sans-serif, system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .title { font-size: 15px; font-weight: 600 }
  .small { font-size: 10.5px; fill: #59636e }
  .ours { font-weight: 600 }
  .peer.bar { fill: #afb8c1 }
  .ours.bar { fill: #0969da }
  .spread { stroke: #1f2328; stroke-width: 1 }
  .floor { stroke: #bc4c00; stroke-width: 1.5; stroke-dasharray: 3 2 }
  .axis { stroke: #d1d9e0 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .small { fill: #9198a1 }
    .peer.bar { fill: #59636e }
    .ours.bar { fill: #4493f8 }
    .spread { stroke: #f0f6fc }
    .floor { stroke: #f0883e }
    .axis { stroke: #3d444d }
  }
"""


def svg(result: dict[str, Any]) -> str:
    """A bar a row, the slowest first; a whisker for its spread, and a dashed mark where its precision's floor is."""
    rows = sorted(result["rows"], key=lambda row: row["step"]["times_faster"]["median"])
    base = next(row["step"]["median"] for row in rows if row["name"] == YARDSTICK.name)
    # Groups are compared by their ratios, so a bar is the yardstick's time over the ratio; in one group the same thing.
    times = [base / row["step"]["times_faster"]["median"] for row in rows]
    longest = HICCUP * max(times)
    scale = (WIDTH - LEFT - RIGHT) / longest
    parts = [
        text(16, 26, heading(result), "title"),
        text(16, 46, "shorter is better; ×: times as fast as PyTorch eager fp32", "small"),
        line(16, 61, 28, 61, "floor"),
        text(34, 65, "floor: the step's FLOPs at the fastest matrix product of any library in this run", "small"),
    ]
    for index, (row, seconds) in enumerate(zip(rows, times, strict=True)):
        kind = "ours" if row["kind"] == "ours" else "peer"
        middle = TOP + ROW * (index + 0.5)
        least, most = (seconds * row["step"][end] / row["step"]["median"] for end in ("least", "most"))
        most = min(most, longest)
        label = f"{time(seconds)} · {row['step']['times_faster']['median']:.2f}×"
        parts += [
            text(LEFT - 10, middle + 4, row["title"], kind, anchor="end"),
            f'<rect class="{kind} bar" x="{LEFT}" y="{middle - BAR / 2:g}" width="{scale * seconds:.1f}" '
            f'height="{BAR}" rx="2"/>',
            line(LEFT + scale * least, middle, LEFT + scale * most, middle, "spread"),
            text(LEFT + scale * most + 6, middle + 4, label, kind),
        ]
        if floor := result["floors"].get(row["precision"]):
            x = LEFT + scale * floor["step"]
            parts.append(line(x, middle - ROW / 2 + 1, x, middle + ROW / 2 - 1, "floor"))
    foot = TOP + ROW * len(rows) + 22
    parts.append(line(LEFT, TOP - 2, LEFT, foot - 20, "axis"))
    parts += [text(16, foot + 15 * index, line, "small") for index, line in enumerate(where(result))]
    height = foot + 30
    title = escape(heading(result))
    body = "\n  ".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label="{title}">\n  <title>{title}</title>\n  <style>{STYLE}  </style>\n  {body}\n</svg>\n'
    )


def text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'

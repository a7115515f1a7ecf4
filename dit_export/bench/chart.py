"""A run's steps as a bar chart: SVG that follows the reader's light or dark theme, with nothing from outside."""

from __future__ import annotations

from html import escape
from typing import Any

from dit_export.bench.report import heading, time, where

WIDTH, LEFT, RIGHT = 720, 226, 104
TOP, ROW, BAR = 76, 26, 16
STYLE = """
  text { font: 12px ui-sans-serif, system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .title { font-size: 15px; font-weight: 600 }
  .small { font-size: 10.5px; fill: #59636e }
  .ours { font-weight: 600 }
  .peer.bar { fill: #afb8c1 }
  .ours.bar { fill: #0969da }
  .spread { stroke: #1f2328; stroke-width: 1 }
  .floor { stroke: #bc4c00; stroke-width: 1.5; stroke-dasharray: 4 3 }
  .floor.label { stroke: none; fill: #bc4c00; font-size: 10.5px }
  .axis { stroke: #d1d9e0 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .small { fill: #9198a1 }
    .peer.bar { fill: #59636e }
    .ours.bar { fill: #4493f8 }
    .spread { stroke: #f0f6fc }
    .floor { stroke: #f0883e }
    .floor.label { fill: #f0883e }
    .axis { stroke: #3d444d }
  }
"""


def svg(result: dict[str, Any]) -> str:
    """A bar a row, the slowest first; a whisker for the spread, a dashed line for each precision's floor."""
    rows = sorted(result["rows"], key=lambda row: row["step"]["times_faster"]["median"])
    base = next(row["step"]["median"] for row in rows if row["name"] == "eager-fp32")
    # Groups are compared by their ratios, so a bar is the yardstick's time over the ratio; in one group the same thing.
    times = [base / row["step"]["times_faster"]["median"] for row in rows]
    scale = (WIDTH - LEFT - RIGHT) / max(times)
    bottom = TOP + ROW * len(rows)
    parts = [_text(16, 26, heading(result), "title"), _text(16, 45, "shorter is better; × PyTorch eager fp32", "small")]
    for index, (row, seconds) in enumerate(zip(rows, times, strict=True)):
        y, kind = TOP + ROW * index, "ours" if row["kind"] == "ours" else "peer"
        middle, width = y + ROW / 2, scale * seconds
        top = middle - BAR / 2
        parts.append(_text(LEFT - 10, middle + 4, row["title"], kind, anchor="end"))
        parts.append(f'<rect class="{kind} bar" x="{LEFT}" y="{top:g}" width="{width:.1f}" height="{BAR}" rx="2"/>')
        least, most = (seconds * row["step"][end] / row["step"]["median"] for end in ("least", "most"))
        most = min(most, 1.06 * max(times))  # a hiccup does not leave the picture; the table tells it
        parts.append(_line(LEFT + scale * least, middle, LEFT + scale * most, middle, "spread"))
        label = f"{time(seconds)} · {row['step']['times_faster']['median']:.2f}×"
        parts.append(_text(LEFT + scale * max(seconds, most) + 6, middle + 4, label, kind))
    parts.append(_line(LEFT, TOP - 4, LEFT, bottom + 2, "axis"))
    floors = sorted(result["floors"].items(), key=lambda item: item[1]["step"])
    for index, (precision, floor) in enumerate(floors):
        x = LEFT + scale * floor["step"]
        parts.append(_line(x, TOP - 6, x, bottom + 2, "floor"))
        parts.append(_text(x + 3, bottom + 14 + 13 * index, f"floor {precision}", "floor label"))
    foot = bottom + 14 + 13 * len(floors) + 12
    parts.append(_text(16, foot, where(result), "small"))
    parts.append(
        _text(16, foot + 15, "floor: the step's FLOPs at the fastest matrix product of any library here", "small")
    )
    height = foot + 28
    title = escape(heading(result))
    body = "\n  ".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label="{title}">\n  <title>{title}</title>\n  <style>{STYLE}  </style>\n  {body}\n</svg>\n'
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'

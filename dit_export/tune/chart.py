"""Plans as points, rows against quality: SVG that follows the reader's light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from dit_export.bench.chart import STYLE, line, text
from dit_export.tune.gate import Score, front

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 64, 52
TICKS = 5
POINTS = """
  .plan { fill: #afb8c1 }
  .best { fill: #0969da }
  .path { fill: none; stroke: #0969da; stroke-width: 1.5 }
"""


def svg(title: str, notes: str, scores: Mapping[str, Score], names: Mapping[str, list[str]]) -> str:
    """Draw every plan, the front as a line, and the presets' names (by plan)."""
    judged = all(score.frechet is not None for score in scores.values())
    axis = "Fréchet distance" if judged else "PSNR to the long run, dB"
    values = {key: score.quality if judged else score.psnr for key, score in scores.items()}
    finite = [value for value in values.values() if math.isfinite(value)]
    low, high = (0.0, 1.05 * max(finite)) if judged else (min(finite) - 1, max(finite) + 1)
    most = 1.05 * max(score.rows for score in scores.values())

    def place(key: str) -> tuple[float, float]:
        share = (min(max(values[key], low), high) - low) / (high - low or 1)
        x = LEFT + scores[key].rows / most * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    floor = HEIGHT - BOTTOM
    parts = [text(16, 26, title, "title"), text(16, 46, notes, "small")]
    for tick in range(TICKS + 1):
        y = floor - tick / TICKS * (floor - TOP)
        x = LEFT + tick / TICKS * (WIDTH - LEFT - RIGHT)
        parts += [
            line(LEFT, y, WIDTH - RIGHT, y, "axis"),
            text(LEFT - 8, y + 4, f"{low + tick / TICKS * (high - low):.3g}", "small", anchor="end"),
            text(x, floor + 16, f"{tick / TICKS * most:.0f}", "small", anchor="middle"),
        ]
    parts += [text(LEFT, TOP - 6, axis, "small"), text(WIDTH - RIGHT, floor + 34, "rows a picture", "small", "end")]
    best = front(scores)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, best))
    parts.append(f'<polyline class="path" points="{points}"/>')
    for key in scores:
        x, y = place(key)
        kind = "best" if key in best else "plan"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{5 if key in names else 3}"/>')
        if key in names:
            parts.append(text(x, y - 9, ", ".join(names[key]), "ours", anchor="middle"))
    body = "\n  ".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escape(title)}">\n  <title>{escape(title)}</title>\n'
        f"  <style>{STYLE}{POINTS}  </style>\n  {body}\n</svg>\n"
    )

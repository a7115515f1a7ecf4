"""Errors a step as an inline SVG on a logarithmic scale; its colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 40
LEAST = 1e-8  # an error of zero is drawn here

Points = Mapping[int, float]  # by step, from 1


def svg(curves: Mapping[str, Points], steps: int) -> str:
    """A legend, and a line a curve; an error that is not finite has no point, and the list below says so."""
    known = {name: {s: max(v, LEAST) for s, v in points.items() if math.isfinite(v)} for name, points in curves.items()}
    values = [value for points in known.values() for value in points.values()]
    if not values:
        return "<p>No step gave finite figures.</p>"
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def x(step: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - 1) / (steps - 1) if steps > 1 else 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(value)) / (high - low)

    parts = []
    for power in range(low, high + 1, max(1, (high - low) // 5)):
        at = y(10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>')
    for step in range(1, steps + 1, max(1, steps // 10)):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    legend = []
    for number, (name, points) in enumerate(known.items(), 1):
        legend.append(f'<li class="s{number}"><i></i>{escape(name)}</li>')
        line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points.items())
        dots = "".join(
            f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3.5"><title>{escape(name)}, step {step}: '
            f"{value:.3g}</title></circle>"
            for step, value in points.items()
        )
        parts.append(f'<g class="s{number}"><polyline points="{line}"/>{dots}</g>')
    return (
        f'<ul class="legend">{"".join(legend)}</ul>\n<svg class="curves" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="relative L2 error by step">{"".join(parts)}</svg>'
    )

"""A run's result as a table for people; JSON is the result itself."""

from __future__ import annotations

from collections.abc import Sequence
from operator import truediv
from statistics import median
from typing import Any

from dit_export.bench.subject import SOLVER
from dit_runtime.bundle.records import MEASURED

Row = dict[str, Any]
BESIDE = "diffusers-fp32"  # whose picture ours are compared with
PICTURES = ("a picture", "plan", "rows", "time", "×", "decoder", "agreement", "Fréchet")
COLUMNS = ("", "step", "least–most", "×", "of floor", "decode", "×", "image", "×", "open", "peak", "files", "off by")


def heading(result: dict[str, Any]) -> str:
    model, settings = result["model"], result["settings"]
    plural = "" if settings["threads"] == 1 else "s"
    return (
        f"DiT {model['name']} at {model['resolution']} px, one guided step, batch {settings['batch']}, "
        f"{settings['threads']} thread{plural}"
    )


def where(result: dict[str, Any]) -> tuple[str, str]:
    """The machine; its system, the date and the command."""
    machine = result["machine"]
    flags = ", ".join(name.upper().replace("_", "-") for name in machine["instructions"])
    gpu = machine.get("gpu")
    on = f"{gpu['name']} ({gpu['compute_capability']}), {gpu['memory_bytes'] / 1e9:.0f} GB; " if gpu else ""
    return (
        f"{on}{machine['cpu']}, {machine['cores']} cores{f' ({flags})' if flags else ''}, "
        f"{machine['memory_bytes'] / 1e9:.0f} GB",
        f"{machine['system']}, {result['date']}: {result['command']}",
    )


def table(result: dict[str, Any]) -> str:
    cells = [COLUMNS, *(_cells(row, result["floors"]) for row in result["rows"])]
    widths = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]
    lines = [heading(result), *where(result), ""]
    lines += [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in cells
    ]
    lines += ["", *notes(result), *pictures(result)]
    lines += [f"left out: {name}: {reason}" for name, reason in result["left_out"].items()]
    lines += [f"WRONG: {problem}" for problem in result["problems"]]
    return "\n".join(lines)


def notes(result: dict[str, Any]) -> list[str]:
    """Return the lines that explain the figures."""
    settings, rows = result["settings"], result["rows"]
    lines = [
        f"step: of some in a row, median of {settings['rounds']} interleaved rounds, ours with its share of the "
        "conditioner; ×: times as fast as PyTorch eager fp32 in the same round, median"
    ]
    steps = f"{settings['steps']} steps + decode"
    if any(row["image_derived"] for row in rows):
        lines.append(f"image: {steps}, derived from the two (~)")
    else:
        lines.append(f"image: {steps}, measured as a whole, rounds: {settings['images']}")
    lines.append(
        "open: from the start of the process to its first step's answer, compilers' caches empty; peak: of resident "
        "memory; off by: relative distance of the prediction from PyTorch eager fp32's"
    )
    for precision, floor in result["floors"].items():
        lines.append(
            f"floor {precision}: {time(floor['step'])} = {floor['flops'] / 1e9:.2f} GFLOP at "
            f"{floor['flops_per_second'] / 1e9:.0f} GFLOP/s, the fastest matrix product of the run ({floor['library']})"
            + _reading(floor)
        )
    for row in rows:
        if row["kind"] == "ours" and (plain := row.get("times_plain") or against_plain(row, rows)):
            lines.append(f"{row['title']}: {plain:.2f}× the plain export on the same backend")
    if result["groups"] > 1:
        lines.append(
            f"memory holds not all at once: {result['groups']} groups, PyTorch eager fp32 in each, so compare the "
            "ratios (×) between groups and not the times"
        )
    return lines


def _reading(floor: dict[str, Any]) -> str:
    """Return the text about reading the weights alone, empty where no bytes were counted. The floor is the larger of
    the two times."""
    if "bytes" not in floor:
        return ""
    size, rate = floor["bytes"], floor["bytes_per_second"]
    return f", or {time(size / rate)} to read its {size / 1e6:.0f} MB of weights at {rate / 1e9:.0f} GB/s, if longer"


def against_plain(row: Row, rows: Sequence[Row]) -> float | None:
    """Return the median speedup over the export without our passes, on the same backend in the same precision. Compare
    within a round where both ran together. Otherwise divide their median speedups over PyTorch eager, each from its own
    rounds."""
    for other in rows:
        if other["kind"] == "plain" and all(other[key] == row[key] for key in ("library", "precision")):
            ours, plain = row["step"], other["step"]
            return _times_faster(ours, plain, row["group"] == other["group"])
    return None


def _times_faster(fast: Row, slow: Row, together: bool) -> float:
    if together:
        return median(map(truediv, slow["samples"], fast["samples"]))
    return float(fast["times_faster"]["median"] / slow["times_faster"]["median"])


def pictures(result: dict[str, Any]) -> list[str]:
    """Return the table of whole pictures by us, with each preset, beside diffusers' usual one; [] where none ran."""
    presets = result.get("presets") or {}
    rows = [row for row in result["rows"] if not row["image_derived"]]
    ours = [row for row in rows if row["kind"] == "ours"]
    if not presets or not ours:
        return []
    base = next((row for row in rows if row["name"] == BESIDE), rows[0])
    measured = {name: preset.get(MEASURED, {}) for name, preset in presets.items()}
    first = next(iter(measured.values()))
    steps, usual = result["settings"]["steps"], first.get("default", {})
    if (usual.get("steps"), usual.get("solver")) != (steps, SOLVER):
        usual = {}
    cells: list[tuple[str, ...]] = [PICTURES]
    for row in [base, *ours]:
        plan = f"{steps} steps of {SOLVER}"
        cells.append((row["title"], plan, str(2 * steps), *_picture(row["image"], row["decode"], row, base, usual)))
        for name, timed in row.get("presets", {}).items():
            plan, rates = f"preset {name}", measured.get(name, {})
            cells.append((row["title"], plan, str(timed["rows"]), *_picture(timed, timed["decode"], row, base, rates)))
    widths = [max(len(row[column]) for row in cells) for column in range(len(PICTURES))]
    lines = ["", "", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells), ""]
    lines.append(f"rows: evaluations × groups of conditions; ×: times as fast as {base['title']} in the same round")
    if first:
        pictures = f"{first.get('pictures')} pictures, {first.get('engine')}, {first.get('date')}"
        lines.append(
            f"agreement, Fréchet: of the plan on the network that it was tuned on ({pictures}), not on this one"
        )
    return lines


def _picture(timed: Row, decode: Row, row: Row, base: Row, rates: Row) -> tuple[str, ...]:
    return (
        time(timed["median"]),
        f"{_times_faster(timed, base['image'], row['group'] == base['group']):.2f}",
        f"{decode['median'] / timed['median']:.0%}",
        f"{rates['agreement']:.2%}" if "agreement" in rates else "–",
        f"{rates['frechet']:.3f}" if "frechet" in rates else "–",
    )


def _cells(row: Row, floors: dict[str, Any]) -> tuple[str, ...]:
    step = row["step"]
    floor = floors.get(row["precision"])
    about = "~" if row["image_derived"] else ""
    timed = [
        cell
        for name, mark in (("decode", ""), ("image", about))
        for cell in (mark + time(row[name]["median"]), f"{row[name]['times_faster']['median']:.2f}")
    ]
    return (
        row["title"],
        time(step["median"]),
        f"{time(step['least'])}–{time(step['most'])}",
        f"{step['times_faster']['median']:.2f}",
        f"{floor['step'] / step['median']:.0%}" if floor else "",
        *timed,
        time(row["load_seconds"]),
        f"{row['peak_bytes'] / 1e9:.2f} GB",
        f"{row['file_bytes'] / 1e6:.0f} MB",
        f"{row['error']:.0e}" if row["error"] else "0",
    )


def time(seconds: float) -> str:
    """Three digits."""
    value, unit = (seconds, "s") if seconds >= 1 else (1e3 * seconds, "ms")
    return f"{value:#.3g}".rstrip(".") + f" {unit}"

"""The table of real sizes: right for small networks, and as docs/families.md has it for the real ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from dit_export.networks import Network
from dit_export.networks.families import family_network
from tests.networks import tiny
from tests.survey.networks import NETWORKS
from tests.survey.table import END, PAGE, Row, survey, write_line
from tests.weightless import without_weights

# Vectors a step, in blocks: 6 a stream of a block, 9 with dual attention; 2 in the last text stream, and 2 at the end.
# Qwen-Image computes the last text stream to its end, and nothing reads it. Lumina and Z-Image have no shifts.
VECTORS = {
    "DiT-XL/2, 256 px": 6 * 28 + 2,
    "PixArt-Sigma, 1024 px": 6 * 28 + 2,
    "SD3-medium, 1024 px": 12 * 24 - 2,
    "SD3.5-medium, 1024 px": 12 * 24 - 2 + 3 * 13,
    "SD3.5-large, 1024 px": 12 * 38 - 2,
    "Flux.1-dev, 1024 px": 12 * 19 + 3 * 38 + 2,
    "Flux.2-klein-4B, 1024 px": 2 * 6 + 3 + 2,
    "Qwen-Image, 1024 px": 12 * 60 - 2,
    "Z-Image, 1024 px": 4 * (30 + 2) + 1,
    "Lumina2, 1024 px": 4 * (26 + 2) + 1,
    "Sana-1.6B, 1024 px": 6 * 20 + 2,
    "Chroma, 1024 px": 12 * 19 + 3 * 38 + 2,
    "AuraFlow, 1024 px": 12 * 4 + 6 * 32 + 2,
    "Hunyuan-DiT 1.2, 1024 px": 40 + 2,
    "LTX-2B, 768x512 px": 6 * 28 + 2,
}
LINES = {line.split(" | ")[0].removeprefix("| "): line for line in PAGE.read_text().splitlines() if " x " in line}
SECONDS, GIGABYTES = 600, 8


def small(make: Callable[[], object]) -> Network:
    return without_weights(family_network(make(), tokens=tiny.TOKENS))


def test_a_small_network() -> None:
    network = small(lambda: tiny.sd3(**tiny.SD3_5))
    row = survey(network)
    assert row.parameters == sum(parameter.numel() for parameter in tiny.sd3(**tiny.SD3_5).parameters())
    assert (row.vectors, row.width) == (12 * 2 - 2 + 3, 64)
    assert row.step == 4 * row.vectors * row.width
    # All weights are in one graph each; the position table is cut to the size, and a pooled prompt may have a stage.
    weights = sum(parameter.nbytes for name, parameter in network.module.named_parameters())
    assert row.early + row.timed + row.loop == pytest.approx(weights, rel=0.02)
    modulation = sum(
        parameter.nbytes
        for name, parameter in network.module.named_parameters()
        if "norm1.linear" in name or "norm1_context.linear" in name or "norm_out.linear" in name
    )
    assert modulation <= row.early + row.timed < 2 * modulation


def test_lines_of_the_page() -> None:
    row = Row(2_030_000_000, 200_000_000, 3_000_000_000, 4_800_000_000, 10, 64, 2560, 1_000_000, 59.7, 1.24)
    line = row.line("b")
    assert line == "| b | 2.03 | 40.0% | 2.5% | 10 x 64 | 0.0 | 1.0 | 60 | 1.2 |"
    page = f"before\n| a | 1 |\n| b | 0 |\n{END}\nafter\n"
    assert write_line(page, "b", line) == page.replace("| b | 0 |", line)
    assert write_line(page, "c", "| c |") == page.replace(END, f"| c |\n{END}")


def test_the_page() -> None:
    """Each line is of a network that can be made again, with the vectors that its blocks need."""
    assert LINES.keys() <= NETWORKS.keys() and "SD3.5-large, 1024 px" in LINES
    for name, line in LINES.items():
        assert line.split(" | ")[4].startswith(f"{VECTORS[name]} x "), name


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_a_real_network(name: str) -> None:
    command = [sys.executable, "-m", "tests.survey.table", "--row", name]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row = Row(**json.loads(answer.splitlines()[-1]))
    assert row.vectors == VECTORS[name]
    assert row.seconds < SECONDS and row.peak < GIGABYTES
    assert row.line(name).split("|")[:8] == LINES[name].split("|")[:8]  # all but time and memory

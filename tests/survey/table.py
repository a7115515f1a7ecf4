"""The table of docs/families.md: what leaves the sampling loop of each network at its real size.

Each network is traced, fused and cut as a build does it, in a process of its own. `python -m tests.survey.table` makes
all rows, `… NAME …` some; the other lines of the page stay as they are.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_export.graph import onnxfile
from dit_export.networks import Network
from dit_export.passes import Stage, fuse
from dit_export.passes.cut import VECTORS
from tests.survey.networks import NETWORKS
from tests.weightless import plain_graph

PAGE = Path(__file__).parents[2] / "docs/families.md"
END = "<!-- end of the table -->"


@dataclass(frozen=True)
class Row:
    """The effect of the cut on one network; bytes are those of fp32."""

    parameters: int
    early: int  # bytes of weights that work once a prompt
    timed: int  # bytes of weights that work once a timestep, or once a timestep and prompt
    loop: int  # bytes of weights that work every step
    vectors: int  # that a step takes
    width: int  # of a vector
    step: int  # bytes that cross for each timestep, of one picture
    prompt: int  # bytes that cross for each prompt
    seconds: float = 0.0  # of a CPU
    peak: float = 0.0  # GB of memory

    def line(self, name: str) -> str:
        """Return the row in Markdown."""
        total = self.early + self.timed + self.loop
        cells = (
            name,
            f"{self.parameters / 1e9:.2f}",
            f"{(self.early + self.timed) / total:.1%}",
            f"{self.early / total:.1%}",
            f"{self.vectors} x {self.width}",
            f"{self.step / 1e6:.1f}",
            f"{self.prompt / 1e6:.1f}",
            f"{self.seconds:.0f}",
            f"{self.peak:.1f}",
        )
        return f"| {' | '.join(cells)} |"


def survey(network: Network) -> Row:
    """Trace a network without weights and cut it."""
    with tempfile.TemporaryDirectory() as folder:
        fused = fuse(plain_graph(network, Path(folder)), network.ports)
    timed = [stage for stage in fused.stages if stage.runs != "condition"]
    early = [stage for stage in fused.stages if stage.runs == "condition"]
    read = {tensor.name for tensor in fused.denoiser.inputs}
    vectors = [pack for pack in _gives(timed) if pack.name in read and len(pack.shape) == VECTORS]
    return Row(
        parameters=sum(weight.numel() for weight in network.module.parameters()),
        early=_weights(early),
        timed=_weights(timed),
        loop=onnxfile.weight_bytes(fused.denoiser),
        vectors=sum(pack.shape[1] for pack in vectors),
        width=max((pack.shape[2] for pack in vectors), default=0),
        step=_bytes(pack for pack in _gives(timed) if pack.name in read),
        prompt=_bytes(pack for pack in _gives(early) if pack.name in read),
    )


def _gives(stages: list[Stage]) -> list[Any]:
    return [tensor for stage in stages for tensor in stage.graph.outputs]


def _weights(stages: list[Stage]) -> int:
    return sum(onnxfile.weight_bytes(stage.graph) for stage in stages)


def _bytes(tensors: Any) -> int:
    return sum(math.prod(tensor.shape[1:]) * np.dtype(tensor.dtype).itemsize for tensor in tensors)


def write_line(page: str, name: str, line: str) -> str:
    """Replace the network's line in the page's table, or add it at the end."""
    lines = page.splitlines()
    place = [n for n, old in enumerate(lines) if old.startswith(f"| {name} |")]
    if place:
        lines[place[0]] = line
    else:
        lines.insert(lines.index(END), line)
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    if names[:1] == ["--row"]:
        row = asdict(survey(NETWORKS[names[1]]()))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
        print(json.dumps(row | {"seconds": time.process_time(), "peak": peak}))
        return
    for name in names or NETWORKS:
        command = [sys.executable, "-m", "tests.survey.table", "--row", name]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        line = Row(**json.loads(answer.splitlines()[-1])).line(name)
        PAGE.write_text(write_line(PAGE.read_text(encoding="utf-8"), name, line), encoding="utf-8")
        print(line)


if __name__ == "__main__":
    main(sys.argv[1:])

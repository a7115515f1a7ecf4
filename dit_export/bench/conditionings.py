"""Costs of the conditionings: GMAC beside the measured time of a guided step, of made-up weights in fp32.

`python -m dit_export.bench.conditionings S/8 B/4 XL/2 --threads 2` prints the table of docs/checkpoints.md. All
conditionings of a size are open together and take turns, so that other work of the machine slows all of them. A time
is the least of the rounds.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dit_export.bench.competitors import BASE, WEIGHTS
from dit_export.bench.floor import flops, step_bytes
from dit_export.bench.machine import available_memory
from dit_export.bench.report import time
from dit_export.bench.subject import GUIDANCE, in_a_row
from dit_export.bundle.scratch import build_scratch_bundle
from dit_export.checkpoints import Loaded
from dit_export.checkpoints.synthetic import synthetic_dit
from dit_export.networks.dit import dit_network
from dit_export.networks.spec import CONDITIONINGS, ModelSpec, model, with_conditioning
from dit_export.recipe import Recipe
from dit_runtime import backends
from dit_runtime.backends import Engine, Options
from dit_runtime.bundle.manifest import Manifest, Stage
from dit_runtime.console import guarded
from dit_runtime.engines import Engines
from dit_runtime.errors import UsageError
from dit_runtime.options import Parser
from dit_runtime.progress import Progress
from dit_runtime.sampling.process import Process


class Cost(NamedTuple):
    gmac: float  # of a row, and of that
    in_loop: float
    seconds: float  # of a guided step


def denoiser(spec: ModelSpec, folder: Path, backend: str, progress: Progress) -> Manifest:
    """A bundle of made-up weights, of which only the denoiser's files are kept."""
    network = dit_network(synthetic_dit(spec, 0))
    loaded = Loaded(network, None, (), Process(), {"kind": "synthetic", "seed": 0})
    contract = build_scratch_bundle(folder, loaded, None, Recipe(backend=backend, max_batch=1), progress)
    for file in folder.iterdir():
        if file.is_file() and not file.name.startswith("denoiser."):
            file.unlink()
    return contract


def inputs(stage: Stage) -> dict[str, np.ndarray]:
    """Noise of the shapes of one guided picture: the time of a step does not depend on what is in them."""
    random, free = np.random.default_rng(0), {"groups": 2, "batch": 1}
    arrays = {}
    for tensor in stage.reads:
        shape = [free[size] if isinstance(size, str) else size for size in tensor.shape]
        arrays[tensor.name] = random.standard_normal(shape, np.float32)
    return arrays | {"guidance": np.full(1, GUIDANCE, np.float32)}


def measure(
    specs: Mapping[str, ModelSpec], backend: str, rounds: int, threads: int | None, folder: Path, progress: Progress
) -> dict[str, Cost]:
    """Measure the cost of each spec, with all of them in memory at the same time."""
    if min(rounds, 1 if threads is None else threads) < 1:
        raise UsageError("rounds and threads are at least 1")
    weights = sum(step_bytes(spec, "fp32") for spec in specs.values())
    if (needed := BASE[backend] + WEIGHTS[backend] * weights) > available_memory():
        raise UsageError(
            f"{len(specs)} denoisers on {backend} take {needed / 1e9:.0f} GB, {available_memory() / 1e9:.0f} GB are "
            "free; pass fewer --conditionings, or --backend onnxruntime"
        )
    contracts = {name: denoiser(spec, folder / name, backend, progress) for name, spec in specs.items()}
    ready: dict[str, tuple[Engine, dict[str, np.ndarray]]] = {}
    for name, contract in contracts.items():
        engine = Engines(folder / name, contract, {}, Options(threads=threads)).open(contract.step)
        ready[name] = engine, inputs(contract.step)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    with progress.stage(f"{rounds} rounds of {', '.join(ready)}"):
        for number in range(rounds + 1):
            for name, (engine, arrays) in ready.items():
                if number:
                    seconds[name].append(in_a_row(partial(engine.run, arrays)))
                else:
                    engine.run(arrays)  # compiles, or touches the weights
            progress.step(number, rounds, "step")
    for engine, _ in ready.values():
        engine.close()
    costs = {}
    for name, spec in specs.items():
        row = flops(spec)
        costs[name] = Cost(sum(row) / 2e9, (row.blocks + row.ends) / 2e9, min(seconds[name]))
    return costs


def table(costs: Mapping[str, Mapping[str, Cost]]) -> str:
    """Markdown: a line a conditioning, and for each size GMAC a row, of which in the loop, and the step."""
    sizes = list(costs)
    lines = ["| | " + " | ".join(f"{size}: GMAC a row | in the loop | a guided step" for size in sizes) + " |"]
    lines.append("|---" * (1 + 3 * len(sizes)) + "|")
    for way in dict.fromkeys(way for size in sizes for way in costs[size]):
        cells = [
            f"{cost.gmac:.2f} | {cost.in_loop:.2f} | {time(cost.seconds)}"
            for size in sizes
            for cost in [costs[size][way]]
        ]
        lines.append(f"| `{way}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m dit_export.bench.conditionings", description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--conditionings", nargs="+", default=list(CONDITIONINGS), choices=list(CONDITIONINGS))
    parser.add_argument("--backend", default="onnxruntime", choices=backends.CPU)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: the engine's own choice")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="where the files stand meanwhile")
    options = parser.parse_args(arguments)
    specs = {
        name: {way: with_conditioning(model(name), way) for way in options.conditionings} for name in options.models
    }
    costs = {}
    for name, ways in specs.items():
        with tempfile.TemporaryDirectory(prefix="dit-bench-", dir=options.output) as folder:
            costs[name] = measure(ways, options.backend, options.rounds, options.threads, Path(folder), Progress())
    print(table(costs))
    return 0


if __name__ == "__main__":
    sys.exit(guarded("dit-export bench", main))

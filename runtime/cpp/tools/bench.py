"""Time per step of the C++ library beside Python's, in interleaved rounds: `bench.py BUNDLE` after `make cpp-unit`."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from itertools import pairwise
from pathlib import Path

from dit_runtime import Pipeline

PROGRAM = Path(__file__).parents[3] / "build/cpp/tests/bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: the engine's own choice")
    options = parser.parse_args()
    command = [PROGRAM, options.bundle, str(options.threads), str(options.steps)]
    steps: dict[str, list[float]] = {"python": [], "cpp": []}
    with (
        Pipeline.load(options.bundle, threads=options.threads or None) as pipe,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as cpp,
    ):
        assert cpp.stdin and cpp.stdout and cpp.stdout.readline() == "ready\n"
        for number in range(options.rounds + 1):  # the first warms up and is not counted
            times: list[float] = []
            pipe.sample(
                [0], steps=options.steps, output="latents", on_step=lambda *_, t=times: t.append(time.perf_counter())
            )
            cpp.stdin.write("\n")
            cpp.stdin.flush()
            answer = cpp.stdout.readline()
            if number:
                steps["python"] += [1e3 * (after - before) for before, after in pairwise(times)]
                steps["cpp"] += [float(word) for word in answer.split()]
        cpp.stdin.close()
    table = {
        name: {"median_ms": statistics.median(values), "least_ms": min(values), "most_ms": max(values)}
        for name, values in steps.items()
    }
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()

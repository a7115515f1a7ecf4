"""Kill builds of a tiny network at random times: `python -m tests.killed_builds BUNDLE TIMES`.

A time is one of the processor's, so that a busy machine changes nothing. Whatever is killed, the destination holds a
whole bundle, and the next build removes what is left beside it.
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from dit_export.bundle.build import build
from dit_export.checkpoints import Loaded
from dit_export.graph.trace import trace_network
from dit_export.recipe import Recipe
from dit_runtime.bundle import manifest
from dit_runtime.progress import Progress
from dit_runtime.sampling.process import Process, Sampler
from tests.verify import tiny

TICK = os.sysconf("SC_CLK_TCK")


def run(folder: Path, number: int) -> None:
    loaded = Loaded(tiny.network("labels"), None, (), Process(sampler=Sampler(solver="ddim")), {"build": number})
    built = build(Recipe(backend="onnxruntime", output=str(folder)), Progress(io.StringIO()), loaded=loaded)
    assert built.passed


def start(folder: Path, number: int) -> int:
    child = os.fork()
    if not child:
        try:
            run(folder, number)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child


def seconds(child: int) -> float:
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def whole(folder: Path) -> int:
    """Return the number of the build that made the bundle, all of whose files are as its manifest says."""
    contract = manifest.read(folder)
    manifest.check_files(folder, contract, contract.files)
    return contract.source["build"]


def finish(child: int) -> float:
    _, status, used = os.wait4(child, 0)
    assert status == 0, status
    return used.ru_utime + used.ru_stime


def main() -> None:
    folder, times = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    trace_network(tiny.network("labels"))  # what this imports, children have
    total, moments = finish(start(folder, 0)), random.Random(7)
    last, killed, written = 0, 0, 0
    for number in range(1, times + 1):
        child, moment = start(folder, number), 1.05 * total * moments.random()
        ended = 0
        while not ended and seconds(child) < moment:
            time.sleep(0.005)
            ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, status
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        now = whole(folder)
        assert now in (last, number) and (now == number or not ended), (last, number, now)
        left = [path.name for path in folder.parent.iterdir() if path != folder]
        assert len(left) <= 1, left  # those of this build alone
        last, killed, written = now, killed + (not ended), written + bool(left)
        print(
            f"{number}: killed {killed}, with files beside the bundle {written}, whole bundle of build {now}",
            flush=True,
        )
    finish(start(folder, times + 1))
    assert whole(folder) == times + 1
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert 0 < written <= killed


if __name__ == "__main__":
    main()

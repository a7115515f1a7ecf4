"""One competitor in a process of its own, so that load time and memory are nobody else's: both ends of its pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dit_export.bench.competitors import COMPETITORS, Job
from dit_export.bench.floor import Gemms, bandwidth
from dit_export.bench.subject import size

OPENERS = {  # kind -> module and class; the module is imported in the worker that asks for it, and in no other
    "eager": ("peers", "Eager"),
    "graph": ("peers", "Graphed"),
    "compile": ("peers", "Compiled"),
    "autotune": ("peers", "Compiled"),
    "aoti": ("peers", "AheadOfTime"),
    "diffusers": ("peers", "Diffusers"),
    "plain": ("engines", "Plain"),
    "ours": ("engines", "Ours"),
}
PRESET = "preset "  # begins the task of a picture with a preset, which ours alone have
GEMM = "gemm-"  # a worker named gemm-LIBRARY times matrix products alone
GRACE = 5.0  # seconds
PAUSE = 0.05  # seconds between two tasks, in which the threads of the last one stop to spin


class WorkerError(Exception):
    """A worker that told why it cannot go on, or died."""


class Worker:
    """A process that opens one competitor and answers a line a task."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self.name = name
        caches = folder / "caches"  # every compiler starts from nothing
        environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        environment |= {"XDG_CACHE_HOME": str(caches), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
        self._log = folder / f"{name}.log"
        began = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dit_export.bench.worker", str(folder), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | environment,
            )
        try:
            self.opened = self._answer()
        except BaseException:
            self.close()
            raise
        self.load = time.perf_counter() - began

    def ask(self, task: str) -> Any:
        time.sleep(PAUSE)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer says why
            self._process.stdin.write(task + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise WorkerError(f"the process ended with {self._process.wait()}: {' '.join(last) or 'no message'}")
        value = json.loads(line)
        if isinstance(value, dict) and "error" in value:
            raise WorkerError(value["error"])
        return value

    def close(self) -> None:
        """Asks it to end, so that it ends what it started itself (a compiler's helpers); then makes it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # one that has died leaves unread what it was asked
                    pipe.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def open_competitor(name: str, job: Job, folder: Path) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """Open a competitor; return its tasks and its first report. The report holds its first prediction and the size of
    its files."""
    competitor = next(competitor for competitor in COMPETITORS[job.device] if competitor.name == name)
    module, kind = OPENERS[competitor.kind]
    subject: Any = getattr(import_module(f"dit_export.bench.{module}"), kind)(
        competitor, job, folder / competitor.folder
    )
    tasks: dict[str, Callable[[], Any]] = {
        "step": subject.step,
        "decode": subject.decoding,
        "image": subject.image,
        "memory": peak_memory,
    }
    if competitor.kind == "ours":
        tasks |= {PRESET + preset: partial(subject.with_preset, preset) for preset in job.presets}
    return tasks, {"prediction": subject.prediction().tolist(), "file_bytes": size(folder / competitor.folder)}


def open_gemms(library: str, job: Job) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    gemms = Gemms(library, job.spec, job.batch, job.threads, job.precisions, job.device)
    return {"gemm": gemms.run}, {"warm": gemms.run(), "bandwidth": bandwidth(job.device)}


def peak_memory() -> int:
    """Bytes; Linux keeps the process's own peak, elsewhere a parent's may be in it."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(folder: Path, name: str) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        job = Job.read(folder)
        library = name.removeprefix(GEMM)
        tasks, opened = open_competitor(name, job, folder) if library == name else open_gemms(library, job)
        answer(opened)
        for line in sys.stdin:
            answer(tasks[line.strip()]())
    except Exception as error:  # of any library; it is told to the one who asked, and ends this competitor alone
        text = " ".join(str(error).split()) or "no message"
        answer({"error": f"{type(error).__name__}: {text}"[:300]})


if __name__ == "__main__":
    np.seterr(all="ignore")
    main(Path(sys.argv[1]), sys.argv[2])

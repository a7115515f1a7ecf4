"""One run: files are made, workers started as memory allows, and asked in turn; only one works at a time."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dit_export.bench import floor
from dit_export.bench.competitors import COMPETITORS, YARDSTICK, Competitor, Job, choose, groups
from dit_export.bench.machine import available_memory, describe, usable_cores, versions
from dit_export.bench.worker import GEMM, PRESET, Worker, WorkerError
from dit_export.networks.spec import ModelSpec, table_name
from dit_runtime.backends import cuda
from dit_runtime.errors import UsageError
from dit_runtime.facts import DEFAULT_STEPS
from dit_runtime.progress import Progress
from dit_runtime.sampling.process import Process

DECODES = 3  # rounds of the decoder alone, where no whole image is run
WHOLE_IMAGES = 1e12  # FLOPs of a run, up to which a CPU runs whole images unless asked otherwise; a GPU always does
AGREE = {"fp32": 1e-3}  # relative distance from the yardstick's prediction; rounding explains no more than that
AGREE_NARROW = 0.3
NEEDED = ("diffusers", "onnx_graphsurgeon", "safetensors")  # to make the files of all
SHARE = 0.9  # of the memory that is free


@dataclass(frozen=True)
class Settings:
    spec: ModelSpec
    device: str = "cpu"
    batch: int = 1
    steps: int = DEFAULT_STEPS
    rounds: int = 7
    images: int | None = None  # whole images a competitor; 0: an image is steps × step + decode
    threads: int | None = None
    only: Sequence[str] = ()
    memory: float | None = None  # bytes for all workers together
    folder: Path | None = None  # where the files stand meanwhile
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # with the figures that they were given for
    vae: dict[str, Any] = field(default_factory=dict)  # other than Stable Diffusion's, for tests


def bench(settings: Settings, progress: Progress) -> dict[str, Any]:
    """Everything that was measured and seen, as JSON holds it."""
    threads = usable_cores() if settings.threads is None else settings.threads
    if min(settings.batch, settings.steps, settings.rounds, threads) < 1 or (settings.images or 0) < 0:
        raise UsageError("batch, steps, rounds and threads are at least 1, images at least 0")
    _require_device(settings.device)
    chosen = choose(settings.only, settings.device)
    # The dialect of diffusers, so that all compute the same.
    spec = replace(settings.spec, frequency_shift=1, guided_channels=settings.spec.channels, unguided_up_to_one=True)
    precisions = tuple(sorted({competitor.precision for competitor in chosen}))
    sizes = settings.batch, settings.steps, threads
    job = Job(spec, Process(), *sizes, precisions, settings.vae, settings.device, settings.presets)
    with tempfile.TemporaryDirectory(prefix="dit-bench-", dir=settings.folder) as temporary:
        folder = Path(temporary)
        _require_disk(folder, spec, chosen)
        job.write(folder)
        left_out = _prepare(folder, chosen)
        able = [competitor for competitor in chosen if competitor.name not in left_out]
        return _Run(settings, job, folder, left_out, progress).all(able)


def _require_device(device: str) -> None:
    """Refuses, before any work, a device that is not here."""
    if device not in COMPETITORS:
        raise UsageError(f"device {device!r} is not known; known: {', '.join(COMPETITORS)}")
    if device == "cuda" and (reason := cuda.why_unavailable() or _without_cuda()):
        raise UsageError(f"no benchmark on a GPU here: {reason}")
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UsageError(f"no benchmark here: {', '.join(missing)} not installed; `make gpu-check` times without them")


def _without_cuda() -> str | None:
    import torch  # here, so that a benchmark of the CPU has no PyTorch beside it

    return None if torch.cuda.is_available() else f"PyTorch {torch.__version__} has no CUDA"


def _prepare(folder: Path, chosen: Sequence[Competitor]) -> dict[str, str]:
    command = [sys.executable, "-m", "dit_export.bench.prepare", str(folder), *(one.name for one in chosen)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UsageError(f"the files for the benchmark could not be made (exit code {done.returncode}), as said above")
    result: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return result


def _require_disk(folder: Path, spec: ModelSpec, chosen: Sequence[Competitor]) -> None:
    folders = {competitor.folder for competitor in chosen}
    needed = (len(folders) + 1) * (72 * spec.depth * spec.hidden**2 + (400 << 20))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(f"{folder.parent}: {free / 1e9:.0f} GB free, expected {needed / 1e9:.0f} GB; pass another -o")


class _Run:
    def __init__(
        self, settings: Settings, job: Job, folder: Path, left_out: dict[str, str], progress: Progress
    ) -> None:
        self.settings, self.job, self.folder = settings, job, folder
        self.left_out, self.progress = left_out, progress
        run_flops = settings.steps * floor.step_flops(job.spec, job.batch)
        quick = job.device == "cuda" or run_flops <= WHOLE_IMAGES
        self.images = int(quick) if settings.images is None else settings.images
        self.rows: dict[str, dict[str, Any]] = {}
        self.gemms: dict[str, dict[str, dict[str, list[float]]]] = {}
        self.bandwidth: float | None = None  # bytes a second, where it is measured

    def all(self, able: Sequence[Competitor]) -> dict[str, Any]:
        budget = SHARE * available_memory() if self.settings.memory is None else self.settings.memory
        grouped = groups(able, self.job.spec, self.job.batch, budget)
        with ExitStack() as stack:
            yardstick = self._start(YARDSTICK.name, stack)
            if yardstick is None:
                raise UsageError(f"{YARDSTICK.title}, the yardstick, does not run: {self.left_out[YARDSTICK.name]}")
            libraries = floor.GEMMS[self.job.device]
            gemms = [worker for library in libraries if (worker := self._start(GEMM + library, stack))]
            self.bandwidth = max((worker.opened["bandwidth"] or 0 for worker in gemms), default=0) or None
            expected = np.array(yardstick.opened["prediction"])
            for number, group in enumerate(grouped, 1):
                self._group(number, group, yardstick, gemms, expected)
        floors = self._floors()
        return {
            "format": 1,
            "model": {
                "name": table_name(self.job.spec),
                "resolution": self.job.spec.resolution,
                **asdict(self.job.spec),
            },
            "settings": {
                **{key: getattr(self.job, key) for key in ("device", "batch", "steps", "threads")},
                **{"rounds": self.settings.rounds, "images": self.images, "memory_budget": budget},
            },
            "presets": self.job.presets,
            "groups": len(grouped),
            "date": datetime.now(UTC).date().isoformat(),
            "machine": describe(self.job.device),
            "versions": versions(),
            "rows": list(self.rows.values()),
            "gemms": self.gemms,
            "floors": floors,
            "left_out": self.left_out,
            "problems": problems(list(self.rows.values()), floors),
        }

    def _start(self, name: str, stack: ExitStack) -> Worker | None:
        with self.progress.stage(f"open {name}"):
            try:
                worker = Worker(name, self.folder, self.job.threads)
            except WorkerError as error:
                self.left_out[name] = str(error)
                return None
        stack.callback(worker.close)
        return worker

    def _group(
        self, number: int, group: Sequence[Competitor], yardstick: Worker, gemms: list[Worker], expected: np.ndarray
    ) -> None:
        with ExitStack() as stack:
            started = [(one, self._start(one.name, stack)) for one in group]
            workers = {YARDSTICK: yardstick, **{one: worker for one, worker in started if worker}}
            phases = [("step", self.settings.rounds), ("image", self.images) if self.images else ("decode", DECODES)]
            samples: dict[Competitor, dict[str, list[float]]] = {one: {} for one in workers}
            self._round("decode", workers, {one: {} for one in workers})  # warms up; the first step did when it opened
            for task, rounds in phases:
                with self.progress.stage(f"{rounds} rounds of {task}, group {number}"):
                    for index in range(rounds):
                        self._round(task, workers, samples)
                        if task == "step":
                            self._time_gemms(gemms)
                        for preset in self.job.presets if task == "image" else ():
                            self._round(PRESET + preset, workers, samples)
                        self.progress.step(index + 1, rounds, task)
            self._round("memory", workers, samples)
            for one, worker in workers.items():
                self._record(number, one, worker, samples[one], samples[YARDSTICK], expected)

    def _round(
        self, task: str, workers: dict[Competitor, Worker], samples: dict[Competitor, dict[str, list[float]]]
    ) -> None:
        """Each once; one that fails is left out from here on."""
        for one, worker in list(workers.items()):
            if task.startswith(PRESET) and one.kind != "ours":
                continue
            try:
                answer = worker.ask(task)
            except WorkerError as error:
                if one is YARDSTICK:
                    raise UsageError(f"{one.title}, the yardstick, failed: {error}") from None
                self.left_out[one.name] = f"{task}: {error}"
                del workers[one]
                continue
            for name, seconds in (answer if isinstance(answer, dict) else {task: answer}).items():
                samples[one].setdefault(name, []).append(seconds)

    def _time_gemms(self, gemms: list[Worker]) -> None:
        for worker in list(gemms):
            library = self.gemms.setdefault(worker.name.removeprefix(GEMM), {})
            try:
                answer = worker.ask("gemm")
            except WorkerError as error:
                self.left_out[worker.name] = str(error)
                gemms.remove(worker)
                continue
            for precision, shapes in answer.items():
                for shape, seconds in shapes.items():
                    library.setdefault(precision, {}).setdefault(shape, []).append(seconds)

    def _record(
        self,
        group: int,
        one: Competitor,
        worker: Worker,
        samples: dict[str, list[float]],
        yardstick: dict[str, list[float]],
        expected: np.ndarray,
    ) -> None:
        """A row; the yardstick's is the one of the first group, with its other samples kept beside it."""
        if not self.images:
            for both in (samples, yardstick):
                step, decode = statistics.median(both["step"]), statistics.median(both["decode"])
                both["image"] = [self.job.steps * step + decode]
        row = {"name": one.name, "title": one.title, **asdict(one), "group": group, "load_seconds": worker.load}
        row |= {"peak_bytes": samples["memory"][-1], "file_bytes": worker.opened["file_bytes"]}
        row["error"] = float(
            np.linalg.norm(np.array(worker.opened["prediction"]) - expected) / np.linalg.norm(expected)
        )
        row["image_derived"] = not self.images
        for name in ("step", "decode", "image"):
            ratios = [theirs / ours for theirs, ours in zip(yardstick[name], samples[name], strict=True)]
            row[name] = spread(samples[name]) | {"times_faster": spread(ratios)}
        row["presets"] = {}
        for name in (name for name in self.job.presets if name in samples):
            ratios = [theirs / ours for theirs, ours in zip(yardstick["image"], samples[name], strict=True)]
            row["presets"][name] = spread(samples[name]) | {"times_faster": spread(ratios)}
            row["presets"][name] |= {"decode": spread(samples[f"{name} decode"]), "rows": samples[f"{name} rows"][-1]}
        if one is YARDSTICK and one.name in self.rows:
            self.rows[one.name].setdefault("later_groups", []).append({name: row[name] for name in ("step", "decode")})
            self.rows[one.name]["peak_bytes"] = row["peak_bytes"]
        else:
            self.rows[one.name] = row

    def _floors(self) -> dict[str, dict[str, Any]]:
        rates = floor.rates(self.gemms)
        return {
            precision: floor.floor(self.job.spec, self.job.batch, precision, *rates[precision], self.bandwidth)
            for precision in rates
            if precision in self.job.precisions
        }


def spread(samples: Sequence[float]) -> dict[str, Any]:
    least, most = min(samples), max(samples)
    return {"median": statistics.median(samples), "least": least, "most": most, "samples": list(samples)}


def problems(rows: Sequence[dict[str, Any]], floors: dict[str, dict[str, Any]]) -> list[str]:
    """Return the reasons why a run is invalid: a floor above a measurement, or a competitor that computes something
    else."""
    reasons = []
    for row in rows:
        least = row["step"]["least"]
        bound = floors.get(row["precision"], {"step": 0.0})["step"]
        if least < bound:
            reasons.append(
                f"{row['name']}: a step of {1e3 * least:.2f} ms is below the floor of {1e3 * bound:.2f} ms: "
                "the floor's FLOPs or rates are wrong"
            )
        limit = AGREE.get(row["precision"], AGREE_NARROW)
        if not row["error"] <= limit:
            reasons.append(
                f"{row['name']}: its prediction is {row['error']:.1e} away from {YARDSTICK.title}'s, expected "
                f"{limit:.0e} at most: it computes something else"
            )
    return reasons

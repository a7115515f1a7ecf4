"""The prepared check of a GPU: `make gpu-check PACK=.gpu`, on a machine without a network and without pip.

Every step is a process of its own with a limit, and each of its results a line of $OUT/gpu.jsonl at once, so that a
kill loses nothing. docs/gpu.md says what the steps are and how to read the file.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from tests.gpu.place import Place, Row, Skipped

ROOT = Path(__file__).parents[2]
ROWS, LOG = "gpu.jsonl", "gpu.log"
UNPACKED = "unpacked.json"  # in the work folder: the archives that were unpacked there, and their sizes
SHORTEST = 5.0  # seconds that a step is started with
SLOWER = 4  # a dry run, which a busy machine may do beside other work


class Step(NamedTuple):
    name: str
    limit: float  # seconds
    rows: str  # module and function
    arguments: tuple[Any, ...] = ()

    def run(self, place: Place) -> Iterator[Row]:
        module, function = self.rows.split(".")
        rows: Iterator[Row] = getattr(import_module(f"tests.gpu.{module}"), function)(place, *self.arguments)
        return rows


def _torch(kind: str, precision: str, batch: int, limit: float) -> Step:
    return Step(f"torch-{kind}-{precision}-{batch}", limit, "timings.pytorch", (kind, precision, batch))


STEPS = (  # by worth: what a short budget leaves out stands last
    Step("fill", 120, "steps.fill"),
    Step("environment", 30, "steps.environment"),
    Step("device", 60, "steps.device_tests"),
    Step("reference", 90, "timings.reference"),
    Step("ort-fp16", 60, "timings.onnx_runtime", ("fp16",)),
    Step("demo-fp32", 30, "steps.demo", ("fp32",)),
    Step("demo-tf32", 30, "steps.demo", ("fp32", True)),
    Step("pipeline-fp16", 60, "timings.pipeline", ("fp16",)),
    Step("torch-eager-fp32", 40, "timings.pytorch", ("eager", "fp32", 1, 8)),
    Step("torch-eager-fp16", 40, "timings.pytorch", ("eager", "fp16", 1, 8)),
    Step("torch-graph-fp16", 40, "timings.pytorch", ("graph", "fp16", 1, 8)),
    Step("ceilings", 40, "timings.ceilings"),
    Step("ort-fp32", 70, "timings.onnx_runtime", ("fp32",)),
    _torch("compile", "fp16", 1, 90),
    _torch("autotune", "fp16", 1, 120),
    Step("demo-fp16", 30, "steps.demo", ("fp16",)),
    Step("program", 40, "steps.program"),
    Step("pipeline-fp32", 60, "timings.pipeline", ("fp32",)),
    Step("ort-tf32", 70, "timings.onnx_runtime", ("fp32", True)),
    Step("sanitizer", 90, "steps.sanitizer"),
    Step("demo-bf16", 30, "steps.demo", ("bf16",)),
    Step("ort-bf16", 60, "timings.onnx_runtime", ("bf16",)),
    _torch("compile", "fp16", 8, 90),
    _torch("autotune", "fp16", 8, 120),
    _torch("aoti", "fp16", 1, 120),
    _torch("eager", "bf16", 1, 30),
    _torch("autotune", "bf16", 1, 120),
    _torch("aoti", "fp16", 8, 120),
    Step("pipeline-bf16", 60, "timings.pipeline", ("bf16",)),
    Step("rtx", 40, "steps.rtx"),
)


def check(
    pack: Path, work: Path, out: Path, *, dry: bool = False, only: Sequence[str] = (), seconds: float = 540
) -> list[Row]:
    """Unpack, run the steps one after the other, and return the rows that say how each ended."""
    deadline = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    record(out, {"step": "unpack"} | unpack(pack, work))
    ends, printed = [], _size(out)
    for step in STEPS:
        if only and not any(fnmatch(step.name, pattern) for pattern in only):
            continue
        if (left := deadline - time.monotonic()) > SHORTEST:
            limit = SLOWER * step.limit if dry else step.limit
            ends.append(_run(step, work, out, dry, min(limit, left)))
        else:
            ends.append(_end(out, step, "not started", 0.0, "the time of the whole check is over"))
        print(table(read(out, printed)), flush=True)
        printed = _size(out)
    return ends


def unpack(pack: Path, work: Path) -> Row:
    """Unpack the packs that an earlier call has not: the step `fill` has since rewritten some of their files."""
    began = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    stamp = work / UNPACKED
    sizes = json.loads(stamp.read_text(encoding="utf-8")) if stamp.is_file() else {}
    archives = [path for path in sorted(pack.glob("*.tar.xz")) if sizes.get(path.name) != path.stat().st_size]
    for path in archives:
        with tarfile.open(path) as archive:
            archive.extractall(work, filter="data")
        sizes[path.name] = path.stat().st_size
        stamp.write_text(json.dumps(sizes), encoding="utf-8")
    return {"packs": [path.name for path in archives], "seconds": time.monotonic() - began}


def record(out: Path, row: Row) -> None:
    with (out / ROWS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(out: Path, start: int = 0) -> list[Row]:
    """Return the rows from a byte on; an earlier call's stand before those of this one."""
    with (out / ROWS).open("rb") as file:
        file.seek(start)
        return [json.loads(line) for line in file]


def _size(out: Path) -> int:
    return (out / ROWS).stat().st_size


def _end(out: Path, step: Step, end: str, seconds: float, why: str = "") -> Row:
    """Write a step's last row."""
    row = {"step": step.name, "end": end, "seconds": round(seconds, 2)} | ({"why": why} if why else {})
    record(out, row)
    return row


def _run(step: Step, work: Path, out: Path, dry: bool, limit: float) -> Row:
    """Run a step in a process group of its own; return its last row, its own or ours where it could write none."""
    paths = [work / "site", ROOT, ROOT / "runtime" / "python"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    caches = str(work / "caches")
    environment |= {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
    environment |= {"XDG_CACHE_HOME": caches, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "tests.gpu.check", "--step", step.name, "--work", str(work), "--out", str(out)]
    began, start = time.monotonic(), _size(out)
    with (out / LOG).open("a") as log:
        log.write(f"==== {step.name}\n")
        log.flush()
        process = subprocess.Popen(
            command + ["--dry"] * dry, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            why = f"the process ended with {code}"
        except subprocess.TimeoutExpired:
            code, why = None, f"over its limit of {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # what it started itself, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    last = next(reversed(read(out, start)), {})
    if code == 0 and last.get("step") == step.name and "end" in last:
        return last
    return _end(out, step, "killed", time.monotonic() - began, why)


def run_step(step: Step, place: Place, out: Path) -> None:
    """Write a row for each result and a last one; what fails is a row too."""
    began, passed = time.monotonic(), True
    try:
        for row in step.run(place):
            record(out, {"step": step.name} | row)
            passed = passed and row.get("passed", True)
        end, why = "passed" if passed else "failed", ""
    except Skipped as reason:
        end, why = "skipped", str(reason)
    except Exception as error:
        traceback.print_exc()
        end, why = "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    _end(out, step, end, time.monotonic() - began, why)


def table(rows: Sequence[Row]) -> str:
    """Return a line a step, and under it its times."""
    lines = []
    for row in rows:
        if "end" in row:
            lines.append(f"{row['step']:<22} {row['end']:<12} {row['seconds']:7.1f} s  {row.get('why', '')}".rstrip())
        elif "ms" in row:
            words = [str(row[key]) for key in ("kind", "mode", "precision", "batch") if key in row]
            error = row.get("error", row.get("off_by"))
            ms = row.get("ms_a_step", row["ms"])
            lines.append(f"  {' '.join(words):<40} {ms:9.3f} ms{'' if error is None else f'  off by {error:.1e}'}")
        elif "floor_ms" in row:
            lines.append(f"  floor {row['precision']} {row['batch']:<30} {row['floor_ms']:9.3f} ms")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--pack", type=Path, default=ROOT / ".gpu")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu", help="where it is unpacked")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or ROOT / "build" / "gpu-out")
    parser.add_argument("--only", nargs="+", default=(), metavar="STEP", help="names or patterns")
    parser.add_argument("--seconds", type=float, default=540, help="of all steps")
    parser.add_argument("--dry", action="store_true", help="on a CPU, with fakes")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # of the process that runs one
    options = parser.parse_args()
    if options.step:
        run_step(
            next(step for step in STEPS if step.name == options.step), Place(options.work, options.dry), options.out
        )
        return 0
    work, out = options.work.resolve(), options.out.resolve()
    if not [*options.pack.glob("*.tar.xz"), *work.glob("job.json")]:
        parser.error(f"no packs in {options.pack}; make them with `make gpu-pack`, where there is a network")
    ends = check(options.pack, work, out, dry=options.dry, only=options.only, seconds=options.seconds)
    return int(any(end["end"] in ("failed", "killed") for end in ends))


if __name__ == "__main__":
    sys.exit(main())

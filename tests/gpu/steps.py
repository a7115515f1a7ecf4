"""The steps of a GPU's check that prepare and prove; timings.py has those that time.

Each yields rows of gpu.jsonl as it gets them; docs/gpu.md says what they mean.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_export.bench.subject import SEED
from dit_runtime import cli
from dit_runtime.backends.trt_network import logger_of
from dit_runtime.bundle import manifest
from tests.gpu.place import Place, Row, Skipped

TESTS = ("tests/gpu/test_device.py", "tests/gpu/test_bench.py")
POOL = 1 << 24  # normal numbers that weights are cut from: those of XL/2 would take a minute to draw
PACKAGES = ("onnxruntime-gpu", "onnxruntime", "torch", "triton", "cupy-cuda13x", "cuda-bindings", "numpy")


def fill(place: Place) -> Iterator[Row]:
    """Write the weights that no pack has room for: normal numbers of each tensor's mean and deviation."""
    pool = np.random.default_rng(SEED).standard_normal(POOL, np.float32)
    folders = [path.parent for path in sorted(place.work.glob("*/weights.json"))]
    if not folders:
        raise Skipped("no graphs without weights are in the packs that were unpacked")
    writers = [partial(_filled, folder, pool) for folder in folders] + [partial(_fill_network, place, pool)]
    with ThreadPoolExecutor() as executor:
        yield from executor.map(lambda write: write(), writers)


def _filled(folder: Path, pool: NDArray[np.float32]) -> Row:
    began = time.perf_counter()
    table = json.loads((folder / "weights.json").read_text(encoding="utf-8"))
    for name, size in table["files"].items():
        with (folder / name).open("wb") as file:
            file.truncate(size)
    for tensor in table["tensors"]:
        values = cut(pool, tensor["name"], tuple(tensor["shape"]), tensor["mean"], tensor["deviation"])
        with (folder / tensor["file"]).open("r+b") as file:
            file.seek(tensor["offset"])
            stored(values, tensor["kind"]).tofile(file)
    contract = manifest.read(folder)
    manifest.write(folder, replace(contract, files=manifest.describe_files(folder, skip=["weights.json"])))
    size = sum(table["files"].values())
    return {"bundle": folder.name, "bytes": size, "seconds": time.perf_counter() - began}


def cut(pool: NDArray[np.float32], name: str, shape: tuple[int, ...], mean: float, deviation: float) -> NDArray[Any]:
    """Return numbers that depend on the name alone, so that a tensor has the same in every precision."""
    start = zlib.crc32(name.encode()) % (len(pool) // 2)  # so that a large tensor repeats half of them at least
    size = int(np.prod(shape))
    numbers = np.resize(pool[start : start + size], shape)
    return (numbers * np.float32(deviation) + np.float32(mean)).astype(np.float32)


def stored(values: NDArray[np.float32], kind: str) -> NDArray[Any]:
    if kind == "bfloat16":
        return ((values.view(np.uint32) + np.uint32(0x8000)) >> 16).astype(np.uint16)
    return values.astype(kind)


def _fill_network(place: Place, pool: NDArray[np.float32]) -> Row:
    """Write PyTorch's weights; they compute something else than the graphs', at the same cost."""
    import torch
    from safetensors.numpy import save_file

    from dit_export.networks.dit import DiT

    began = time.perf_counter()
    with torch.device("meta"):
        state = DiT(place.job(1).spec).state_dict()
    weights = {name: cut(pool, name, tuple(tensor.shape), 0.0, 0.02) for name, tensor in state.items()}
    (place.work / "weights").mkdir(exist_ok=True)
    save_file(weights, place.work / "weights" / "dit.safetensors")
    size = sum(array.nbytes for array in weights.values())
    return {"bundle": "weights", "bytes": size, "seconds": time.perf_counter() - began}


def environment(place: Place) -> Iterator[Row]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    yield {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count(), **versions}
    import onnxruntime

    yield {"onnxruntime": onnxruntime.__version__, "file": onnxruntime.__file__} | {
        "providers": onnxruntime.get_available_providers()
    }
    if place.dry:
        return
    import torch

    properties = torch.cuda.get_device_properties(0)
    smi = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    yield {
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": smi.stdout.strip() or smi.stderr.strip(),
    }


# The project's own code on the real CUDA runtime.


def device_tests(place: Place, *before: str, tests: Sequence[str] = TESTS) -> Iterator[Row]:
    """Run the tests of engines on a device: with a GPU those that need one, else those with a fake driver."""
    command = [*before, sys.executable, "-m", "pytest", "-v", *tests, "-rfE", "-p", "no:cacheprovider"]
    command += [] if place.dry else ["-m", "gpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, done.stderr, file=sys.stderr)
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    failures = re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.MULTILINE)
    row = {"returncode": done.returncode, "counts": counts, "failures": failures}
    yield row | {"passed": done.returncode == 0 and counts.get("passed", 0) > 0}


def sanitizer(place: Place) -> Iterator[Row]:
    if place.dry:
        raise Skipped("compute-sanitizer needs a GPU")
    if not shutil.which("compute-sanitizer"):
        raise Skipped("compute-sanitizer is not installed")
    memcheck = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
    yield from device_tests(place, *memcheck, tests=TESTS[:1])  # PyTorch under it would take minutes


# The proof that a bundle carries, on this machine.


def demo(place: Place, precision: str, tf32: bool = False) -> Iterator[Row]:
    """Replay PyTorch's reference, as `dit-run verify` does; with TF32 in its products the gate must fail."""
    folder = place.bundle(f"demo-{precision}")
    if tf32:
        if place.dry:
            raise Skipped("TF32 needs a GPU")
        _multiply_in_tf32()
    printed = io.StringIO()
    with redirect_stdout(printed):
        code = cli.main(["verify", str(folder), "--provider", place.device, "--json"])
    checks = json.loads(printed.getvalue())["checks"] if code in (0, 1) and printed.getvalue() else []
    failed = [f"{check['name']} {check['value']}" for check in checks if not check["passed"]]
    row = {"precision": precision, "tf32": tf32, "returncode": code, "checks": len(checks), "failed": failed}
    yield row | {"passed": code == int(tf32) and bool(checks)}


def _multiply_in_tf32() -> None:
    """Let every session of this process have TF32, whatever it is opened with."""
    import onnxruntime as ort

    open_session = ort.InferenceSession

    def open_in_tf32(path: Any, settings: Any = None, providers: Sequence[Any] = (), **options: Any) -> Any:
        pairs = [provider if isinstance(provider, tuple) else (provider, {}) for provider in providers]
        changed = [(name, {**own, "use_tf32": "1"} if name.startswith("CUDA") else own) for name, own in pairs]
        return open_session(path, settings, providers=changed, **options)

    ort.InferenceSession = open_in_tf32


def program(place: Place) -> Iterator[Row]:
    """Replay the demo's reference in C++, and time a run of it."""
    binary = place.folder("program") / "dit-generate"
    libraries = [str(binary.parent), str(place.work / "site" / "onnxruntime" / "capi"), *_cuda_libraries()]
    environment = os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(libraries)}
    for name in sorted(path.name for path in place.work.glob("demo-*")):
        try:
            folder = place.bundle(name)
        except Skipped as reason:
            yield {"bundle": name, "skipped": str(reason)}
            continue
        command = [str(binary), str(folder), "--provider", place.device]
        done = subprocess.run([*command, "--verify", "--json"], capture_output=True, text=True, env=environment)
        print(done.stderr, file=sys.stderr)
        row = {"bundle": folder.name, "returncode": done.returncode, "passed": done.returncode == 0}
        yield row | {"says": done.stderr.strip()[-300:]}
        began = time.perf_counter()
        command += ["--labels", "0", "1", "-o", str(place.work / "program.npy")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        yield {"bundle": folder.name, "mode": "open and draw", "seconds": time.perf_counter() - began} | {
            "returncode": done.returncode,
            "passed": done.returncode == 0,
        }


def _cuda_libraries() -> list[str]:
    """Return the folders of CUDA's libraries that pip installed."""
    try:
        import nvidia
    except ImportError:
        return []
    return sorted({str(path.parent) for root in nvidia.__path__ for path in Path(root).rglob("lib*.so*")})


def rtx(place: Place) -> Iterator[Row]:
    """Start TensorRT-RTX's runtime and builder on this GPU, and record what it says."""
    if place.dry:
        raise Skipped("TensorRT-RTX needs a GPU")
    try:
        import tensorrt_rtx
    except ImportError:
        raise Skipped("tensorrt_rtx is not installed") from None
    for kind in ("Runtime", "Builder"):
        logger = logger_of(tensorrt_rtx)
        try:
            getattr(tensorrt_rtx, kind)(logger)
            error = ""
        except Exception as reason:  # a constructor that returns nothing is a TypeError
            error = f"{type(reason).__name__}: {reason}"
        yield {"version": tensorrt_rtx.__version__, "starts": kind, "error": error, "says": logger.last}

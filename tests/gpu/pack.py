"""Packs for a machine with a GPU, without a network and without pip: `make gpu-pack`, made where there is a network.

`.gpu/first.tar.xz` holds a slim onnxruntime-gpu and the graphs of a large network without their weights, which the
check fills with random numbers there. `.gpu/second.tar.xz` holds what has real weights, and the C++ program.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto

from dit_export.bench.competitors import Job
from dit_export.bundle.scratch import build_scratch_bundle
from dit_export.bundle.tracing import trace_graphs
from dit_export.checkpoints import Loaded
from dit_export.checkpoints.synthetic import SD_VAE, synthetic_dit, synthetic_vae
from dit_export.cli import main as dit_export
from dit_export.demo import store
from dit_export.networks.codec import make_decoder
from dit_export.networks.dit import dit_network
from dit_export.networks.spec import model
from dit_export.recipe import Recipe
from dit_runtime import backends
from dit_runtime.console import guarded
from dit_runtime.errors import UsageError
from dit_runtime.progress import Progress
from dit_runtime.sampling.process import Process

ROOT = Path(__file__).parents[2]
BACKEND = "onnxruntime"
KEEP = 90  # compute capability 9.0, an H100's
LIMIT = 50 << 20  # bytes of a pack: the upload limit
PACKS = ("first.tar.xz", "second.tar.xz")
PYTHON = "312"  # of the machine
LEFT_OUT = ("transformers", "tools", "quantization", "datasets")
PROVIDER = "libonnxruntime_providers_cuda.so"
ENGINE = b"OrtCudaEngine"  # the C++ class, whose name its type information holds
LIBRARY = "libonnxruntime.so.1"  # as it calls itself; the wheel has it under its full version
WEIGHTS = "weights.json"  # in a bundle's folder: what its files of weights hold
FAT_BINARY = struct.pack("<I", 0xBA55ED50)
HEADER = 16
LARGEST_BATCH, STEPS = 8, 25
KINDS = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}


class Entry(NamedTuple):
    architecture: int
    start: int  # of the machine code, in bytes from the file's start
    size: int


def fat_binaries(content: mmap.mmap) -> Iterator[list[Entry]]:
    """Yield each fat binary of a library: one translation unit, compiled for some architectures."""
    place = 0
    while (place := content.find(FAT_BINARY, place)) >= 0:
        _, header, size = struct.unpack_from("<HHQ", content, place + 4)
        if header != HEADER:  # the same bytes by chance
            place += len(FAT_BINARY)
            continue
        entries, at = [], place + HEADER
        place = at + size
        while at < place:
            own, length = struct.unpack_from("<IQ", content, at + 4)
            (architecture,) = struct.unpack_from("<I", content, at + 28)
            entries.append(Entry(architecture, at + own, length))
            at += own + length
        yield entries


def keep_architecture(library: Path, keep: int) -> int:
    """Zero a library's machine code for all other architectures, in its place; return how many bytes were zeroed.

    What was compiled for that one alone goes too: in ONNX Runtime these are products of mixtures of experts.
    """
    zeroed = 0
    with library.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        for entries in fat_binaries(content):
            alone = {entry.architecture for entry in entries} == {keep}
            for entry in entries:
                if alone or entry.architecture != keep:
                    content[entry.start : entry.start + entry.size] = bytes(entry.size)
                    zeroed += entry.size
    return zeroed


def fetch_wheel(folder: Path) -> Path:
    """Download onnxruntime-gpu in the version of ONNX Runtime that the project pins, for the machine's Python."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    wanted = f"onnxruntime-gpu=={pins['onnxruntime']}"
    pattern = f"onnxruntime_gpu-{pins['onnxruntime']}-cp{PYTHON}-*.whl"
    wheels = sorted(folder.glob(pattern))
    if not wheels:
        folder.mkdir(parents=True, exist_ok=True)
        platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 27)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += [f"--python-version={PYTHON}", "--implementation=cp", *platforms, "-d", str(folder), wanted]
        done = subprocess.run(command, stdout=sys.stderr)
        wheels = sorted(folder.glob(pattern))
        if done.returncode or not wheels:
            raise UsageError(f"{wanted} for CPython {PYTHON} cannot be downloaded here, so there is no pack")
    return wheels[-1]


def unpack_wheel(wheel: Path, site: Path) -> None:
    """Unpack what a session needs; the provider's library keeps its layout and one architecture's code."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            parts = name.split("/")
            if not any(part in parts for part in LEFT_OUT) and "providers_tensorrt" not in name:
                archive.extract(name, site)
    capi = site / "onnxruntime" / "capi"
    keep_architecture(capi / PROVIDER, KEEP)
    (library,) = capi.glob("libonnxruntime.so.*")
    library.rename(capi / LIBRARY)


def write_graphs(folder: Path, job: Job, precisions: Iterable[str], progress: Progress) -> list[Path]:
    """Write a bundle a precision, whose files of weights are replaced by what they hold in figures."""
    network, vae = dit_network(synthetic_dit(job.spec, 0)), synthetic_vae(0, job.vae or SD_VAE)
    loaded = Loaded(network, vae, (), job.process, {"kind": "synthetic", "seed": 0})
    decoder, bundles = make_decoder(vae), []
    with tempfile.TemporaryDirectory(prefix="dit-gpu-", dir=folder) as temporary:
        traced = Path(temporary) / "traced"
        trace_graphs(traced, loaded, decoder, progress)
        for precision in precisions:
            bundle = folder / f"xl-{precision}"
            recipe = Recipe(precision=precision, backend=BACKEND, max_batch=LARGEST_BATCH)
            build_scratch_bundle(bundle, loaded, decoder, recipe, progress, traced)
            strip_weights(bundle)
            bundles.append(bundle)
    job.write(folder)
    return bundles


def strip_weights(bundle: Path) -> None:
    """Replace a bundle's files of weights by a list: each tensor's place, type, shape, mean and deviation."""
    tensors: dict[tuple[str, int], dict[str, Any]] = {}
    for path in sorted(bundle.glob("*.onnx")):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                where = {entry.key: entry.value for entry in tensor.external_data}
                place = where["location"], int(where.get("offset", 0))
                tensors[place] = _described(tensor, bundle, *place)
    files = {path.name: path.stat().st_size for path in bundle.glob("*.data")}
    for name in files:
        (bundle / name).unlink()
    table = {"files": files, "tensors": list(tensors.values())}
    (bundle / WEIGHTS).write_text(json.dumps(table), encoding="utf-8")


def _described(tensor: TensorProto, bundle: Path, file: str, offset: int) -> dict[str, Any]:
    kind, count = KINDS[tensor.data_type], math.prod(tensor.dims)
    stored = np.memmap(bundle / file, np.float32 if kind == "float32" else np.uint16, "r", offset, (count,))
    if kind == "float16":
        stored = stored.view(np.float16)
    values = (stored.astype(np.uint32) << 16).view(np.float32) if kind == "bfloat16" else stored
    figures = {"mean": float(values.mean(dtype=np.float64)), "deviation": float(values.std(dtype=np.float64))}
    # What was cast is called as its type's number says; what it was cast from gets the same numbers.
    name = tensor.name if kind == "float32" else tensor.name.removesuffix(f"_{tensor.data_type}")
    return {"name": name, "file": file, "offset": offset, "kind": kind, "shape": list(tensor.dims), **figures}


def build_demo(folder: Path, precisions: Iterable[str]) -> list[Path]:
    """Build the model that ships, with its reference; leave out a precision that does not pass its gates here."""
    bundles = []
    for precision in precisions:
        bundle = folder / f"demo-{precision}"
        options = ["--precision", precision, "--backend", BACKEND, "--max-batch", str(LARGEST_BATCH)]
        if dit_export(["build", "--checkpoint", str(store.MODEL), *options, "-o", str(bundle)]):
            print(f"left out: {bundle.name}: its build failed, as said above", file=sys.stderr)
        else:
            bundles.append(bundle)
    if not bundles:
        raise UsageError("no bundle of the demo could be built, as said above")
    return bundles


def copy_program(build: Path, target: Path) -> None:
    """Copy dit-generate with libdit's plugins, and the libraries that a machine without build tools may lack."""
    program = build / "programs" / "dit-generate"
    if not program.is_file():
        raise UsageError(f"{program}: no C++ program here; `make gpu-pack` builds it")
    needed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    pairs = [line.strip().partition(" => ")[::2] for line in needed.splitlines()]
    libraries = {
        name: Path(path.split()[0]).resolve() for name, path in pairs if name.startswith(("libdit.", "libpng", "libz."))
    }
    libraries |= {path.name: path for path in build.glob("libdit-*.so")}  # opened at run time, from beside libdit
    if not any(ENGINE in path.read_bytes() for path in (program, *libraries.values())):
        raise UsageError(f"{program}: built without CUDA_ROOT, so its arrays cannot stay on a GPU; run `make gpu-pack`")
    target.mkdir()
    shutil.copy2(program, target)
    for name, path in libraries.items():
        shutil.copy2(path, target / name)


def write_pack(path: Path, folder: Path, names: Sequence[Path]) -> None:
    """Compress with xz, which Python unpacks without a tool; refuse what is over the upload limit."""
    with tarfile.open(path, "w:xz", preset=9) as archive:
        for name in names:
            archive.add(name, name.relative_to(folder))
    size = path.stat().st_size
    print(f"{path}: {size / 1e6:.1f} MB")
    if size > LIMIT:
        raise UsageError(f"{path}: {size / 1e6:.1f} MB, expected at most {LIMIT / 1e6:.1f} MB, the upload limit")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-pack", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / ".gpu")
    parser.add_argument("--model", default="XL/2")
    parser.add_argument("--program", type=Path, required=True, metavar="DIR", help="CMake's build folder")
    options = parser.parse_args(arguments)
    precisions = [name for name in backends.backend(BACKEND).PRECISIONS if name not in backends.QUANTIZED]
    job = Job(model(options.model), Process(), 1, STEPS, 1, (), {}, "cuda")
    options.output.mkdir(parents=True, exist_ok=True)
    first, second = (options.output / name for name in PACKS)
    for path in (first, second):
        path.unlink(missing_ok=True)
    progress = Progress()
    with tempfile.TemporaryDirectory(prefix="dit-gpu-", dir=options.output) as temporary:
        folder = Path(temporary)
        site = folder / "site"
        with progress.stage("onnxruntime-gpu"):
            unpack_wheel(fetch_wheel(ROOT / "build" / "gpu-wheels"), site)
        library = site / "onnxruntime" / "capi" / LIBRARY  # only C++ needs it, and only the second pack has room
        python = [path for path in site.rglob("*") if path.is_file() and path != library]
        bundles = write_graphs(folder, job, precisions, progress)
        with progress.stage("compress"):
            write_pack(first, folder, [*python, folder / "job.json", *bundles])
        demos = build_demo(folder, precisions)
        copy_program(options.program, folder / "program")
        write_pack(second, folder, [*demos, folder / "program", library])
    return 0


if __name__ == "__main__":
    sys.exit(guarded("make gpu-pack", main))

"""Times of a step: the machine's ceilings, ONNX Runtime alone, PyTorch in its ways, and our own runtime."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_export.bench.competitors import Competitor
from dit_export.bench.floor import Gemms, bandwidth, floor, rates
from dit_export.bench.subject import GUIDANCE, SEED, TIMESTEP
from dit_export.bench.worker import OPENERS
from dit_runtime import Pipeline
from dit_runtime.bundle import manifest
from dit_runtime.bundle.records import Stage
from dit_runtime.sampling.noise import Noise
from dit_runtime.verify import relative_error
from tests.gpu.place import Place, Row, Skipped

BATCHES = (1, 8)
ROUNDS, WARM_UPS = 5, 3
ROUND_SECONDS, DRY_SECONDS = 0.2, 0.001
REFERENCE, YARDSTICK = "reference.npz", "yardstick.npz"
# Relative L2 of a guided step and of the pictures. Random weights amplify rounding more than trained ones, for which
# facts.json has limits: measured 1.3e-2 in fp16 on a tiny network. With other weights it would be about 1.
LIMITS = {"fp32": 1e-4, "fp16": 5e-2, "bf16": 3e-1}
DECODER_LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-1}


def timed(place: Place, call: Callable[[], object], wait: Callable[[], object] = lambda: None) -> Row:
    """Return milliseconds of a call among others in a row: the median of some rounds, the least and the most."""
    began = time.perf_counter()
    for _ in range(WARM_UPS):
        call()
    wait()
    seconds = DRY_SECONDS if place.dry else ROUND_SECONDS
    calls = max(1, round(seconds * WARM_UPS / (time.perf_counter() - began)))
    rounds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        rounds.append(1e3 * (time.perf_counter() - began) / calls)
    return {"ms": statistics.median(rounds), "least_ms": min(rounds), "most_ms": max(rounds), "calls": calls}


def judged(error: float, limit: float) -> Row:
    return {"error": error, "limit": limit, "passed": bool(error <= limit)}


def ceilings(place: Place) -> Iterator[Row]:
    """Time the linears' products and a copy, and say what they leave of a step."""
    job = place.job(1)
    copied = bandwidth(place.device)
    yield {"bytes_per_second": copied}
    precisions = ("fp32", "bf16") if place.dry else ("fp32", "fp16", "bf16", "int8", "fp8")
    for batch in BATCHES:
        seconds = Gemms("pytorch", job.spec, batch, job.threads, precisions, place.device).run()
        for precision, shapes in seconds.items():
            yield {"batch": batch, "precision": precision, "product_ms": {k: 1e3 * s for k, s in shapes.items()}}
        listed = {precision: {shape: [s] for shape, s in shapes.items()} for precision, shapes in seconds.items()}
        for precision, (rate, _) in rates({"pytorch": listed}).items():
            if precision in seconds:
                step = floor(job.spec, batch, precision, rate, "pytorch", copied)["step"]
                yield {"batch": batch, "precision": precision, "flops_per_second": rate, "floor_ms": 1e3 * step}


def reference(place: Place) -> Iterator[Row]:
    """Ask the CPU for a guided step, whose inputs and answer the next steps read."""
    arrays = {}
    with Pipeline.load(place.bundle("xl-fp32"), provider="cpu") as pipe:
        for batch in BATCHES:
            began = time.perf_counter()
            state, inputs = asked(pipe, batch)
            arrays |= {f"{batch}/{name}": values for name, values in inputs(0, slice(None)).items()}
            arrays[f"{batch}/{pipe.manifest.state.name}"] = state
            arrays[f"{batch}/prediction"] = pipe.engines.denoise(state, inputs, 0)[0]
            arrays[f"{batch}/images"] = pipe.engines.decode(state)
            finite = all(np.isfinite(arrays[f"{batch}/{name}"]).all() for name in ("prediction", "images"))
            yield {"batch": batch, "seconds": time.perf_counter() - began, "passed": bool(finite)}
    np.savez(place.work / REFERENCE, **arrays)


def asked(pipe: Pipeline, batch: int) -> tuple[NDArray[np.float32], Any]:
    """Return a state, and what the network reads beside it in the middle of a run."""
    state = Noise(SEED).normal((batch, *pipe.manifest.state.shape))
    labels = np.arange(1, batch + 1) * 207 % pipe.manifest.classes
    null, weights = np.array([pipe.manifest.null["labels"]]), np.full(batch, GUIDANCE, np.float32)
    return state, pipe.engines.inputs(np.array([TIMESTEP]), {"labels": labels}, {"labels": null}, weights)


def read_reference(place: Place, batch: int) -> dict[str, NDArray[Any]]:
    if not (place.work / REFERENCE).is_file():
        raise Skipped("the step `reference` has left no answer")
    with np.load(place.work / REFERENCE) as file:
        return {name.partition("/")[2]: file[name] for name in file.files if name.startswith(f"{batch}/")}


class Raw(NamedTuple):
    """A session of ONNX Runtime without any of our code around it."""

    session: Any
    device: str

    @classmethod
    def open(cls, place: Place, path: Path, tf32: bool, graph: bool) -> Raw:
        import onnxruntime as ort

        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if place.dry:
            providers: list[Any] = ["CPUExecutionProvider"]
        else:
            import torch  # noqa: F401  # which brings CUDA's libraries

            options = {"use_tf32": str(int(tf32)), "enable_cuda_graph": str(int(graph))}
            options |= {"cudnn_conv_algo_search": "HEURISTIC", "cudnn_conv_use_max_workspace": "1"}
            providers = [("CUDAExecutionProvider", options)]
        session = ort.InferenceSession(path, settings, providers=providers)
        if not place.dry and "CUDAExecutionProvider" not in session.get_providers():
            raise RuntimeError(f"ONNX Runtime's CUDA provider did not start: {session.get_providers()}")
        return cls(session, place.device)

    def placement(self) -> dict[str, dict[str, int]]:
        """Count nodes by provider and operator."""
        counts: dict[str, Counter[str]] = {}
        for subgraph in self.session.get_provider_graph_assignment_info():
            counts.setdefault(subgraph.ep_name, Counter()).update(node.op_type for node in subgraph.get_nodes())
        return {name: dict(operators.most_common()) for name, operators in counts.items()}

    def plain(self, inputs: Mapping[str, NDArray[Any]]) -> Callable[[], dict[str, NDArray[Any]]]:
        names = [tensor.name for tensor in self.session.get_outputs()]
        return lambda: dict(zip(names, self.session.run(names, dict(inputs)), strict=True))

    def bound(
        self, inputs: Mapping[str, NDArray[Any]], shapes: Mapping[str, Sequence[int]], graph: int
    ) -> tuple[Callable[[], object], Callable[[], dict[str, NDArray[Any]]]]:
        """Bind arrays of the device; return what runs on them, as graph number `graph`, and what brings outputs home.

        Number -1 is no graph.
        """
        import onnxruntime as ort

        binding, run = self.session.io_binding(), ort.RunOptions()
        run.add_run_config_entry("gpu_graph_id", str(graph))
        for name, values in inputs.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(values, self.device, 0))
        outputs = {
            name: ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.float32, self.device, 0)
            for name, shape in shapes.items()
        }
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        return (
            lambda: self.session.run_with_iobinding(binding, run),
            lambda: {name: value.numpy() for name, value in outputs.items()},
        )


def _shapes(stage: Stage, batch: int) -> dict[str, list[int]]:
    return {spec.name: [size if isinstance(size, int) else batch for size in spec.shape] for spec in stage.gives}


def onnx_runtime(place: Place, precision: str, tf32: bool = False) -> Iterator[Row]:
    """Time the denoiser's portable form: arrays of the host, of the device, and in a CUDA graph."""
    folder = place.bundle(f"xl-{precision}")
    stage = manifest.read(folder).step
    for mode in ("plain", "binding", "graph"):
        if mode != "binding":  # which works in the session of `plain`
            began = time.perf_counter()
            raw = Raw.open(place, folder / stage.onnx, tf32, graph=mode == "graph")
            opening = {"open_seconds": time.perf_counter() - began}
        if mode == "plain":
            yield {"placement": raw.placement(), **opening}
        for batch in BATCHES:
            expected = read_reference(place, batch)
            inputs = {spec.name: expected[spec.name] for spec in stage.reads}
            if mode == "plain":
                run = fetch = raw.plain(inputs)
            else:
                run, fetch = raw.bound(inputs, _shapes(stage, batch), batch if mode == "graph" else -1)
            run()
            error = relative_error(fetch()["prediction"], expected["prediction"])
            row = {"error": error} if tf32 else judged(error, LIMITS[precision])
            yield {"precision": precision, "tf32": tf32, "batch": batch, "mode": mode, **timed(place, run), **row}


def pytorch(place: Place, kind: str, precision: str, *batches: int) -> Iterator[Row]:
    """Time a step with and without the way of its arrays to the device and back."""
    if kind == "graph" and place.dry:
        raise Skipped("a CUDA graph needs a GPU")
    if not (place.work / "weights").is_dir():
        raise Skipped("the step `fill` has written no weights")
    import torch

    wait = (lambda: None) if place.dry else torch.cuda.synchronize
    module, name = OPENERS[kind]
    for batch in batches:
        began = time.perf_counter()
        subject = getattr(import_module(f"dit_export.bench.{module}"), name)(
            Competitor(kind, "pytorch", precision), place.job(batch), place.work / "weights"
        )
        prediction = subject.prediction()
        row = {"kind": kind, "precision": precision, "batch": batch, "open_seconds": time.perf_counter() - began}
        inputs = subject.inputs(subject.latents, TIMESTEP)
        row |= {"finite": bool(np.isfinite(prediction).all()), **_against_yardstick(place, kind, precision, prediction)}
        yield (
            row
            | timed(place, partial(subject.network, *inputs), wait)
            | {"with_copies": timed(place, subject.prediction)}
        )


def _against_yardstick(place: Place, kind: str, precision: str, prediction: NDArray[Any]) -> Row:
    """Compare with eager fp32, which is written down when it runs."""
    path, key = place.work / YARDSTICK, str(len(prediction))
    known = dict(np.load(path)) if path.is_file() else {}
    if (kind, precision) == ("eager", "fp32"):
        np.savez(path, **known | {key: prediction})
    return {"off_by": relative_error(prediction, known[key])} if key in known else {}


def pipeline(place: Place, precision: str) -> Iterator[Row]:
    """Time our own runtime: one step with its copies, whole runs, and the decoder."""
    began = time.perf_counter()
    steps = place.job(1).steps
    with Pipeline.load(place.bundle(f"xl-{precision}"), provider=place.device) as pipe:
        yield {"precision": precision, "open_seconds": time.perf_counter() - began}
        for batch in BATCHES:
            expected = read_reference(place, batch)
            state, inputs = asked(pipe, batch)
            error = relative_error(pipe.engines.denoise(state, inputs, 0)[0], expected["prediction"])
            row = judged(error, LIMITS[precision])
            row |= {"precision": precision, "batch": batch}
            yield row | {"mode": "a step with copies"} | timed(place, partial(pipe.engines.denoise, state, inputs, 0))
            request = {"labels": [*range(batch)], "steps": steps, "guidance": GUIDANCE, "output": "latents"}
            run = timed(place, partial(pipe.sample, **request))
            yield {"precision": precision, "batch": batch, "mode": "a run", "ms_a_step": run["ms"] / steps, **run}
            error = relative_error(pipe.engines.decode(state), expected["images"])
            row = {"precision": precision, "batch": batch, "mode": "decode"} | judged(error, DECODER_LIMITS[precision])
            yield row | timed(place, partial(pipe.engines.decode, state))

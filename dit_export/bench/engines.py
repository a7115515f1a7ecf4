"""The competitors that run without PyTorch: a plain export, and ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_export.bench.competitors import Competitor, Job
from dit_export.bench.subject import GUIDANCE, SEED, SOLVER, TIMESTEP, Subject, guided
from dit_export.graph import DECODER, NETWORK
from dit_runtime.backends import CPU
from dit_runtime.conditions.memo import StepInputs
from dit_runtime.errors import UsageError
from dit_runtime.images import to_uint8
from dit_runtime.pipeline import Pipeline
from dit_runtime.request import Request
from dit_runtime.sampling.solvers import plan
from dit_runtime.warming import warm

Run = Callable[[Mapping[str, np.ndarray]], np.ndarray]
PROVIDERS = {  # of ONNX Runtime, by device; without its option it would multiply fp32 in TF32
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
}


class Plain(Subject):
    """An export without our passes: guidance is a doubled batch, mixed in NumPy."""

    def __init__(self, competitor: Competitor, job: Job, folder: Path) -> None:
        super().__init__(job)
        open_file = {"onnxruntime": _onnxruntime, "openvino": _openvino}[competitor.library]
        self._dit, self._decoder = (open_file(folder / name, competitor.precision, job) for name in (NETWORK, DECODER))

    def denoise(self, latents: NDArray[np.float32], t: float) -> NDArray[np.float32]:
        timesteps, labels = self.rows(t)
        rows = {"latents": np.concatenate([latents, latents]), "timesteps": timesteps, "labels": labels}
        return guided(self._dit(rows), self.job.spec.channels)

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._decoder({"latents": latents})


def _onnxruntime(path: Path, precision: str, job: Job) -> Run:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = job.threads
    if job.device == "cuda":
        ort.preload_dlls()
    session = ort.InferenceSession(path, settings, providers=[PROVIDERS[job.device]])
    if PROVIDERS[job.device][0] not in session.get_providers():
        raise UsageError(f"ONNX Runtime's provider for {job.device} does not start here")
    return lambda inputs: session.run(None, dict(inputs))[0]


def _openvino(path: Path, precision: str, job: Job) -> Run:
    import openvino

    hint = {"fp32": "f32", "bf16": "bf16"}[precision]
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": job.threads, "INFERENCE_PRECISION_HINT": hint}
    request = openvino.compile_model(path, "CPU", options).create_infer_request()
    return lambda inputs: np.array(request.infer(dict(inputs), share_inputs=True)[0], np.float32)


class Ours(Subject):
    """A bundle of ours in its own runtime."""

    def __init__(self, competitor: Competitor, job: Job, folder: Path) -> None:
        super().__init__(job)
        on_cpu: dict[str, Any] = {"threads": job.threads} if competitor.library in CPU else {}
        provider = job.device if competitor.library == "onnxruntime" else None
        self.pipe = Pipeline.load(folder, provider=provider, **on_cpu)
        self._times = plan(job.process, SOLVER, job.steps)
        self._null = np.array([job.spec.null_label])
        self._warm = False
        self._condition(self._times)  # as runs ask for it: what is compiled for a shape is compiled for this one
        self._inputs = self._condition(np.array([TIMESTEP]))

    def _condition(self, times: NDArray[np.float64]) -> StepInputs:
        """Return what the denoiser reads at every step of a run, after each has been made once."""
        weights = np.full(len(self.labels), GUIDANCE, np.float32)
        inputs = self.pipe.engines.inputs(times, {"labels": self.labels}, {"labels": self._null}, weights)
        for step in range(len(times)):
            inputs(step, slice(None))
        return inputs

    def denoise(self, latents: NDArray[np.float32], t: float) -> NDArray[np.float32]:
        return self.pipe.engines.denoise(latents, self._inputs, 0)[0]

    def step(self) -> float:
        """A step, and its share of the conditioner, which runs once for all steps."""
        began = time.perf_counter()
        self._condition(self._times)
        return (time.perf_counter() - began) / self.job.steps + super().step()

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.pipe.engines.decode(latents)

    def with_preset(self, name: str) -> dict[str, float]:
        """Seconds of a picture with one of the bundle's presets, and of its decoding; and its rows of the network."""
        if not self._warm:  # rows without guidance, which no step alone has asked for
            warm(self.pipe.engines, [len(self.labels)])
            self._warm = True
        began = time.perf_counter()
        run = self.pipe.run(Request(self.labels.tolist(), seed=SEED, preset=name, output="latents"))
        latents = run.result()
        sampled = time.perf_counter()
        to_uint8(self.decode(latents))
        ended = time.perf_counter()
        return {name: ended - began, f"{name} decode": ended - sampled, f"{name} rows": run.rows}

    def sample(self) -> NDArray[np.float32]:
        options: dict[str, Any] = {"steps": self.job.steps, "guidance": GUIDANCE, "seed": SEED, "solver": SOLVER}
        return self.pipe.sample(self.labels.tolist(), **options, output="latents")

"""Timed tasks that a worker gives a competitor: a guided step, a decoded picture, and a whole run of both."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from dit_export.bench.competitors import Job
from dit_runtime.images import to_uint8
from dit_runtime.sampling.noise import Noise, draw
from dit_runtime.sampling.solvers import solve

GUIDANCE, SEED, SOLVER = 4.0, 0, "dpm++"  # the solver that diffusers' examples take for its 25 steps
TIMESTEP = 500.0  # of the steps that are timed alone
FILL = 1.0  # seconds of steps in a row, at least, to a sample


class Subject(ABC):
    """A competitor with its files open; a kind gives `denoise` and `decode`, and more where it has its own loop."""

    def __init__(self, job: Job) -> None:
        spec = job.spec
        self.job = job
        self.labels = np.arange(1, job.batch + 1, dtype=np.int64) * 207 % spec.num_classes
        self.latents = Noise(SEED).normal((job.batch, *spec.latent_shape))

    @abstractmethod
    def denoise(self, latents: NDArray[np.float32], t: float) -> NDArray[np.float32]:
        """[B, C, H, W] -> the guided prediction, [B, C, H, W]."""

    @abstractmethod
    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """[B, C, H, W] -> [B, 3, 8H, 8W] in [0, 1]."""

    def prediction(self) -> NDArray[np.float32]:
        return self.denoise(self.latents, TIMESTEP)

    def step(self) -> float:
        return in_a_row(self.prediction)

    def decoding(self) -> float:
        began = time.perf_counter()
        to_uint8(self.decode(self.latents))
        return time.perf_counter() - began

    def image(self) -> dict[str, float]:
        """Seconds of a whole run, and of its decoding."""
        began = time.perf_counter()
        latents = self.sample()
        sampled = time.perf_counter()
        to_uint8(self.decode(latents))
        ended = time.perf_counter()
        return {"image": ended - began, "decode": ended - sampled}

    def sample(self) -> NDArray[np.float32]:
        job = self.job
        run = solve(job.process, SOLVER, job.steps, self.latents, draw(SEED, job.batch))
        state, t = next(run)
        for _ in range(job.steps):
            try:
                state, t = run.send((self.denoise(state.astype(np.float32), t), None))
            except StopIteration as end:
                state = end.value
        return state.astype(np.float32)

    def rows(self, t: float) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Timesteps and labels of a doubled batch: the labels' rows, then the null label's."""
        null = np.full_like(self.labels, self.job.spec.null_label)
        return np.full(2 * len(null), t, np.float32), np.concatenate([self.labels, null])


def in_a_row(step: Callable[[], object]) -> float:
    """Seconds of a step among others, as in a run: the mean of some in a row, the first of them not counted."""
    seconds: list[float] = []
    while sum(seconds) < FILL:
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return fmean(seconds[1:] or seconds)


def guided(rows: NDArray[np.float32], channels: int) -> NDArray[np.float32]:
    """Return null + w (label − null) of a doubled batch of predictions."""
    first, last = np.split(rows[:, :channels], 2)
    return last + np.float32(GUIDANCE) * (first - last)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

"""The competitors that run PyTorch: eager, torch.compile, and diffusers' own pipeline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DiTPipeline
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from dit_export.bench.competitors import Competitor, Job
from dit_export.bench.subject import GUIDANCE, SEED, Subject
from dit_export.checkpoints.synthetic import SD_VAE
from dit_export.networks.codec import Decoder
from dit_export.networks.dit import DiT

Network = TypeVar("Network", bound=nn.Module)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Guided(nn.Module):
    """Classifier-free guidance as a doubled batch around the network."""

    def __init__(self, model: DiT, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        for embedder in model.embedders:  # the waves of t are float32; the MLP that reads them may be narrower
            embedder.get_submodule("time").register_forward_pre_hook(lambda _, inputs: inputs[0].to(dtype))

    def forward(self, latents: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        rows = self.model(latents.to(self.dtype).repeat(2, 1, 1, 1), timesteps, labels)
        first, last = rows[:, : latents.shape[1]].chunk(2)
        return (last + GUIDANCE * (first - last)).float()


class Eager(Subject):
    def __init__(self, competitor: Competitor, job: Job, folder: Path) -> None:
        super().__init__(job)
        prepare(job)
        self.dtype = DTYPES[competitor.precision]
        with torch.device("meta"):
            model, vae = DiT(job.spec), AutoencoderKL(**(job.vae or SD_VAE))
        network = Guided(filled(model, folder / "dit.safetensors", self.dtype), self.dtype)
        self.network: Any = network.to(job.device)
        self.decoder: Any = filled(Decoder(vae), folder / "decoder.safetensors", self.dtype).to(job.device)

    def denoise(self, latents: NDArray[np.float32], t: float) -> NDArray[np.float32]:
        timesteps, labels = self.rows(t)
        inputs = (torch.from_numpy(array).to(self.job.device) for array in (latents, timesteps, labels))
        return np.asarray(self.network(*inputs).cpu().numpy())

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        inputs = torch.from_numpy(latents).to(self.job.device, self.dtype)
        return np.asarray(self.decoder(inputs).float().cpu().numpy())


class Compiled(Eager):
    def __init__(self, competitor: Competitor, job: Job, folder: Path) -> None:
        super().__init__(competitor, job, folder)
        mode = "default" if job.device == "cpu" else "max-autotune"  # which tunes and records for GPUs
        self.network = torch.compile(self.network, dynamic=False, mode=mode)
        self.decoder = torch.compile(self.decoder, dynamic=False, mode=mode)


class Diffusers(Subject):
    """DiTPipeline as its documentation calls it; a step alone is what its loop does between two scheduler steps."""

    def __init__(self, competitor: Competitor, job: Job, folder: Path) -> None:
        super().__init__(job)
        prepare(job)
        self.pipe = DiTPipeline.from_pretrained(folder, torch_dtype=DTYPES[competitor.precision])
        self.pipe.set_progress_bar_config(disable=True)

    def denoise(self, latents: NDArray[np.float32], t: float) -> NDArray[np.float32]:
        timesteps, labels = (torch.from_numpy(array) for array in self.rows(t))
        rows = torch.from_numpy(latents).to(self.pipe.transformer.dtype).repeat(2, 1, 1, 1)
        out = self.pipe.transformer(rows, timestep=timesteps.long(), class_labels=labels).sample
        first, last = out[:, : latents.shape[1]].chunk(2)
        return np.asarray((last + GUIDANCE * (first - last)).float().numpy())

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        vae = self.pipe.vae
        pictures = vae.decode(torch.from_numpy(latents).to(vae.dtype) / vae.config.scaling_factor).sample
        return np.asarray((pictures / 2 + 0.5).clamp(0, 1).float().numpy())

    def image(self) -> dict[str, float]:
        seconds = []
        decode = self.pipe.vae.decode

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = decode(*arguments, **options)
            seconds.append(time.perf_counter() - began)
            return result

        self.pipe.vae.decode = timed
        began = time.perf_counter()
        self.pipe(
            class_labels=self.labels.tolist(),
            guidance_scale=GUIDANCE,
            generator=torch.Generator("cpu").manual_seed(SEED),
            num_inference_steps=self.job.steps,
        )
        ended = time.perf_counter()
        self.pipe.vae.decode = decode
        return {"image": ended - began, "decode": sum(seconds)}


def prepare(job: Job) -> None:
    torch.set_num_threads(job.threads)
    torch.set_grad_enabled(False)


def filled(module: Network, path: Path, dtype: torch.dtype) -> Network:
    """The module with its weights, converted tensor by tensor, so that they stand in memory once."""
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)

"""The competitors that run PyTorch: eager, in a CUDA graph, compiled in three ways, and diffusers' own pipeline.

diffusers is imported only where a decoder or its pipeline is opened: a machine without it can time the networks.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from dit_export.bench.competitors import Competitor, Job
from dit_export.bench.subject import GUIDANCE, SEED, SOLVER, Subject
from dit_export.networks.dit import DiT
from dit_runtime.sampling.solvers import linear, plan

Network = TypeVar("Network", bound=nn.Module)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIT, DECODER = "dit.safetensors", "decoder.safetensors"
WARM_UPS = 3  # runs of eager code before it is captured, as PyTorch's documentation has it


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
    """The network and, where its weights are in the folder, the decoder; the loop stays on the device."""

    def __init__(self, competitor: Competitor, job: Job, folder: Path) -> None:
        super().__init__(job)
        prepare(job)
        self.dtype = DTYPES[competitor.precision]
        with torch.device("meta"):
            model = DiT(job.spec)
        network = Guided(filled(model, folder / DIT, self.dtype), self.dtype)
        self.network: Any = network.to(job.device)
        self.decoder: Any = _decoder(job, folder / DECODER, self.dtype) if (folder / DECODER).is_file() else None

    def inputs(self, latents: NDArray[np.float32], t: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the network reads, on the device."""
        latents_there, timesteps, labels = (
            torch.from_numpy(array).to(self.job.device) for array in (latents, *self.rows(t))
        )
        return latents_there, timesteps, labels

    def denoise(self, latents: NDArray[np.float32], t: float) -> NDArray[np.float32]:
        return np.asarray(self.network(*self.inputs(latents, t)).cpu().numpy())

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        inputs = torch.from_numpy(latents).to(self.job.device, self.dtype)
        return np.asarray(self.decoder(inputs).float().cpu().numpy())

    def sample(self) -> NDArray[np.float32]:
        """Go the solver's steps as matrices, as our own loop does on a GPU: nothing comes home before the end."""
        job = self.job
        matrices = linear(job.process, SOLVER, job.steps)
        if matrices is None:
            raise ValueError(f"{SOLVER} has no matrices for this process")
        weights = torch.from_numpy(matrices.astype(np.float32)).to(job.device)  # (steps, 2, 3)
        x, _, labels = self.inputs(self.latents, 0.0)
        times = torch.from_numpy(plan(job.process, SOLVER, job.steps).astype(np.float32)).to(job.device)
        previous = torch.zeros_like(x)
        for step in range(job.steps):
            prediction = self.network(x, times[step].expand(len(labels)), labels)
            previous, x = torch.einsum("ij,jbchw->ibchw", weights[step], torch.stack([x, prediction, previous]))
        return np.asarray(x.cpu().numpy())


class Graphed(Eager):
    """Eager code in a CUDA graph: its launches are captured once, and Python launches nothing in a step."""

    def __init__(self, competitor: Competitor, job: Job, folder: Path) -> None:
        super().__init__(competitor, job, folder)
        held = tuple(part.clone() for part in self.inputs(self.latents, 0.0))
        self.network = _captured(self.network, held)


class Compiled(Eager):
    """torch.compile; on a GPU it records CUDA graphs."""

    def __init__(self, competitor: Competitor, job: Job, folder: Path) -> None:
        super().__init__(competitor, job, folder)
        tuned = {"compile": "reduce-overhead", "autotune": "max-autotune"}[competitor.kind]
        mode = "default" if job.device == "cpu" else tuned
        self.network = torch.compile(self.network, dynamic=False, mode=mode)
        if self.decoder is not None:
            self.decoder = torch.compile(self.decoder, dynamic=False, mode=mode)


class AheadOfTime(Eager):
    """AOTInductor: the exported network compiled into a package; its work is captured on a GPU."""

    def __init__(self, competitor: Competitor, job: Job, folder: Path) -> None:
        super().__init__(competitor, job, folder)
        held = tuple(part.clone() for part in self.inputs(self.latents, 0.0))
        package = self._packaged(self.network, held, folder, competitor.name)
        self.network = package if job.device == "cpu" else _captured(package, held)
        if self.decoder is not None:
            latents = torch.from_numpy(self.latents).to(job.device, self.dtype)
            self.decoder = self._packaged(self.decoder, (latents,), folder, f"{competitor.name}-decoder")

    def _packaged(self, module: nn.Module, inputs: tuple[Tensor, ...], folder: Path, name: str) -> Any:
        from torch._inductor import aoti_compile_and_package, aoti_load_package

        path = folder.parent / "caches" / f"{name}.pt2"  # beside what other compilers write, not among our files
        path.parent.mkdir(exist_ok=True)
        options = {} if self.job.device == "cpu" else {"max_autotune": True}
        program = torch.export.export(module, inputs)
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
        # Alone in its process, and captured: a lock inside the package would be held while CUDA records.
        return aoti_load_package(str(path), run_single_threaded=True)


class Diffusers(Subject):
    """DiTPipeline as its documentation calls it; a step alone is what its loop does between two scheduler steps."""

    def __init__(self, competitor: Competitor, job: Job, folder: Path) -> None:
        super().__init__(job)
        from diffusers import DiTPipeline

        prepare(job)
        self.pipe: Any = DiTPipeline.from_pretrained(folder, torch_dtype=DTYPES[competitor.precision])
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
    exact_fp32()


def exact_fp32() -> None:
    """Turn TF32 off in matrix products and in convolutions, where PyTorch leaves it on: "fp32" means fp32 here."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _decoder(job: Job, path: Path, dtype: torch.dtype) -> nn.Module:
    from diffusers import AutoencoderKL

    from dit_export.checkpoints.synthetic import SD_VAE
    from dit_export.networks.codec import make_decoder

    with torch.device("meta"):
        vae = AutoencoderKL(**(job.vae or SD_VAE))
    return filled(make_decoder(vae), path, dtype).to(job.device)


def _captured(network: Any, held: tuple[Tensor, ...]) -> Any:
    """Return a function that copies its inputs into `held` and replays what the network launched on them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            network(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = network(*held)

    def replay(*inputs: Tensor) -> Tensor:
        for place, values in zip(held, inputs, strict=True):
            place.copy_(values)
        graph.replay()
        return output

    return replay


def filled(module: Network, path: Path, dtype: torch.dtype) -> Network:
    """The module with its weights, converted tensor by tensor, so that they stand in memory once."""
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)

"""The files that contenders open, all with the same random weights. It is a process, so no contender has its memory."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from safetensors.torch import save_file

from dit_export.bench.competitors import Competitor, Job, choose
from dit_export.bundle.scratch import build_scratch_bundle
from dit_export.bundle.tracing import trace_graphs
from dit_export.checkpoints import Loaded, keys
from dit_export.checkpoints.synthetic import SD_VAE, synthetic_dit, synthetic_vae
from dit_export.graph import DECODER, NETWORK
from dit_export.networks.codec import make_decoder
from dit_export.networks.dit import DiT, dit_network
from dit_export.recipe import Recipe
from dit_runtime import backends
from dit_runtime.backends import Options, ort, ort_cuda
from dit_runtime.bundle import manifest
from dit_runtime.bundle.compiling import compile_stages
from dit_runtime.console import guarded
from dit_runtime.errors import GateError, UsageError
from dit_runtime.progress import Progress

WEIGHTS_SEED = 0


def prepare(folder: Path, job: Job, competitors: Sequence[Competitor], progress: Progress) -> dict[str, str]:
    """Fills the competitors' folders; names those that cannot be built here, with the reason."""
    torch.set_num_threads(job.threads)
    with progress.stage("weights"):
        model, vae = synthetic_dit(job.spec, WEIGHTS_SEED), synthetic_vae(WEIGHTS_SEED, job.vae or SD_VAE)
    loaded = Loaded(dit_network(model), vae, (), job.process, {"kind": "synthetic", "seed": WEIGHTS_SEED})
    decoder = make_decoder(vae)
    (folder / "weights").mkdir()
    save_file(model.state_dict(), folder / "weights" / "dit.safetensors")
    save_file(decoder.state_dict(), folder / "weights" / "decoder.safetensors")
    kinds = {competitor.kind for competitor in competitors}
    if "diffusers" in kinds:
        with progress.stage("DiTPipeline's folder"):
            _save_pipeline(folder / "diffusers", model, vae)
    left_out = {}
    if kinds & {"plain", "ours"}:
        traced = folder / "plain"
        trace_graphs(traced, loaded, decoder, progress)
        for ours in (competitor for competitor in competitors if competitor.kind == "ours"):
            if reason := _why_unavailable(ours.library, job.device):  # before minutes of compiling for nothing
                left_out[ours.name] = reason
                continue
            recipe = Recipe(precision=ours.precision, backend=ours.library, max_batch=job.batch)
            try:
                contract = build_scratch_bundle(folder / ours.folder, loaded, decoder, recipe, progress, traced)
                contract = compile_stages(folder / ours.folder, contract, ours.library, Options(), progress)
                manifest.write(folder / ours.folder, replace(contract, presets=job.presets))
            except (UsageError, GateError) as error:
                left_out[ours.name] = str(error)
                shutil.rmtree(folder / ours.folder, ignore_errors=True)
        _fix_rows(traced / NETWORK, 2 * job.batch)
        _fix_rows(traced / DECODER, job.batch)
    return left_out


def _why_unavailable(library: str, device: str) -> str | None:
    if library == "onnxruntime" and device == "cuda" and (reason := ort_cuda.why_without(ort.load())):
        return f"provider {device!r} {reason}"
    return backends.backend(library).why_unavailable()


def _save_pipeline(folder: Path, model: DiT, vae: object) -> None:
    spec = model.spec
    with torch.device("meta"):
        transformer = DiTTransformer2DModel(
            num_attention_heads=spec.heads,
            attention_head_dim=spec.hidden // spec.heads,
            in_channels=spec.channels,
            out_channels=spec.out_channels,
            num_layers=spec.depth,
            sample_size=spec.latent_size,
            patch_size=spec.patch,
            num_embeds_ada_norm=spec.num_classes,
            norm_eps=spec.norm2_eps,
        )
    state = keys.write(model, keys.DIFFUSERS) | {"pos_embed.pos_embed": model.positions}
    missing, unknown = transformer.load_state_dict(state, strict=False, assign=True)
    assert not {*missing} - {"pos_embed.pos_embed"} and {*unknown} <= {"pos_embed.pos_embed"}
    DiTPipeline(transformer, vae, DPMSolverMultistepScheduler()).save_pretrained(folder)


def _fix_rows(path: Path, rows: int) -> None:
    """Static shapes, for the backends that gain by them; the weights beside the graph stay as they are."""
    model = onnx.load(path, load_external_data=False)
    for tensor in [*model.graph.input, *model.graph.output]:
        tensor.type.tensor_type.shape.dim[0].dim_value = rows
    del model.graph.value_info[:]
    onnx.save(model, path)


def main(arguments: Sequence[str]) -> int:
    folder, names = Path(arguments[0]), arguments[1:]
    job = Job.read(folder)
    print(json.dumps(prepare(folder, job, choose(names, job.device), Progress())))
    return 0


if __name__ == "__main__":
    sys.exit(guarded("dit-export bench", main))

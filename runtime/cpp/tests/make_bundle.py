"""Writes a bundle of three tiny hand-made graphs, whole in every respect, without PyTorch: `make_bundle.py FOLDER`."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dit_runtime import manifest, replay
from dit_runtime.manifest import Graph, Manifest, TensorSpec
from dit_runtime.pipeline import Pipeline
from dit_runtime.schedule import Diffusion, Sampler
from dit_runtime.solvers import plan

CLASSES, VECTORS, WIDTH = 5, 2, 8
LATENT = (2, 4, 4)
LABELS = ("ant", "bee, honey bee", "cat", "dog, hound", "elk")
STEPS, BATCH, MAX_BATCH = 4, 2, 3


def graphs() -> dict[str, tuple[Graph, list]]:
    """Each graph's contract and its nodes: (op, inputs, outputs, attributes) or (name, weight)."""
    random = np.random.default_rng(0)
    latents = TensorSpec("latents", "float32", ("batch", *LATENT))
    conditioning = TensorSpec("conditioning", "float32", ("pairs", VECTORS, WIDTH))
    conditioner = [
        ("table", random.standard_normal((CLASSES + 1, VECTORS, WIDTH)).astype(np.float32)),
        ("direction", (0.001 * random.standard_normal((VECTORS, WIDTH))).astype(np.float32)),
        ("axes", np.array([1, 2])),
        ("Gather", ["table", "labels"], ["rows"], {"axis": 0}),
        ("Unsqueeze", ["timesteps", "axes"], ["times"], {}),
        ("Mul", ["times", "direction"], ["moved"], {}),
        ("Add", ["rows", "moved"], ["conditioning"], {}),
    ]
    denoiser = [
        ("mixed", (random.standard_normal((WIDTH, int(np.prod(LATENT)))) / 3).astype(np.float32)),
        ("shape", np.array([0, 0, *LATENT])),
        ("wide", np.array([1, 2, 3])),
        *((name, np.array(value)) for name, value in (("zero", 0), ("one", 1), ("minus", -1))),
        ("Gather", ["conditioning", "zero"], ["gains"], {"axis": 2}),
        ("Gather", ["conditioning", "one"], ["shifts"], {"axis": 2}),
        ("MatMul", ["gains", "mixed"], ["gain"], {}),
        ("MatMul", ["shifts", "mixed"], ["shift"], {}),
        ("Reshape", ["gain", "shape"], ["gain_map"], {}),
        ("Reshape", ["shift", "shape"], ["shift_map"], {}),
        ("Mul", ["latents", "gain_map"], ["scaled"], {}),
        ("Add", ["scaled", "shift_map"], ["moved"], {}),
        ("Tanh", ["moved"], ["each"], {}),
        ("Gather", ["each", "zero"], ["first"], {"axis": 0}),
        ("Gather", ["each", "minus"], ["last"], {"axis": 0}),
        ("Unsqueeze", ["guidance", "wide"], ["weight"], {}),
        ("Sub", ["first", "last"], ["apart"], {}),
        ("Mul", ["weight", "apart"], ["pushed"], {}),
        ("Add", ["last", "pushed"], ["prediction"], {}),
        ("Sin", ["first"], ["variance"], {}),
    ]
    decoder = [
        ("colours", random.standard_normal((3, LATENT[0], 1, 1)).astype(np.float32)),
        ("scales", np.array([1, 1, 8, 8], np.float32)),
        ("Conv", ["latents", "colours"], ["small"], {}),
        ("Sigmoid", ["small"], ["levels"], {}),
        ("Resize", ["levels", "", "scales"], ["images"], {"mode": "nearest"}),
    ]
    pairs = (TensorSpec("timesteps", "float32", ("pairs",)), TensorSpec("labels", "int64", ("pairs",)))
    rest = (
        TensorSpec("conditioning", "float32", ("groups", "batch", VECTORS, WIDTH)),
        TensorSpec("guidance", "float32", ("batch",)),
    )
    said = tuple(TensorSpec(name, "float32", latents.shape) for name in ("prediction", "variance"))
    pictures = TensorSpec("images", "float32", ("batch", 3, 8 * LATENT[1], 8 * LATENT[2]))
    return {
        "conditioner": (Graph("conditioner.onnx", pairs, (conditioning,), MAX_BATCH), conditioner),
        "denoiser": (Graph("denoiser.onnx", (latents, *rest), said, MAX_BATCH), denoiser),
        "decoder": (Graph("decoder.onnx", (latents,), (pictures,), MAX_BATCH), decoder),
    }


def save(folder: Path, name: str, graph: Graph, parts: list) -> None:
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    nodes = [helper.make_node(part[0], part[1], part[2], **part[3]) for part in parts if len(part) == 4]
    weights = [numpy_helper.from_array(np.asarray(part[1]), part[0]) for part in parts if len(part) == 2]
    inputs, outputs = (
        [helper.make_tensor_value_info(spec.name, kinds[spec.dtype], spec.shape) for spec in specs]
        for specs in (graph.inputs, graph.outputs)
    )
    model = helper.make_model(
        helper.make_graph(nodes, name, inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    onnx.save(model, folder / graph.onnx, save_as_external_data=True, location=graph.onnx + ".data", size_threshold=128)
    (folder / (graph.onnx + ".data")).touch()


def reference(folder: Path, contract: Manifest) -> None:
    """reference.npz, with this runtime in PyTorch's place."""
    labels, seeds = [1, 3], [11, 12]
    guidance = np.array([4.0, 2.0], np.float32)
    times = plan(contract.diffusion, contract.diffusion.sampler.solver, STEPS)
    with Pipeline.load(folder, threads=1) as pipe:
        seen = [pipe.sample(labels, steps=STEPS, seed=seeds, guidance=guidance, output="latents")]
        run = {"prediction": [], "variance": [], "conditional": [], "null": []}
        states: list[np.ndarray] = []
        denoise = pipe.denoise

        def record(latents, conditioning, weights, _context):
            states.append(latents.astype(np.float32))
            result = denoise(latents, conditioning, weights)
            run["prediction"].append(result[0])
            run["variance"].append(result[1])
            run["conditional"].append(denoise(latents, conditioning[:1], weights)[0])
            run["null"].append(denoise(latents, conditioning[1:], weights)[0])
            return result

        pipe.denoise = record  # type: ignore[method-assign]
        images = pipe.sample(labels, steps=STEPS, seed=seeds, guidance=guidance)
        prints = replay.fingerprint(pipe.condition, CLASSES, times[STEPS // 2], MAX_BATCH)
    arrays = {name: np.stack(values) for name, values in run.items()}
    np.savez(
        folder / replay.REFERENCE,
        betas=contract.diffusion.betas,
        timesteps=times,
        labels=np.array(labels),
        seeds=np.array(seeds),
        guidance=guidance,
        latents=np.stack([*states, *seen]),
        fingerprint=prints,
        images=images,
        **arrays,
    )


def make(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # onnx appends to weights that are there
    folder.mkdir(parents=True)
    for name, (graph, parts) in graphs().items():
        save(folder, name, graph, parts)
    contract = Manifest(
        model={"name": "tiny", "resolution": 8 * LATENT[1]},
        latent_shape=LATENT,
        latent_scale=1.0,
        num_classes=CLASSES,
        labels=LABELS,
        guided_channels=LATENT[0],
        unguided_up_to_one=False,
        diffusion=Diffusion(sampler=Sampler(solver="ddim")),
        graphs={name: graph for name, (graph, _) in graphs().items()},
    )
    manifest.write(folder, replace(contract, files=manifest.describe_files(folder)))
    reference(folder, contract)
    manifest.write(folder, replace(contract, files=manifest.describe_files(folder)))


if __name__ == "__main__":
    make(Path(sys.argv[1]))

"""Writes a bundle of hand-made graphs, whole in every respect, without PyTorch: `make_bundle.py FOLDER [captioned]`.

Captioned, the vectors of a label are the mean of what a caption's tokens say.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dit_runtime import replay
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Graph, Manifest, TensorSpec
from dit_runtime.captions import EXAMPLES
from dit_runtime.pipeline import Pipeline
from dit_runtime.sampling.schedule import Diffusion, Sampler
from dit_runtime.sampling.solvers import plan

CLASSES, VECTORS, WIDTH = 5, 2, 8
LATENT = (2, 4, 4)
TOKENS, CHANNELS = 5, 3  # of a caption
LABELS = ("ant", "bee, honey bee", "cat", "dog, hound", "elk")
STEPS, BATCH, MAX_BATCH = 4, 2, 3


def graphs(captioned: bool) -> dict[str, tuple[Graph, list]]:
    """Each graph's contract and its nodes: (op, inputs, outputs, attributes) or (name, weight)."""
    random = np.random.default_rng(0)
    latents = TensorSpec("latents", "float32", ("batch", *LATENT))
    conditioning = TensorSpec("conditioning", "float32", ("pairs", VECTORS, WIDTH))
    conditioner = [
        ("table", random.standard_normal((CLASSES + 1, VECTORS, WIDTH)).astype(np.float32)),
        ("direction", (0.001 * random.standard_normal((VECTORS, WIDTH))).astype(np.float32)),
        ("axes", np.array([1, 2])),
        ("null", np.array([CLASSES])),
        ("one", np.array(1)),
        ("room", np.zeros(MAX_BATCH, np.float32)),  # for so many rows: ONNX Runtime refuses more
        ("Size", ["timesteps"], ["count"], {}),
        ("Sub", ["count", "one"], ["last"], {}),
        ("Gather", ["room", "last"], ["nothing"], {"axis": 0}),
        ("Gather", ["table", "null" if captioned else "labels"], ["rows"], {"axis": 0}),
        ("Unsqueeze", ["timesteps", "axes"], ["times"], {}),
        ("Mul", ["times", "direction"], ["moved"], {}),
        ("Add", ["rows", "moved"], ["all"], {}),
        ("Add", ["all", "nothing"], ["conditioning"], {}),
    ]
    context = [
        ("words", random.standard_normal((CHANNELS, WIDTH)).astype(np.float32)),
        ("nothing", np.array(1e4, np.float32)),
        ("MatMul", ["captions", "words"], ["context"], {}),
        ("Mul", ["mask", "nothing"], ["present"], {}),
        ("Sub", ["present", "nothing"], ["context_mask"], {}),
    ]
    said_by_captions = [
        ("row", np.array([2])),
        ("Softmax", ["context_mask"], ["shares"], {"axis": -1}),
        ("Unsqueeze", ["shares", "row"], ["weights"], {}),
        ("MatMul", ["weights", "context"], ["mean"], {}),
        ("Add", ["conditioning", "mean"], ["told"], {}),
    ]
    denoiser = [
        ("mixed", (random.standard_normal((WIDTH, int(np.prod(LATENT)))) / 3).astype(np.float32)),
        ("shape", np.array([0, 0, *LATENT])),
        ("wide", np.array([1, 2, 3])),
        *((name, np.array(value)) for name, value in (("zero", 0), ("one", 1), ("minus", -1))),
        *(said_by_captions if captioned else []),
        ("Gather", ["told" if captioned else "conditioning", "zero"], ["gains"], {"axis": 2}),
        ("Gather", ["told" if captioned else "conditioning", "one"], ["shifts"], {"axis": 2}),
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
    captions = (("captions", (TOKENS, CHANNELS)), ("mask", (TOKENS,)))
    read = (("context", (TOKENS, WIDTH)), ("context_mask", (TOKENS,))) if captioned else ()
    pairs = (TensorSpec("timesteps", "float32", ("pairs",)), TensorSpec("labels", "int64", ("pairs",)))
    rest = (
        TensorSpec("conditioning", "float32", ("groups", "batch", VECTORS, WIDTH)),
        *(TensorSpec(name, "float32", ("groups", "batch", *row)) for name, row in read),
        TensorSpec("guidance", "float32", ("batch",)),
    )
    said = tuple(TensorSpec(name, "float32", latents.shape) for name in ("prediction", "variance"))
    pictures = TensorSpec("images", "float32", ("batch", 3, 8 * LATENT[1], 8 * LATENT[2]))
    of_captions = [tuple(TensorSpec(name, "float32", ("n", *row)) for name, row in ends) for ends in (captions, read)]
    return {
        "conditioner": (
            Graph("conditioner.onnx", pairs[: 1 if captioned else 2], (conditioning,), MAX_BATCH),
            conditioner,
        ),
        **({"context": (Graph("context.onnx", *of_captions, MAX_BATCH), context)} if captioned else {}),
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
        engine = pipe._engines["denoiser"]

        def record(inputs):
            answer = engine.run(inputs)
            states.append(inputs["latents"])
            for name in ("prediction", "variance"):
                run[name].append(answer[name])
            for name, rows in (("conditional", slice(1)), ("null", slice(1, 2))):
                some = {part: inputs[part][rows] for part in inputs if part.startswith("con")}  # conditioning, context
                run[name].append(engine.run({**inputs, **some})["prediction"])
            return answer

        pipe._engines["denoiser"] = SimpleNamespace(run=record, close=engine.close)
        images = pipe.sample(labels, steps=STEPS, seed=seeds, guidance=guidance)
        prints = replay.fingerprint(replay.hoisted(pipe), contract.num_classes, times[STEPS // 2], MAX_BATCH)
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


def make(folder: Path, captioned: bool = False) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # onnx appends to weights that are there
    folder.mkdir(parents=True)
    made = graphs(captioned)
    for name, (graph, parts) in made.items():
        save(folder, name, graph, parts)
    contract = Manifest(
        model={"name": "tiny", "resolution": 8 * LATENT[1]},
        latent_shape=LATENT,
        latent_scale=1.0,
        num_classes=EXAMPLES if captioned else CLASSES,
        labels=() if captioned else LABELS,
        guided_channels=LATENT[0],
        unguided_up_to_one=False,
        diffusion=Diffusion(sampler=Sampler(solver="ddim")),
        graphs={name: graph for name, (graph, _) in made.items()},
    )
    manifest.write(folder, replace(contract, files=manifest.describe_files(folder)))
    reference(folder, contract)
    manifest.write(folder, replace(contract, files=manifest.describe_files(folder)))


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2:] == ["captioned"])

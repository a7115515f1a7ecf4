"""Writes a bundle of hand-made graphs, whole in every respect, without PyTorch: `make_bundle.py FOLDER [KIND]`.

labels: 5 classes, a learned variance, a decoder;  captioned: captions with a mask, and no null;
pictured: as labels, with an encoder;  enlarged: an encoder, whose latents are the only condition;
wave: a state of rank 1, two conditions of different widths, and stages that read what others give;
video: a state of rank 4, labels without names and a number, and a decoder of frames, of which the reference has some;
free: no condition at all, and no guidance;
prompted: two tokenizers, and a stage that makes three of the four condition ports of their ids;
sizes: as labels, with a second size that has graphs of its own;
embedded: a port takes the weight of guidance, with defaults of the bundle's own.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from bundle_graphs import Maker
from bundle_kinds import KINDS
from bundle_ports import CLASSES, NULL, PORTS, PROMPTS
from numpy.typing import NDArray

from dit_runtime import images
from dit_runtime.bundle import manifest
from dit_runtime.sampling.noise import Noise, draw
from dit_runtime.sampling.process import Process, Sampler
from dit_runtime.sampling.solvers import plan
from dit_runtime.verify.prompts import save as save_prompts

NAMES = ("ant", "bee, honey bee", "cat", "dog, hound", "elk")
STEPS, SEEDS = 4, (11, 12)
WEIGHTS = (4.0, 2.0)  # of guidance, one per seed
# Of "labels".
PRESET = {"steps": 3, "guidance": 2.0, "solver": "dpm++", "spacing": "trailing", "eta": 0.0}
LEAN = {
    **{"steps": 6, "guidance_interval": [0.3, 0.9], "guidance_policy": "rescale guidance_rescale=0.5"},
    **{"cache": "taylorseer", "cache_interval": 2, "max_order": 0, "disable_cache_before_step": 2},
    **{"disable_cache_after_step": -1},
}
GUIDANCE_PORT = {"embedded": "strength"}
BEFORE = ("condition", "time", "time+condition")  # the loop
DIFFUSION = Process(sampler=Sampler(solver="ddim"))
Rows = dict[str, NDArray[Any]]


class Graphs:
    """The bundle's graphs in ONNX Runtime, a row at a time where a stage takes few."""

    def __init__(self, folder: Path, table: dict[str, Any], suffix: str) -> None:
        self.stages = {stage["name"].removesuffix(suffix): stage for stage in table["stages"]}
        self.sessions = {
            name: onnxruntime.InferenceSession(folder / stage["onnx"]) for name, stage in self.stages.items()
        }
        self.ports = {port["role"]: port["name"] for port in table["ports"]}
        self.conditions = [port for port in table["ports"] if port["role"] == "condition"]
        self.reads = [spec["name"] for spec in self.stages["denoiser"]["reads"]]
        self.guided = "guidance" in self.reads

    def run(self, name: str, inputs: Rows) -> Rows:
        names = [spec["name"] for spec in self.stages[name]["reads"]]
        answers = self.sessions[name].run(None, {read: inputs[read] for read in names})
        return dict(zip([spec["name"] for spec in self.stages[name]["gives"]], answers, strict=True))

    def before(self, t: float, condition: Rows, rows: int) -> Rows:
        """Return what the step may read, row by row: ports, and all outputs of stages before the loop."""
        values_by_row: list[Rows] = []
        for row in range(rows):
            values = {name: array[row : row + 1] for name, array in condition.items()}
            values[self.ports["time"]] = np.array([t], np.float32)
            for name, stage in self.stages.items():
                if stage["runs"] in BEFORE:
                    values |= self.run(name, values)
            values_by_row.append(values)
        return {name: np.concatenate([values[name] for values in values_by_row]) for name in values_by_row[0]}

    def denoise(self, x: NDArray[np.float32], guidance: NDArray[np.float32], *groups: Rows) -> Rows:
        """Guided where there are two groups: their own, and what guidance leads away from."""
        state = self.ports["state"]
        inputs = {name: np.stack([group[name] for group in groups]) for name in set(self.reads) & set(groups[0])}
        return self.run("denoiser", inputs | {state: x, "guidance": guidance})


def prompts(kind: str, rows: int, seed: int) -> Rows:
    """Return token ids and their masks, with fewer tokens in each further row."""
    random = np.random.default_rng(seed)
    ids: Rows = {}
    for prompt in PROMPTS.get(kind, ()):
        tokens = prompt["tokens"]
        mask = np.tri(rows, tokens, tokens - rows, dtype=np.int64)[::-1]
        ids[prompt["ids"]] = random.integers(1, prompt["size"], (rows, tokens)) * mask
        if "mask" in prompt:
            ids[prompt["mask"]] = mask
    return ids


def conditions(kind: str) -> tuple[Rows, Rows]:
    """Return the reference's conditions, one per seed, and the null that guidance leads away from."""
    random = np.random.default_rng(7)
    own: Rows = {}
    null: Rows = {}
    for port in PORTS[kind]:
        if port["role"] != "condition":
            continue
        name, shape, constant = port["name"], port["shape"], NULL[kind].get(port["name"])
        if name == GUIDANCE_PORT.get(kind):
            own[name] = np.array(WEIGHTS, np.float32)
        elif port["dtype"] == "int64":
            own[name] = np.array([1, 3 % (port["size"] - 1)])
        elif port["masks"]:
            own[name] = np.tri(2, *shape, shape[0] - 2, dtype=np.float32)
        else:
            own[name] = random.standard_normal((2, *shape)).astype(np.float32)
        if constant is None and port["dtype"] == "float32" and not port["masks"]:
            null[name] = random.standard_normal((1, *shape)).astype(np.float32)
        else:
            null[name] = np.full((1, *shape), 1 if constant is None else constant, own[name].dtype)
    return own, null


def fingerprint(graphs: Graphs, t: float, own: Rows, null: Rows) -> NDArray[np.float32]:
    """Project what the step reads from stages onto a few directions. Use all values of a lone label, otherwise both the
    conditions and the null."""
    single = graphs.conditions[0] if len(graphs.conditions) == 1 else None
    if single is not None and single["size"] and not single["shape"]:
        rows = {single["name"]: np.arange(single["size"])}
    else:
        rows = {name: np.concatenate([own[name], null[name]]) for name in own}
    count = len(next(iter(rows.values()))) if rows else len(SEEDS) + 1
    made, ports = graphs.before(t, rows, count), {*graphs.ports.values(), *own, "guidance"}
    whole = np.concatenate([made[name].reshape(count, -1) for name in graphs.reads if name not in ports], axis=1)
    return (whole @ Noise(0).normal((whole.shape[1], 4)) / np.sqrt(whole.shape[1])).astype(np.float32)


def reference(folder: Path, kind: str, table: dict[str, Any], suffix: str) -> None:
    """reference.npz, with NumPy in PyTorch's place; the solver is DDIM, x' = √ᾱ' x₀ + √(1 - ᾱ') ε."""
    graphs, (own, null) = Graphs(folder, table, suffix), conditions(kind)
    times, batch = plan(DIFFUSION, "ddim", STEPS), len(SEEDS)
    guidance = np.array(WEIGHTS if graphs.guided or kind in GUIDANCE_PORT else [1.0, 1.0], np.float32)
    ids, null_ids = prompts(kind, batch, 3), prompts(kind, 1, 4)
    if ids:
        own, null = own | graphs.run("text", ids), null | graphs.run("text", null_ids)
    levels = np.cumprod(1 - DIFFUSION.betas)[times.astype(int)]
    shape = next(port["shape"] for port in PORTS[kind] if port["role"] == "state")
    x = draw(list(SEEDS), batch)((batch, *shape)).astype(np.float64)
    run: dict[str, list[Any]] = {name: [] for name in ("prediction", "variance", "conditional", "null")}
    states = [x.astype(np.float32)]
    for t, level, after in zip(times, levels, [*levels[1:], 1.0], strict=True):
        rows = graphs.before(t, own, batch)
        away = {name: np.repeat(row, batch, axis=0) for name, row in null.items()}
        negative = graphs.before(t, away, batch)
        answer = graphs.denoise(states[-1], guidance, rows, *[negative] * graphs.guided)
        for name in answer:
            run[name].append(answer[name])
        run["conditional"].append(graphs.denoise(states[-1], guidance, rows)["prediction"])
        if null:
            run["null"].append(graphs.denoise(states[-1], guidance, negative)["prediction"])
        epsilon = answer["prediction"].astype(np.float64)
        clean = (x - np.sqrt(1 - level) * epsilon) / np.sqrt(level)
        x = np.sqrt(after) * clean + np.sqrt(1 - after) * epsilon
        states.append(x.astype(np.float32))
    if ids:
        save_prompts(folder, ids, graphs.run("text", ids))
    pictures = np.empty(0, np.uint8)
    if "decoder" in graphs.stages:
        pictures = images.to_uint8(graphs.run("decoder", {graphs.ports["state"]: states[-1]})["images"])
    shown = np.array([0, 3, 4] if kind == "video" else [], np.int64)
    pictures = pictures[:, shown] if shown.size else pictures
    encoded = {}
    if "encoder" in graphs.stages:
        encoded = graphs.run("encoder", {"images": images.to_unit(pictures)})
    np.savez(
        folder / f"reference{suffix}.npz",
        betas=DIFFUSION.betas,
        timesteps=times,
        seeds=np.array(SEEDS),
        guidance=guidance,
        latents=np.stack(states),
        fingerprint=fingerprint(graphs, times[STEPS // 2], own, null),
        images=pictures,
        frames=shown,
        **{name: np.stack(values) if values else np.empty(0, np.float32) for name, values in run.items()},
        **{f"condition.{name}": array for name, array in own.items()},
        **{f"null.{name}": array for name, array in null.items()},
        **{f"encoded.{name}": array for name, array in encoded.items()},
        **{f"prompt.{name}": array for name, array in ids.items()},
        **{f"null prompt.{name}": array for name, array in null_ids.items()},
    )


def make(folder: Path, kind: str = "labels") -> None:
    shutil.rmtree(folder, ignore_errors=True)  # onnx appends to weights that are there
    folder.mkdir(parents=True)
    table = make_size(folder, kind)
    if kind == "sizes":
        (folder / "conditioner.onnx.data").unlink()  # which is the same at each size; onnx appends
        own, keys = make_size(folder, "wide", "-32x64"), ("model", "ports", "process", "stages")
        next(stage for stage in own["stages"] if stage["runs"] == "step")["shared"] = ["conditioner.onnx.data"]
        sized = {"size": "32x64", "suffix": "-32x64"} | {key: own[key] for key in keys}
        table |= {"size": "32", "sizes": [sized]}
    files = {name: asdict(file) for name, file in manifest.describe_files(folder).items()}
    (folder / manifest.NAME).write_text(json.dumps(table | {"files": files}, indent=1))


def make_size(folder: Path, kind: str, suffix: str = "") -> dict[str, Any]:
    """Write graphs and a reference; return what the manifest says of them."""
    maker = Maker(folder, kind, suffix)
    KINDS[kind](maker)
    state = maker.state["shape"]
    table: dict[str, Any] = {
        "format": 2,
        "model": {"name": "tiny", "resolution": 32},
        "ports": PORTS[kind],
        "null": NULL[kind],
        "labels": list(NAMES[:CLASSES]) if kind in ("labels", "pictured", "sizes", "wide") else [],
        "guidance": {"channels": state[0], "unguided_up_to_one": kind == "video"},
        "process": DIFFUSION.to_dict(),
        "stages": maker.stages,
        **({"prompts": PROMPTS[kind]} if kind in PROMPTS else {}),
        "source": {},
        "built_with": {},
        "parity": {},
        "presets": {"quick": {**PRESET, "measured": {"rows": 6}}, "lean": LEAN} if kind == "labels" else {},
    }
    if kind in GUIDANCE_PORT:
        table["guidance"] |= {"default": 3.5, "port": GUIDANCE_PORT[kind]}
        table["process"]["sampler"]["steps"] = 3
    reference(folder, kind, table, suffix)
    return table


if __name__ == "__main__":
    make(Path(sys.argv[1]), *sys.argv[2:])

"""The hand-made graphs of make_bundle.py, and the stages that they are in a manifest."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bundle_ports import PORTS, PROMPTS
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dit_runtime.facts import CONSTANTS

VECTORS, WIDTH = 2, 8
MAX_BATCH = 3


class Maker:
    """The stages of one kind; a node is (op, inputs, outputs, attributes), a weight is (name, values)."""

    def __init__(self, folder: Path, kind: str, suffix: str = "") -> None:
        """Make stages whose names end in `suffix`, but for those before the loop."""
        self.suffix = suffix
        self.folder, self.random, self.stages = folder, np.random.default_rng(0), list[dict[str, Any]]()
        self.guided = kind not in ("free", "embedded")
        # OpenVINO cuts the step where groups meet; in a wave, it keeps a sample's groups together.
        self.meeting = CONSTANTS["groups_meet"] if self.guided and kind != "wave" else "each"
        self.state = next(port for port in PORTS[kind] if port["role"] == "state")
        self.shapes = {port["name"]: (port["dtype"], port["shape"]) for port in PORTS[kind]}  # of a row
        for prompt in PROMPTS.get(kind, ()):
            for name in (prompt["ids"], prompt.get("mask", "")):
                self.shapes |= {name: ("int64", [prompt["tokens"]])} if name else {}

    def weight(self, *shape: int) -> NDArray[np.float32]:
        return self.random.standard_normal(shape).astype(np.float32)

    def stage(self, name: str, runs: str, reads: list[str], gives: dict[str, list[int]], *parts: tuple) -> None:
        """Before the loop: all tensors have rows."""
        self.shapes |= {output: ("float32", shape) for output, shape in gives.items()}
        self._save(
            name, runs, [self._spec(read, "rows") for read in reads], [self._spec(g, "rows") for g in gives], parts
        )

    def step(self, reads: list[str], *vectors: tuple, variance: bool = False) -> None:
        """tanh(gain · x + shift), where `vectors` gives a row's [groups, batch, 2, WIDTH]; guidance mixes it."""
        state, shape = self.state["name"], self.state["shape"]
        parts = [
            *vectors,
            ("mixed", self.weight(WIDTH, math.prod(shape)) / 3),
            ("shape", np.array([0, 0, *shape])),
            *((name, np.array(value)) for name, value in (("zero", 0), ("one", 1))),
            ("Gather", ["vectors", "zero"], ["gains"], {"axis": 2}),
            ("Gather", ["vectors", "one"], ["shifts"], {"axis": 2}),
            ("MatMul", ["gains", "mixed"], ["gain"], {}),
            ("MatMul", ["shifts", "mixed"], ["shift"], {}),
            ("Reshape", ["gain", "shape"], ["gain_map"], {}),
            ("Reshape", ["shift", "shape"], ["shift_map"], {}),
            ("Mul", [state, "gain_map"], ["scaled"], {}),
            ("Add", ["scaled", "shift_map"], ["moved"], {}),
            ("Tanh", ["moved"], [self.meeting], {}),
            ("Gather", [self.meeting, "zero"], ["first" if self.guided else "prediction"], {"axis": 0}),
        ]
        if self.guided:
            parts += [
                ("minus", np.array(-1)),
                ("wide", np.arange(1, 1 + len(shape))),
                ("Gather", [self.meeting, "minus"], ["last"], {"axis": 0}),
                ("Unsqueeze", ["guidance", "wide"], ["strength"], {}),
                ("Sub", ["first", "last"], ["apart"], {}),
                ("Mul", ["strength", "apart"], ["pushed"], {}),
                ("Add", ["last", "pushed"], ["prediction"], {}),
            ]
        if variance:
            parts.append(("Sin", ["first"], ["variance"], {}))
        gives = ["prediction", "variance"][: 1 + variance]
        guidance = [tensor("guidance", "float32", "batch")] if self.guided else []
        grouped = [self._spec(name, "groups", "batch") for name in reads]
        outputs = [tensor(name, "float32", "batch", *shape) for name in gives]
        self._save("denoiser", "step", [self._spec(state, "batch"), *grouped, *guidance], outputs, parts)

    def update(self) -> None:
        """(kept, next) = M (state, prediction, previous)."""
        state, shape = self.state["name"], self.state["shape"]
        names = [state, "prediction", "previous"]
        parts = [
            ("row", np.array([1, -1])),
            ("shape", np.array([2, -1, *shape])),
            *((name, np.array(value)) for name, value in (("zero", 0), ("one", 1))),
            *(("Reshape", [name, "row"], [f"{name}_row"], {}) for name in names),
            ("Concat", [f"{name}_row" for name in names], ["states"], {"axis": 0}),
            ("MatMul", ["coefficients", "states"], ["rows_made"], {}),
            ("Reshape", ["rows_made", "shape"], ["made"], {}),
            ("Gather", ["made", "zero"], ["kept"], {"axis": 0}),
            ("Gather", ["made", "one"], ["next"], {"axis": 0}),
        ]
        reads = [*(tensor(name, "float32", "batch", *shape) for name in names), tensor("coefficients", "float32", 2, 3)]
        gives = [tensor(name, "float32", "batch", *shape) for name in ("kept", "next")]
        self._save("update", "update", reads, gives, parts)

    def encoder(self) -> None:
        channels, height, width = self.state["shape"]
        over = {"kernel_shape": [8, 8], "strides": [8, 8]}
        parts = (
            ("means", self.weight(channels, 3, 8, 8) / 8),
            ("spreads", self.weight(channels, 3, 8, 8) / 8),
            ("low", np.array(-2, np.float32)),
            ("Conv", ["images", "means"], ["mean"], over),
            ("Conv", ["images", "spreads"], ["spread"], over),
            ("Add", ["spread", "low"], ["logvar"], {}),
        )
        pictures = tensor("images", "float32", "batch", 3, 8 * height, 8 * width)
        latents = [tensor(name, "float32", "batch", channels, height, width) for name in ("mean", "logvar")]
        self._save("encoder", "start", [pictures], latents, parts)

    def decoder(self) -> None:
        channels, *frames, height, width = self.state["shape"]  # of a video it makes two frames of each
        parts = (
            ("colours", self.weight(3, channels, *(1 for _ in frames), 1, 1)),
            ("scales", np.array([1, 1, *(2 for _ in frames), 8, 8], np.float32)),
            ("Conv", [self.state["name"], "colours"], ["small"], {}),
            ("Sigmoid", ["small"], ["levels"], {}),
            ("Resize", ["levels", "", "scales"], ["images"], {"mode": "nearest"}),
        )
        pictures = tensor("images", "float32", "batch", 3, *(2 * number for number in frames), 8 * height, 8 * width)
        self._save("decoder", "end", [self._spec(self.state["name"], "batch")], [pictures], parts)

    def _spec(self, name: str, *free: str) -> dict[str, Any]:
        dtype, row = self.shapes[name]
        return tensor(name, dtype, *free, *row)

    def _save(self, name: str, runs: str, reads: list, gives: list, parts: Any) -> None:
        kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
        nodes = [helper.make_node(part[0], part[1], part[2], **part[3]) for part in parts if len(part) == 4]
        weights = [numpy_helper.from_array(np.asarray(part[1]), part[0]) for part in parts if len(part) == 2]
        ends = [
            [helper.make_tensor_value_info(spec["name"], kinds[spec["dtype"]], spec["shape"]) for spec in specs]
            for specs in (reads, gives)
        ]
        made = helper.make_model(
            helper.make_graph(nodes, name, *ends, weights), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
        )
        name += self.suffix if runs in ("start", "step", "update", "end") else ""
        file = f"{name}.onnx"
        onnx.save(made, self.folder / file, save_as_external_data=True, location=f"{file}.data", size_threshold=128)
        (self.folder / f"{file}.data").touch()
        rest = {"max_batch": MAX_BATCH, "precision": "fp32", "backend": "onnxruntime", "engines": {}}
        self.stages.append({"name": name, "runs": runs, "reads": reads, "gives": gives, "onnx": file, **rest})


def tensor(name: str, dtype: str, *shape: int | str) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}

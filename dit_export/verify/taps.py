"""The residual sums of an ONNX graph, found by structure, and a denoiser that gives them as outputs.

A residual sum is an Add of which one term leads to the other through a product: x + branch(x). Nothing here reads a
node's name; a DiT block is two such sums, attention's and the MLP's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.helper import make_tensor_value_info, np_dtype_to_tensor_dtype

from dit_export.graph import onnxfile
from dit_runtime import backends
from dit_runtime.backends import PORTABLE_BACKEND, Engine, Options
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Stage
from dit_runtime.pipeline import Pipeline

PRODUCTS = {"MatMul", "Gemm", "Conv", "Attention", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
COPIES = {"Tile", "Expand", "Identity", "Cast"}  # x may be repeated for guidance after the branch has left it


def residual_sums(graph: gs.Graph) -> list[tuple[gs.Variable, gs.Variable]]:
    """Return (x, x + branch(x)) of every residual sum, in the order of the graph."""
    sums = []
    for node in graph.nodes:
        terms = [tensor for tensor in node.inputs if isinstance(tensor, gs.Variable)]
        if node.op == "Add" and len(terms) == 2:
            for x, branch in (terms, terms[::-1]):
                if _leads_through_a_product(original(x), branch):
                    sums.append((x, node.outputs[0]))
                    break
    return sums


def original(x: gs.Variable) -> gs.Variable:
    """Return the tensor of which x is a copy, in another type or repeated; x itself where it is none."""
    while x.inputs and x.inputs[0].op in COPIES and isinstance(x.inputs[0].inputs[0], gs.Variable):
        x = x.inputs[0].inputs[0]
    return x


def _leads_through_a_product(x: gs.Variable, branch: gs.Variable) -> bool:
    """Return whether some product lies between the two: it depends on x, and `branch` on it."""
    between: dict[int, gs.Node] = {}  # what `branch` depends on, up to x
    stack, reached = list(branch.inputs), False
    while stack:
        node = stack.pop()
        if id(node) in between:
            continue
        between[id(node)] = node
        for tensor in node.inputs:
            if tensor is x:
                reached = True
            elif isinstance(tensor, gs.Variable):
                stack += tensor.inputs
    if not reached:
        return False
    stack, after = [node for node in x.outputs if id(node) in between], set()
    while stack:
        node = stack.pop()
        if id(node) in after:
            continue
        if node.op in PRODUCTS:
            return True
        after.add(id(node))
        stack += [user for tensor in node.outputs for user in tensor.outputs if id(user) in between]
    return False


@contextmanager
def tapped(pipe: Pipeline, options: Options) -> Iterator[tuple[Engine, list[str]]]:
    """Open the denoiser in the form and on the backend that the bundle runs, with its residual stream as outputs.

    Yields the engine and the names of the stream: before the first sum, and after each.
    """
    stage = pipe.manifest.step
    form = _form(stage)
    graph = onnxfile.load(manifest.inside(pipe.folder, form))
    sums = residual_sums(graph)
    stream = [original(sums[0][0]), *(total for _, total in sums)] if sums else []
    model = onnx.load(manifest.inside(pipe.folder, form), load_external_data=False)
    names = {tensor.name for tensor in (*model.graph.output, *model.graph.input)}
    for tensor in stream:
        if tensor.name not in names:
            kind = np_dtype_to_tensor_dtype(np.dtype(tensor.dtype or np.float32))
            model.graph.output.append(make_tensor_value_info(tensor.name, kind, None))
    with tempfile.TemporaryDirectory(prefix="dit-taps-") as folder:
        onnx.save(model, Path(folder) / form)
        for name in _data(model):
            _share(manifest.inside(pipe.folder, name), Path(folder) / name)
        backend = stage.backend if form in stage.files else PORTABLE_BACKEND
        module = backends.backend(backends.choose(backend))
        engine: Engine = module.open([Path(folder) / form], replace(options, precision=stage.precision))
        try:
            yield engine, [tensor.name for tensor in stream if tensor not in graph.inputs]
        finally:
            engine.close()


def _form(stage: Stage) -> str:
    """The ONNX file that the backend opens; where it opens something else, the portable graph."""
    return next((name for name in stage.files if name.endswith(".onnx")), stage.onnx)


def _data(model: onnx.ModelProto) -> list[str]:
    """The files of its weights."""
    places = [entry.value for w in model.graph.initializer for entry in w.external_data if entry.key == "location"]
    return list(dict.fromkeys(places))


def _share(source: Path, target: Path) -> None:
    """Give the same bytes a second name, or copy them where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

"""A network's residual stream, seen after every branch: from an ONNX graph by its structure, from PyTorch by hooks.

A residual sum is an Add of which one term leads to the other through a product: x + branch(x). Nothing here knows a
node's name; a DiT block is two such sums, attention's and the MLP's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from numpy.typing import NDArray
from onnx.helper import make_tensor_value_info, np_dtype_to_tensor_dtype

from dit_export.graph import onnxfile
from dit_export.networks.dit import DiT
from dit_runtime import backends
from dit_runtime.backends import Engine, Options
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Graph
from dit_runtime.pipeline import Pipeline

PRODUCTS = {"MatMul", "Gemm", "Conv", "Attention", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
COPIES = {"Tile", "Expand", "Identity", "Cast"}  # x may be repeated for guidance after the branch has left it
BRANCHES = {2: ("attention", "MLP"), 3: ("attention", "cross-attention", "MLP")}  # by the sums of a block


def residual_sums(graph: gs.Graph) -> list[tuple[gs.Variable, gs.Variable]]:
    """(x, x + branch(x)) of every residual sum, in the order of the graph."""
    found = []
    for node in graph.nodes:
        terms = [tensor for tensor in node.inputs if isinstance(tensor, gs.Variable)]
        if node.op == "Add" and len(terms) == 2:
            for x, branch in (terms, terms[::-1]):
                if _leads_through_a_product(x, branch):
                    found.append((x, node.outputs[0]))
                    break
    return found


def _leads_through_a_product(x: gs.Variable, branch: gs.Variable) -> bool:
    """Whether some product lies between the two: it depends on x, and `branch` on it."""
    while x.inputs and x.inputs[0].op in COPIES and isinstance(x.inputs[0].inputs[0], gs.Variable):
        x = x.inputs[0].inputs[0]
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


def names(count: int, depth: int) -> list[str]:
    """Of the stream before the first sum and after each."""
    if branches := BRANCHES.get(count // max(depth, 1) if count % max(depth, 1) == 0 else 0):
        blocks = [f"block {n + 1} of {depth} (blocks.{n}), {branch}" for n in range(depth) for branch in branches]
    else:
        blocks = [f"residual sum {n + 1} of {count}" for n in range(count)]
    return ["before the first block", *blocks]


@contextmanager
def tapped(pipe: Pipeline, options: Options) -> Iterator[tuple[Engine, list[str]]]:
    """The denoiser in the very form and on the very backend that the bundle runs, giving its stream besides."""
    contract = pipe.manifest.graphs["denoiser"]
    form = _form(contract)
    graph = onnxfile.load(manifest.inside(pipe.folder, form))
    sums = residual_sums(graph)
    stream = [sums[0][0], *(total for _, total in sums)] if sums else []
    model = onnx.load(manifest.inside(pipe.folder, form), load_external_data=False)
    for tensor in stream:
        kind = np_dtype_to_tensor_dtype(np.dtype(tensor.dtype or np.float32))
        model.graph.output.append(make_tensor_value_info(tensor.name, kind, None))
    with tempfile.TemporaryDirectory(prefix="dit-taps-") as folder:
        onnx.save(model, Path(folder) / form)
        for name in _data(model):
            _share(manifest.inside(pipe.folder, name), Path(folder) / name)
        backend = contract.backend if form in contract.files else "onnxruntime"
        module = backends.backend(backends.choose(backend))
        engine: Engine = module.open([Path(folder) / form], replace(options, precision=contract.precision))
        try:
            yield engine, [tensor.name for tensor in stream]
        finally:
            engine.close()


def _form(contract: Graph) -> str:
    """The ONNX that the backend opens; where it opens something else, the portable graph."""
    return next((name for name in contract.files if name.endswith(".onnx")), contract.onnx)


def _data(model: onnx.ModelProto) -> list[str]:
    """The files of its weights."""
    places = [entry.value for w in model.graph.initializer for entry in w.external_data if entry.key == "location"]
    return list(dict.fromkeys(places))


def _share(source: Path, target: Path) -> None:
    """A second name for the same bytes, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@torch.no_grad()
def pytorch_stream(
    model: DiT, latents: NDArray[np.float32], t: float, labels: Sequence[int]
) -> tuple[list[NDArray[Any]], NDArray[Any]]:
    """The stream of rows that have the labels and of as many that have the null label, and what the network gives."""
    stream: list[NDArray[Any]] = []

    def enters(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        stream.append(inputs[0].numpy())

    def leaves(_: torch.nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        stream.append(output.numpy())

    hooks = [model.blocks[0].register_forward_pre_hook(enters)]
    for block in model.blocks:  # what follows a branch's sum is a norm, or the next block
        hooks += [block.get_submodule(name).register_forward_pre_hook(enters) for name in ("norm_cross", "norm2")]
        hooks.append(block.register_forward_hook(leaves))
    try:
        rows = torch.from_numpy(latents).repeat(2, 1, 1, 1)
        ids = torch.tensor([*labels, *[model.spec.null_label] * len(labels)])
        out = model(rows, torch.full((len(ids),), t), **model.told(ids))
    finally:
        for hook in hooks:
            hook.remove()
    return stream, out.numpy()

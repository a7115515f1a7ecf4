"""The rounding twin, which shows a typed graph's arithmetic on a CPU.

A CPU's backends compute narrow graphs in fp32, where an overflow stays a number. The twin is the typed graph in fp32
with a cast to the narrow type and back on every tensor and weight that the typed graph holds in it: so each value is
rounded, and overflows, where a GPU's would.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.helper import np_dtype_to_tensor_dtype, tensor_dtype_to_np_dtype

from dit_export.graph import onnxfile
from dit_export.graph.onnxfile import constants, layer
from dit_export.passes.attention import plain_attention
from dit_export.precision.half import TYPES, Rounded
from dit_runtime import backends
from dit_runtime.backends import PORTABLE_BACKEND, PROVIDER_FORMS, Engine, Options
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest, Stage
from dit_runtime.pipeline import Pipeline


@contextmanager
def twins(folder: Path, contract: Manifest, always: bool = False) -> Iterator[Pipeline | None]:
    """Open the bundle's portable graphs, with the twin of each half-precision graph's own form in its place.

    Yield None where no graph is in half precision, unless `always`.
    """
    types = {stage.name: backends.typed(stage.backend, stage.precision) for stage in contract.stages}
    if not (always or any(types.values())):
        yield None
        return
    module = backends.backend(backends.choose(PORTABLE_BACKEND))  # keeps explicit casts, and they overflow
    engines: dict[str, Engine] = {}
    with tempfile.TemporaryDirectory(prefix="dit-twin-") as temporary:
        for stage in contract.stages:
            files = [manifest.inside(folder, file) for file in stage.onnx_files]
            half = types[stage.name]
            form = half_form(stage) if half else stage.onnx
            graph = onnxfile.load(manifest.inside(folder, form))
            if half:
                twin(graph, tensor_dtype_to_np_dtype(TYPES[half]))
            # The portable backend refuses a mask with one row for all queries.
            if plain_attention(graph) or half:
                path = Path(temporary) / f"{stage.name}.onnx"
                files = [path.with_name(file) for file in onnxfile.save(graph, path)]
            engines[stage.name] = module.open(files, Options(streamed=stage.runs == "prompt"))
        with Pipeline(folder, contract, engines) as rounded:
            yield rounded


def half_form(stage: Stage) -> str:
    """Return the form that a provider opens which computes in the stage's precision, if it is ONNX."""
    others = (provider for name, provider in PROVIDER_FORMS.values() if name == stage.backend)
    able = [own for own in (None, *others) if not backends.refusal(stage.backend, stage.precision, own)]
    files = backends.files(stage, Options(provider=able[0]))
    return next((file for file in files if file.endswith(".onnx")), stage.onnx)


def twin(graph: gs.Graph, dtype: np.dtype) -> int:
    """Turn a half-precision graph into its twin; return how many tensors are rounded, weights included."""
    narrow_type = np_dtype_to_tensor_dtype(dtype)
    weights = [tensor for tensor in constants(graph) if tensor.values.dtype == dtype]
    for tensor in weights:
        tensor.values = Rounded(tensor.values, np.dtype(np.float32))
    body, graph.nodes, rounded = list(graph.nodes), [], len(weights)
    for node in body:
        node.name += "_exact"  # a layer has the name of what it makes, and the casts make what the node did
        graph.nodes.append(node)
        if node.op == "Cast" and node.attrs["to"] == narrow_type:
            (out,) = node.outputs
            node.outputs = [gs.Variable(f"{out.name}_rounded", dtype=dtype)]
            layer(graph, "Cast", [node.outputs[0]], out, to=onnx.TensorProto.FLOAT)
            out.dtype, rounded = np.dtype(np.float32), rounded + 1
            continue
        for index, out in enumerate(node.outputs):
            if out.dtype == dtype:
                exact = gs.Variable(f"{out.name}_exact", dtype=np.float32)
                node.outputs[index] = exact
                narrow = layer(graph, "Cast", [exact], f"{out.name}_rounded", to=narrow_type)
                layer(graph, "Cast", [narrow], out, to=onnx.TensorProto.FLOAT)
                out.dtype, rounded = np.dtype(np.float32), rounded + 1
    return rounded

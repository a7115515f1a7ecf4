"""ONNX files in and out of onnx-graphsurgeon, weights memory-mapped on the way in and streamed on the way out."""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import TensorProto
from onnx.helper import np_dtype_to_tensor_dtype, tensor_dtype_to_np_dtype
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from dit_runtime.bundle.manifest import TensorSpec
from dit_runtime.errors import UsageError

INLINE_BYTES = 1024  # smaller tensors, and all int64 (shape inference reads them), stay in the .onnx itself
ALIGNMENT = 64
PACKED: dict[int, int] = {  # values a byte of ONNX's raw data, where NumPy has one a byte
    TensorProto.INT4: 2,
    TensorProto.UINT4: 2,
    TensorProto.FLOAT4E2M1: 2,
    TensorProto.INT2: 4,
    TensorProto.UINT2: 4,
}
NUMBERS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}


def load(path: Path) -> gs.Graph:
    """Read a graph, every tensor with its type and shape; external weights become memory maps, so XL/2 costs none."""
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise UsageError(f"{path}: not an ONNX model: {error}") from None
    with _quiet():
        graph = gs.import_onnx(onnx.shape_inference.infer_shapes(model))
    if not graph.nodes:
        raise UsageError(f"{path}: holds no nodes; expected an ONNX model")
    graph.inputs = [tensor for tensor in graph.inputs if not isinstance(tensor, gs.Constant)]  # IR 3 lists weights too
    _lower_constants(graph)
    for tensor in constants(graph):
        lazy = tensor._values
        if isinstance(lazy, LazyValues) and lazy.tensor.data_location == TensorProto.EXTERNAL:
            tensor.values = _map_external(lazy.tensor, path.parent)
            tensor.data_location = None
        elif isinstance(lazy, LazyValues):
            tensor.values = onnx.numpy_helper.to_array(lazy.tensor)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and isinstance(tensor.dtype, int):
            tensor.dtype = tensor_dtype_to_np_dtype(tensor.dtype)
    return graph


def _lower_constants(graph: gs.Graph) -> None:
    """Constant nodes, which some exporters write, become what the passes look for."""
    lowered = set()  # by id: taking a node out of the list compares it with all before it
    for node in [node for node in graph.nodes if node.op == "Constant"]:
        ((kind, value),) = node.attrs.items()
        if kind == "value" or kind in NUMBERS:
            node.outputs[0].to_constant(value._values if kind == "value" else np.array(value, NUMBERS[kind]))
            node.outputs.clear()
            lowered.add(id(node))
    graph.nodes = [node for node in graph.nodes if id(node) not in lowered]


def _map_external(tensor: TensorProto, folder: Path) -> np.ndarray:
    where = {entry.key: entry.value for entry in tensor.external_data}
    file = folder / where["location"]
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{tensor.name}: external data in {where['location']!r} leaves the model's folder")
    dtype, offset = tensor_dtype_to_np_dtype(tensor.data_type), int(where.get("offset", 0))
    length = -(-math.prod(tensor.dims) // PACKED.get(tensor.data_type, 1)) * dtype.itemsize
    size, expected = file.stat().st_size, offset + length
    if size < expected:
        raise UsageError(f"{file}: {size} bytes, expected at least {expected}: a copy that broke off? copy it again")
    if tensor.data_type in PACKED:
        packed = np.fromfile(file, np.uint8, length, offset=offset).tobytes()
        return onnx.numpy_helper.to_array(TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=packed))
    return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=tuple(tensor.dims))


@contextmanager
def _quiet() -> Iterator[None]:
    """onnx-graphsurgeon warns of bf16 and fp8, which NumPy has not by itself; what it leaves undone is done here."""
    before, G_LOGGER.severity = G_LOGGER.severity, G_LOGGER.ERROR
    try:
        yield
    finally:
        G_LOGGER.severity = before


def constants(graph: gs.Graph) -> list[gs.Constant]:
    return [tensor for tensor in graph.tensors().values() if isinstance(tensor, gs.Constant)]


def data_name(onnx_name: str) -> str:
    """The file beside an ONNX file that holds its weights."""
    return onnx_name + ".data"


def save(graph: gs.Graph, path: Path) -> tuple[str, ...]:
    """Write graph and weights without intermediate shapes, check the result, and return the files' names.

    Afterwards the graph's weights are memory maps of what was written. A weight that already is such a map, of another
    file in the same folder, is written by reference: so several forms of a graph share their weights.
    """
    graph.cleanup(remove_unused_graph_inputs=False)
    data_path = path.with_name(data_name(path.name))
    part = data_path.with_name(data_path.name + ".part")  # renamed at the end: what is mapped from an old file stays
    used: dict[str, None] = {}
    external: list[tuple[gs.Constant, TensorProto]] = []
    with part.open("wb") as data:
        for tensor in constants(graph):
            values = tensor.values
            if values.nbytes < INLINE_BYTES or values.dtype == np.int64:
                continue
            kind, content = np_dtype_to_tensor_dtype(values.dtype), np.ascontiguousarray(values)
            if kind in PACKED:
                content = np.frombuffer(onnx.numpy_helper.from_array(values).raw_data, np.uint8)
            place = _mapped_from(values, path.parent)
            if place is None or place[0] == data_path.name:
                data.write(b"\0" * (-data.tell() % ALIGNMENT))
                place = data_path.name, data.tell()
                content.tofile(data)
            used[place[0]] = None
            proto = TensorProto(name=tensor.name, data_type=kind, dims=values.shape, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", place[0]), ("offset", place[1]), ("length", content.nbytes)):
                proto.external_data.add(key=key, value=str(value))
            external.append((tensor, proto))
            with _quiet():
                tensor.values = LazyValues(proto)
    if data_path.name in used:
        part.replace(data_path)
    else:
        part.unlink()
    domains = {node.domain for node in graph.nodes if node.domain}
    model = gs.export_onnx(graph)
    opsets = [opset for opset in model.opset_import if opset.domain in {"", "ai.onnx", *domains}]
    del model.opset_import[:]
    model.opset_import.extend(sorted(opsets, key=lambda opset: opset.domain))
    for tensor, proto in external:
        tensor.values = _map_external(proto, path.parent)
    del model.graph.value_info[:]
    onnx.save(model, path)
    if not domains:  # ONNX's checker knows its own ops only
        onnx.checker.check_model(path, full_check=True)
    return (path.name, *used)


@contextmanager
def temporary(graph: gs.Graph, path: Path) -> Iterator[list[Path]]:
    """Yield the files of a graph that is saved for a while; those of its own are gone afterwards."""
    try:
        yield [path.with_name(name) for name in save(graph, path)]
    finally:
        for name in (path.name, data_name(path.name)):
            path.with_name(name).unlink(missing_ok=True)


def _mapped_from(values: np.ndarray, folder: Path) -> tuple[str, int] | None:
    """Return file and offset of a whole memory map of a file in `folder`; a view of it has another place."""
    if isinstance(values, np.memmap) and isinstance(values.base, mmap.mmap):
        file = Path(values.filename)  # resolved by NumPy
        if file.parent == folder.resolve():
            return file.name, int(values.offset)
    return None


def layer(
    graph: gs.Graph, op: str, inputs: Sequence[gs.Tensor | np.ndarray], output: str | gs.Variable, **attrs: object
) -> gs.Variable:
    """Append one node; arrays among its inputs become constants named after the output."""
    result = gs.Variable(output) if isinstance(output, str) else output
    tensors = [
        gs.Constant(f"{result.name}_{index}", value) if isinstance(value, np.ndarray) else value
        for index, value in enumerate(inputs)
    ]
    graph.nodes.append(gs.Node(op, result.name, attrs, inputs=tensors, outputs=[result]))
    return result


def name_rows(graph: gs.Graph, rows: str) -> None:
    """Give axis 0 of every input and output this name."""
    for tensor in (*graph.inputs, *graph.outputs):
        tensor.shape = [rows, *tensor.shape[1:]]


def signature(graph: gs.Graph) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return what the graph reads and what it gives."""
    reads, gives = (
        tuple(TensorSpec(tensor.name, np.dtype(tensor.dtype).name, tuple(tensor.shape)) for tensor in tensors)
        for tensors in (graph.inputs, graph.outputs)
    )
    return reads, gives


def census(graph: gs.Graph) -> dict[str, int]:
    """Count the nodes of each kind, most frequent first."""
    return dict(Counter(node.op for node in graph.nodes).most_common())


def weight_bytes(graph: gs.Graph) -> int:
    return sum(tensor.values.nbytes for tensor in constants(graph))

"""Ways to break a bundle so that only verification can notice: every sha256 is made right again."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

FORM = "denoiser.onnxruntime.onnx"


def edit(bundle: Path, change: Callable[[dict], None]) -> None:
    path = bundle / "manifest.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def seal(bundle: Path) -> None:
    """Writes the sizes and sums of the files as they now are into the manifest."""

    def change(table: dict) -> None:
        for name in table["files"]:
            content = (bundle / name).read_bytes()
            table["files"][name] = {"size": len(content), "sha256": sha256(content).hexdigest()}

    edit(bundle, change)


def shapes(bundle: Path, graph: str) -> list[tuple[str, tuple[int, ...]]]:
    model = onnx.load(bundle / f"{graph}.onnx", load_external_data=False)
    return [(weight.name, tuple(weight.dims)) for weight in model.graph.initializer]


def weight(bundle: Path, graph: str, shape: tuple[int, ...] | None = None, name: str | None = None) -> np.memmap:
    """The one float weight of this shape or name, to be changed in place in the .data file."""
    model = onnx.load(bundle / f"{graph}.onnx", load_external_data=False)
    (weight,) = [w for w in model.graph.initializer if w.name == name or (shape and tuple(w.dims) == shape)]
    where = {entry.key: entry.value for entry in weight.external_data}
    assert weight.data_type == TensorProto.FLOAT
    offset, dims = int(where["offset"]), tuple(weight.dims)
    return np.memmap(bundle / where["location"], dtype=np.float32, mode="r+", offset=offset, shape=dims)


def leak(bundle: Path, graph: str, output: str) -> None:
    """A row depends a little on the others of its batch: a millionth of their mean is added to an output."""
    path = bundle / f"{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    (node,) = [node for node in model.graph.node if output in node.output]
    node.output[:] = ["own" if name == output else name for name in node.output]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1e-6), "little"))
    model.graph.node.extend(
        [
            onnx.helper.make_node("ReduceMean", ["own"], ["mean"], keepdims=0),
            onnx.helper.make_node("Mul", ["mean", "little"], ["leak"]),
            onnx.helper.make_node("Add", ["own", "leak"], [output]),
        ]
    )
    onnx.save(model, path)


def swap_vectors(bundle: Path, pair: int, form: str = FORM) -> None:
    """A modulation's gain and shift change places in the denoiser: two a block, the final one last."""
    path = bundle / form
    model = onnx.load(path, load_external_data=False)
    (split,) = [node for node in model.graph.node if node.op_type == "Split" and node.input[0] == "conditioning_rows"]
    vectors = [*split.output]
    producer = {name: node for node in model.graph.node for name in node.output}
    pairs = []
    for add in (node for node in model.graph.node if node.op_type == "Add"):
        shifts = [name for name in add.input if name in vectors]
        products = [producer[name] for name in add.input if name in producer and producer[name].op_type == "Mul"]
        gains = [name for product in products for name in product.input if name in vectors]
        pairs += zip(gains, shifts, strict=False)
    assert len(pairs) % 2 == 1, "two modulations a block and the final one"
    gain, shift = (vectors.index(name) for name in pairs[pair])
    split.output[gain], split.output[shift] = vectors[shift], vectors[gain]
    onnx.save(model, path)


def linears(bundle: Path, rows: int, columns: int) -> list[str]:
    """The names of the denoiser's linear weights of this shape, in the order of the blocks."""
    graph = onnx.load(bundle / FORM, load_external_data=False).graph
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    return [
        node.input[1] for node in graph.node if node.op_type == "MatMul" and sizes.get(node.input[1]) == (rows, columns)
    ]


def double_scale(bundle: Path, layer: str, form: str = FORM) -> None:
    """The grid of one quantized weight is twice as coarse as its integers say."""
    path = bundle / form
    model = onnx.load(path, load_external_data=False)
    (name,) = [node.input[1] for node in model.graph.node if node.output[0] == f"{layer} W"]
    (scale,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    scale.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(scale), name))
    onnx.save(model, path)


def swap_streams(bundle: Path, form: str = FORM) -> None:
    """The first joint block's queries of the image have the weight of those of the text, and the other way round."""
    path = bundle / form
    model = onnx.load(path, load_external_data=False)
    made = {node.output[0]: node for node in model.graph.node}
    products = []
    for bias in ("to_q.bias", "add_q_proj.bias"):
        (add,) = [
            node
            for node in model.graph.node
            if node.op_type == "Add" and any(name.endswith(f".transformer_blocks.0.attn.{bias}") for name in node.input)
        ]
        products += [made[name] for name in add.input if name in made]
    first, second = products
    first.input[1], second.input[1] = second.input[1], first.input[1]
    onnx.save(model, path)
    seal(bundle)


def shift_tables(bundle: Path, tokens: int) -> None:
    """Each token has the place of the one before it in the tables that PyTorch computed beforehand."""
    names = [name for name, dims in shapes(bundle, "denoiser") if name.startswith("folded") and tokens in dims[:2]]
    assert names
    for name in names:
        table = weight(bundle, "denoiser", name=name)
        table[:] = np.roll(table, 1, axis=table.shape.index(tokens))
        table.flush()
    seal(bundle)


def shift_schedule(bundle: Path) -> None:
    """The flow is shifted by a tenth more than that of the pipeline."""
    edit(bundle, lambda table: table["process"].update(shift=1.1 * table["process"]["shift"]))

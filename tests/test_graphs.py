"""ONNX files of others, read and written again."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper

from dit_export.graph import onnxfile

FLOATS = np.array([0.5, 2.0], np.float32)


def test_constant_nodes_become_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        helper.make_node("Constant", [], ["factor"], value=onnx.numpy_helper.from_array(FLOATS)),
        helper.make_node("Mul", ["x", "factor"], ["scaled"]),
        helper.make_node("Constant", [], ["step"], value_float=0.25),
        helper.make_node("Add", ["scaled", "step"], ["moved"]),
        helper.make_node("Constant", [], ["shape"], value_ints=[2, 1]),
        helper.make_node("Reshape", ["moved", "shape"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 1])]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", inputs, outputs)), tmp_path / "model.onnx")

    with monkeypatch.context() as patch:
        patch.setattr(gs.Node, "__eq__", None)  # nodes are never compared: of thousands, each with each takes minutes
        graph = onnxfile.load(tmp_path / "model.onnx")
    assert onnxfile.census(graph) == {"Mul": 1, "Add": 1, "Reshape": 1}
    arrays = {tensor.name: tensor.values for tensor in onnxfile.constants(graph)}
    for name, values in {"factor": FLOATS, "step": np.float32(0.25), "shape": np.array([2, 1])}.items():
        np.testing.assert_array_equal(arrays[name], values)
        assert arrays[name].dtype == values.dtype
    onnxfile.save(graph, tmp_path / "again.onnx")  # the checker takes it


def test_opsets_are_kept(tmp_path: Path) -> None:
    """In whatever order they stand; a domain that no node is of is left out."""
    nodes = [helper.make_node("Gelu", ["x"], ["h"], domain="com.microsoft"), helper.make_node("Tanh", ["h"], ["y"])]
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])] for name in "xy")
    opsets = [helper.make_opsetid(*entry) for entry in (("com.microsoft", 2), ("unused", 3), ("", 17))]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs), opset_imports=opsets)
    onnx.save(model, tmp_path / "model.onnx")
    onnxfile.save(onnxfile.load(tmp_path / "model.onnx"), tmp_path / "again.onnx")
    written = onnx.load(tmp_path / "again.onnx").opset_import
    assert {entry.domain: entry.version for entry in written} == {"com.microsoft": 2, "": 17}


@pytest.mark.parametrize("dtype", ["int4", "uint4", "float4_e2m1fn"])
@pytest.mark.parametrize("external", [True, False])
def test_weights_of_which_a_byte_holds_several(tmp_path: Path, dtype: str, external: bool) -> None:
    """In whichever file they are, and more of them than stay in the .onnx; an odd number fills no byte."""
    values = np.random.default_rng(0).integers(0, 7, (2049,)).astype(getattr(ml_dtypes, dtype))
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, [2049])] for name in "xy")
    nodes = [
        helper.make_node("Cast", ["w"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "floats"], ["y"]),
    ]
    weights = [onnx.numpy_helper.from_array(values, "w")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=11,
    )
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=external, location="w", size_threshold=0)
    onnxfile.save(onnxfile.load(tmp_path / "model.onnx"), tmp_path / "again.onnx")
    (written,) = onnx.load(tmp_path / "again.onnx").graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(written), values)

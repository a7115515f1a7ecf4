"""Weights in 16 bits: stored so, cast where they are used, and read one at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx.helper import tensor_dtype_to_np_dtype

from dit_export.graph import onnxfile
from dit_export.graph.onnxfile import layer
from dit_export.precision.half import TYPES
from dit_export.precision.stored import store_half
from dit_runtime import backends
from dit_runtime.backends import Options

WORDS, WIDTH = 40, 32
RANDOM = np.random.default_rng(0)


def small_encoder() -> gs.Graph:
    """y = sum of words' rows, through two products of which one weight is also added, and a gain."""
    graph = gs.Graph(opset=23, ir_version=10)
    ids = gs.Variable("ids", np.int64, ["rows", 3])
    weights = {
        name: gs.Constant(name, RANDOM.normal(size=shape).astype(np.float32))
        for name, shape in (("table", (WORDS, WIDTH)), ("first", (WIDTH, WIDTH)), ("second", (WIDTH, WIDTH)))
    }
    gain = np.linspace(1, 2, 512, dtype=np.float32)[None, None]  # as large as a weight, and of no product
    x = layer(graph, "Gather", [weights["table"], ids], "rows")
    x = layer(graph, "MatMul", [x, weights["first"]], "x")
    x = layer(graph, "MatMul", [x, weights["second"]], "y")
    y = layer(graph, "Add", [layer(graph, "ReduceMean", [x], "mean", keepdims=1), weights["second"]], "sum")
    z = layer(graph, "Mul", [layer(graph, "ReduceMean", [y], "one", keepdims=1), gain], "z")
    z.dtype, z.shape = np.dtype(np.float32), ["rows", 1, 512]
    graph.inputs, graph.outputs = [ids], [z]
    return graph


def test_products_and_tables(tmp_path) -> None:
    graph = small_encoder()
    weights = {tensor.name: tensor.values for tensor in onnxfile.constants(graph)}
    ids = {"ids": np.array([[1, 5, 39]])}
    assert store_half(graph, {"first": "bf16"}, "fp16") == 2
    kinds = {tensor.name: tensor._values.dtype for tensor in onnxfile.constants(graph)}
    assert kinds["first"] == tensor_dtype_to_np_dtype(TYPES["bf16"]) and kinds["table"] == np.float16
    assert {kinds["second"], kinds["z_1"]} == {np.dtype(np.float32)}  # one has another reader, one is no weight
    assert [node.op for node in graph.nodes][:4] == ["Cast", "Gather", "Cast", "MatMul"]

    onnxfile.save(graph, tmp_path / "half.onnx")
    rounded = small_encoder()
    for tensor in onnxfile.constants(rounded):
        tensor.values = weights[tensor.name].astype(kinds[tensor.name]).astype(np.float32)
    onnxfile.save(rounded, tmp_path / "rounded.onnx")
    answers = {}
    for name in ("half", "rounded"):
        engine = backends.backend("onnxruntime").open([tmp_path / f"{name}.onnx"], Options(streamed=name == "half"))
        answers[name] = engine.run(ids)["z"]
        engine.close()
    np.testing.assert_allclose(answers["half"], answers["rounded"], rtol=1e-5)
    sizes = [(tmp_path / f"{name}.onnx.data").stat().st_size for name in ("half", "rounded")]
    assert sizes[1] - sizes[0] == 2 * WIDTH * (WORDS + WIDTH)


def test_what_stays() -> None:
    graph = small_encoder()
    assert store_half(graph, {"first": "fp16"}, None) == 1
    kinds = {tensor.name: tensor._values.dtype for tensor in onnxfile.constants(graph)}
    assert kinds["first"] == np.float16 and kinds["table"] == np.float32


MEASURE = """
import sys
import numpy as np
from pathlib import Path
from dit_runtime import backends
from dit_runtime.backends import Options

def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "VmHWM")) and "Anon" in line)

before = resident()
engine = backends.backend("onnxruntime").open([Path(sys.argv[1])], Options(threads=1, streamed=sys.argv[2] == "1"))
engine.run({"x": np.ones((1, 4, 1024), np.float32)})
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what is resident from /proc")
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_one_weight_at_a_time(tmp_path, kind) -> None:
    """Eight weights of 8 MB in fp32: opened as other stages are, all are in memory, and streamed, at most two."""
    graph = gs.Graph(opset=23, ir_version=10)
    x = gs.Variable("x", np.float32, ["rows", 4, 1024])
    graph.inputs = [x]
    for number in range(8):
        shape = (1024, 2048) if number % 2 == 0 else (2048, 1024)
        weight = gs.Constant(f"w{number}", RANDOM.normal(size=shape).astype(np.float32) / 40)
        x = layer(graph, "Tanh", [layer(graph, "MatMul", [x, weight], f"y{number}")], f"h{number}")
    x.dtype, x.shape = np.dtype(np.float32), ["rows", 4, 1024]
    graph.outputs = [x]
    assert store_half(graph, {}, kind) == 8
    onnxfile.save(graph, tmp_path / "g.onnx")
    kilobytes = [
        int(subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "g.onnx", streamed], capture_output=True,
                           check=True, text=True, cwd=Path(__file__).parents[2]).stdout)
        for streamed in ("1", "0")
    ]  # fmt: skip
    assert kilobytes[0] < 3 * 8192 and kilobytes[1] > 7 * 8192

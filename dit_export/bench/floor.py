"""The floor under a step: its FLOPs at the fastest rate that any of the libraries multiplies matrices here, or on a
GPU its weights at the rate that memory is copied."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dit_export.networks.spec import ModelSpec

Shape = tuple[int, int, int]  # (M, K) x (K, N)
GEMMS: dict[str, dict[str, tuple[str, ...]]] = {  # by device
    "cpu": {"pytorch": ("fp32", "bf16"), "onnxruntime": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8")},
    "cuda": {"pytorch": ("fp32", "fp16", "bf16", "int8", "fp8")},
}
BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "fp8": 8}
REPEATS = 3
LAUNCHES = 20  # products that a captured graph holds, and copies that one waits for
COPIED = 1 << 30  # bytes, more than any cache holds


class Flops(NamedTuple):
    """FLOPs of one row; a multiplication and an addition count as two."""

    blocks: int
    ends: int  # patch embedding and the final linear
    conditioning: int  # embedders, adaLN, and a cross-attention's keys and values, which can be hoisted


def flops(spec: ModelSpec) -> Flops:
    """Matrix products alone, as the DiT paper counts its Gflops (which are multiply-adds: half of these)."""
    d, mlp, scheme = spec.hidden, round(spec.mlp_ratio * spec.hidden), spec.scheme
    t, read = spec.tokens + 2 * scheme.appended, 2  # the tokens of the timestep and the label
    block = 4 * t * d * d + 2 * t * d * mlp + 2 * t * t * d  # qkv and proj, MLP, attention's two products
    if scheme.crossed:
        block += 2 * t * d * d + 2 * t * read * d  # its q and proj, its two products
    ends = spec.tokens * spec.patch**2 * d * (spec.channels + spec.out_channels)
    conditioning = spec.embedders * (256 * d + d * d)
    if scheme.modulation:
        conditioning += (scheme.modulation * spec.depth + 2) * d * d
    if scheme.crossed:
        conditioning += 2 * spec.depth * read * d * d  # keys and values
    return Flops(2 * spec.depth * block, 2 * ends, 2 * conditioning)


def step_flops(spec: ModelSpec, batch: int) -> int:
    """Return the FLOPs that every guided step needs. The blocks count for two rows, one with the label and one with the
    null label. The ends count once, because both rows have the same patches."""
    row = flops(spec)
    return batch * (2 * row.blocks + row.ends)


def step_bytes(spec: ModelSpec, precision: str) -> float:
    """The weights that every step reads once, whatever the batch: of the linears in the loop."""
    d, mlp = spec.hidden, round(spec.mlp_ratio * spec.hidden)
    block = 4 * d * d + 2 * d * mlp + 2 * d * d * spec.scheme.crossed
    ends = spec.patch**2 * d * (spec.channels + spec.out_channels)
    return (spec.depth * block + ends) * BITS[precision] / 8


def floor(
    spec: ModelSpec, batch: int, precision: str, rate: float, library: str, bandwidth: float | None
) -> dict[str, Any]:
    """Seconds of a step, and what they come from."""
    work, size = step_flops(spec, batch), step_bytes(spec, precision)
    roofline = {"step": work / rate, "flops": work, "flops_per_second": rate, "library": library}
    if bandwidth is None:
        return roofline
    return roofline | {"step": max(work / rate, size / bandwidth), "bytes": size, "bytes_per_second": bandwidth}


def gemm_shapes(spec: ModelSpec, batch: int) -> list[Shape]:
    """The linears of a block, for a guided step: qkv, proj, and the MLP's two."""
    m, d, mlp = 2 * batch * spec.tokens, spec.hidden, round(spec.mlp_ratio * spec.hidden)
    return [(m, d, 3 * d), (m, d, d), (m, d, mlp), (m, mlp, d)]


def rates(seconds: Mapping[str, Mapping[str, Mapping[str, list[float]]]]) -> dict[str, tuple[float, str]]:
    """library -> precision -> "MxKxN" -> seconds to precision -> (FLOP/s, library): the one fastest call of all.

    A narrow precision may always be computed in a wider one, so it takes the wider one's rate where that is faster;
    it has a floor only where something as narrow was timed.
    """
    speeds: dict[str, tuple[float, str]] = {}
    for library, precisions in seconds.items():
        for precision, shapes in precisions.items():
            for shape, times in shapes.items():
                m, k, n = map(int, shape.split("x"))
                speeds[precision] = max(speeds.get(precision, (0.0, "")), (2 * m * k * n / min(times), library))
    fastest = {}
    for precision, bits in BITS.items():
        as_wide = [rate for other, rate in speeds.items() if BITS[other] >= bits]
        if any(BITS[other] == bits for other in speeds):
            fastest[precision] = max(as_wide)
    return fastest


class Gemms:
    """The model's GEMMs in one library."""

    def __init__(
        self, library: str, spec: ModelSpec, batch: int, threads: int, precisions: tuple[str, ...], device: str = "cpu"
    ) -> None:
        on_cpu = {"pytorch": _pytorch, "onnxruntime": _onnxruntime, "openvino": _openvino}
        open_gemm = on_cpu[library] if device == "cpu" else _cuda
        self._products = 1 if device == "cpu" else LAUNCHES  # a call
        self._calls = {
            precision: {"x".join(map(str, shape)): open_gemm(shape, precision, threads) for shape in shapes}
            for shapes in [gemm_shapes(spec, batch)]
            for precision in GEMMS[device][library]
            if precision in precisions and (device == "cpu" or _has(precision))
        }

    def run(self) -> dict[str, dict[str, float]]:
        """The best of a few calls for each."""
        return {
            precision: {
                shape: min(_seconds(call) for _ in range(REPEATS)) / self._products for shape, call in calls.items()
            }
            for precision, calls in self._calls.items()
        }


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _operands(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    m, k, n = shape
    random = np.random.default_rng(0)
    return random.standard_normal((m, k), np.float32), random.standard_normal((k, n), np.float32)


def _pytorch(shape: Shape, precision: str, threads: int) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    x, w = (torch.from_numpy(operand).to(dtype) for operand in _operands(shape))
    weight = w.T.contiguous()  # (N, K), as nn.Linear holds it
    return lambda: torch.nn.functional.linear(x, weight)


def _cuda(shape: Shape, precision: str, threads: int) -> Callable[[], None]:
    """Return a call that replays some products in a row, captured in a CUDA graph, and waits for the last.

    Launched from Python, a small product would take as long as its launch.
    """
    import torch

    # As PyTorch has it by default, and as the yardstick's convolutions are told to.
    torch.backends.cuda.matmul.allow_tf32 = False
    a, b = (torch.from_numpy(operand).cuda() for operand in full_range(shape, precision))
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    a, weight = a.to(kinds.get(precision, torch.int8)), b.T.contiguous().to(kinds.get(precision, torch.int8))  # (N, K)
    one = torch.ones((), device="cuda")

    def multiply() -> Any:
        if precision == "int8":
            return torch._int_mm(a, weight.T)
        if precision == "fp8":
            return torch._scaled_mm(a, weight.T, one, one, out_dtype=torch.bfloat16)
        return torch.nn.functional.linear(a, weight)

    multiply()  # makes the library's handle and workspace, which no capture may
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            multiply()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    replay()  # the first one uploads the graph
    return replay


def full_range(shape: Shape, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Return operands that use the whole range of a type: zeros and small integers draw less power and go faster."""
    largest = {"int8": 127, "fp8": 448}.get(precision)
    operands = _operands(shape)
    if largest is None:
        return operands
    scaled = [(operand * largest / 3).clip(-largest, largest) for operand in operands]
    return scaled[0], scaled[1]


def _has(precision: str) -> bool:
    import torch

    return precision != "fp8" or torch.cuda.get_device_capability() >= (8, 9)


def bandwidth(device: str) -> float | None:
    """Bytes a second of a GPU's memory, read and written by a copy; of a CPU's nothing, for caches blur it."""
    if device == "cpu":
        return None
    import torch

    source, target = (torch.zeros(COPIED, dtype=torch.uint8, device=device) for _ in range(2))

    def copy() -> None:
        for _ in range(LAUNCHES):
            target.copy_(source)
        torch.cuda.synchronize()

    copy()
    return 2 * COPIED * LAUNCHES / min(_seconds(copy) for _ in range(REPEATS))


def _onnxruntime(shape: Shape, precision: str, threads: int) -> Callable[[], Any]:
    import onnxruntime as ort

    x, w = _operands(shape)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    if precision == "int8":
        x, w = _int8(x, np.uint8), _int8(w, np.int8)
        model = _model([("MatMulInteger", ["x", "w"], "y")], {"w": w}, x.dtype, np.int32, shape)
    else:
        model = _model([("MatMul", ["x", "w"], "y")], {"w": w}, x.dtype, np.float32, shape)
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})


def _openvino(shape: Shape, precision: str, threads: int) -> Callable[[], Any]:
    import openvino

    x, w = _operands(shape)
    nodes = [("MatMul", ["x", "w"], "y")]
    constants: dict[str, Any] = {"w": w}
    if precision == "int8":  # Q/DQ around it, as quantized networks have
        constants = {"q": _int8(w, np.int8), "s": np.float32(0.03), "z": np.int8(0)}
        nodes = [
            ("QuantizeLinear", ["x", "s", "z"], "xq"),
            ("DequantizeLinear", ["xq", "s", "z"], "xd"),
            ("DequantizeLinear", ["q", "s", "z"], "wd"),
            ("MatMul", ["xd", "wd"], "y"),
        ]
    hint = "bf16" if precision == "bf16" else "f32"
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": hint}
    model = openvino.Core().read_model(_model(nodes, constants, np.float32, np.float32, shape))
    request = openvino.compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x))  # its own copy: a shared array must outlive the request
    return request.infer


def _int8(values: np.ndarray, kind: Any) -> np.ndarray:
    return (values / 0.03).round().clip(-127, 127).astype(np.int8).view(kind)


def _model(
    nodes: list[tuple[str, list[str], str]],
    constants: Mapping[str, Any],
    input_type: Any,
    output_type: Any,
    shape: Shape,
) -> bytes:
    """Return a small ONNX graph from x (M, K) to y (M, N)."""
    from onnx import helper, numpy_helper

    m, k, n = shape
    kinds = [helper.np_dtype_to_tensor_dtype(np.dtype(kind)) for kind in (input_type, output_type)]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [output]) for op, inputs, output in nodes],
        "gemm",
        [helper.make_tensor_value_info("x", kinds[0], [m, k])],
        [helper.make_tensor_value_info("y", kinds[1], [m, n])],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())

"""An ONNX graph in TensorRT: its profiles, the census of its precisions, and the gate on that."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

from dit_runtime.backends import QUANTIZED
from dit_runtime.bundle.records import GUIDANCE, Stage
from dit_runtime.errors import GateError, UsageError
from dit_runtime.progress import Progress

PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "EINSUM", "ATTENTION_INPUT")
MOVERS = ("SHUFFLE", "SQUEEZE", "UNSQUEEZE")  # what a parser puts between a weight and its product
TYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "FP8": "fp8"}  # TensorRT's DataType: ours
WORDS = {"BF16|BFloat16": "bf16", "FP16|Half": "fp16", "FP8|E4M3": "fp8", "INT8|Int8": "int8", "FP32|Float": "fp32"}
WIDTH = ("fp32", "bf16", "fp16", "int8", "fp8")  # a product computes in the widest of its two operands
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # smallest, usual, largest


def profiles(stage: Stage) -> list[Shapes]:
    """Return a profile for each number of groups (with guidance and without); rows from one to the stage's most."""
    guided = any(spec.name == GUIDANCE for spec in stage.reads)
    rows = (1, max(1, stage.max_batch // 4), stage.max_batch)

    def shapes(groups: int) -> Shapes:
        by_input: Shapes = {}
        for spec in stage.reads:
            smallest, usual, largest = (
                tuple(size if isinstance(size, int) else groups if size == "groups" else count for size in spec.shape)
                for count in rows
            )
            by_input[spec.name] = smallest, usual, largest
        return by_input

    return [shapes(groups) for groups in ((1, 2) if guided else (1,))]


def census(trt: Any, network: Any) -> dict[str, str]:
    """Return, by layer, the type that each product computes in: that of its operands, looking through Q/DQ."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}

    def computed(tensor: Any) -> str:
        maker = makers.get(tensor.name)
        while maker is not None and maker.type.name in MOVERS:
            maker = makers.get(maker.get_input(0).name)
        if maker is not None and maker.type.name == "DEQUANTIZE":
            tensor = maker.get_input(0)
        return str(TYPES.get(tensor.dtype.name, tensor.dtype.name.lower()))

    types = {}
    for layer in layers:
        moves = layer.type.name == "EINSUM" and layer.num_inputs == 1  # of one operand it is a transpose or a sum
        if layer.type.name in PRODUCTS and not moves:
            operands = [layer.get_input(index) for index in range(min(2, layer.num_inputs))]
            types[layer.name] = min((computed(tensor) for tensor in operands if tensor is not None), key=WIDTH.index)
    return types


def inspected(trt: Any, engine: Any) -> dict[str, Any]:
    """Count an engine's layers by the type that each makes, and those that are several nodes in one."""
    inspector = engine.create_engine_inspector()
    report = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    layers = [layer for layer in report["Layers"] if isinstance(layer, dict)]
    made = Counter(
        next((kind for words, kind in WORDS.items() if re.search(words, _datatype(output))), "other")
        for layer in layers
        for output in layer.get("Outputs", [])[:1]
    )
    fused = sum(layer.get("Metadata", "").count("[ONNX Layer:") > 1 for layer in layers)
    return {"layers": dict(made), "fused": fused}


def _datatype(output: Mapping[str, Any]) -> str:
    """Return the type's words: TensorRT 10 says Format/Datatype, 11 has DataType beside Format."""
    return next((str(value) for key, value in output.items() if "datatype" in key.lower()), "")


def decompose_attention(trt: Any, network: Any) -> None:
    """Let attention that has no kernel of its own (fp32, a VAE's head of 512) become products and a softmax."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = trt.IAttentionInputLayer  # as a layer is cast in its Python API
            layer.attention.decomposable = True


def gate(name: str, types: Mapping[str, str], precision: str, around: str, islands: Collection[str]) -> None:
    """Refuse a graph whose products are not in the asked precision, beyond the listed islands."""
    allowed = (precision, around) if precision in QUANTIZED else (precision,)
    wrong = [layer for layer, kind in types.items() if kind not in allowed and not _listed(layer, islands)]
    if wrong:
        raise GateError(
            f"{name}: {len(wrong)} of {len(types)} products are not in {' or '.join(allowed)} and no listed island: "
            f"{wrong[0]!r} is {types[wrong[0]]}"
        )
    if precision not in types.values() and (types or precision != "fp32"):  # a mask, say, is made without products
        raise GateError(f"{name}: no product is in {precision}; found {dict(Counter(types.values()))}")


def _listed(name: str, islands: Collection[str]) -> bool:
    """Return whether a layer is an island: it has its node's name, with an end where the node became several."""
    return any(name.removesuffix(end) in islands for end in ("", "_AttentionInput"))


def started(name: str, kind: Callable[[Any], Any], logger: Any) -> Any:
    """Start a builder or a runtime of TensorRT, whose Python raises TypeError where its C++ gives none."""
    try:
        return kind(logger)
    except TypeError as error:
        raise UsageError(f"{name} does not start here: {logger.last or error}") from None


def runtime_of(trt: Any, name: str, logger: Any, host_code: bool) -> Any:
    """Start a runtime; a version-compatible plan brings host code, which a runtime refuses unless it is allowed."""
    runtime = started(name, trt.Runtime, logger)
    runtime.engine_host_code_allowed = host_code
    return runtime


def logger_of(trt: Any) -> Any:
    """Return the process's only logger, without a message; TensorRT takes no second one."""
    logger = _logger(trt)
    logger.last = ""
    return logger


@cache
def _logger(trt: Any) -> Any:
    """Make a logger that stores the last error for our own message, and prints nothing."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last = message.partition("\n")[0]

    return Logger()


def monitor_of(trt: Any, progress: Progress, name: str) -> Any:
    """Return a monitor that moves the bar with the builder's outermost phase."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self._steps:
                progress.step(step + 1, self._steps[phase], f"compile {name}")
            return True

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()

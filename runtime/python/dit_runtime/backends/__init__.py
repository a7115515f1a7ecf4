"""One file a backend, imported only when it is asked for.

A backend has
* `PRECISIONS`; `FLOAT_AROUND_INT8`, the float type around int8 and fp8; `NEEDS_TYPED_GRAPH`, the narrow types that it
  computes in where the graph holds them, and only there;
* `version()`, None where it is not installed; `why_unavailable(built)`, why it cannot run here, or not the engine of
  which the manifest says this;
* `compile(folder, stage, options, progress)`, which makes engine files of a bundle's stage;
* `open(files, options)`, which gives an Engine;
* where that depends on the machine, `float_type(precision)`, what floats are computed in here;
* where it has several providers, `form(options)`, the name of the form that its provider opens, and
  `refusal(precision, provider)`, why a provider cannot run a graph of this precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from dit_runtime.errors import UsageError, nearest

if TYPE_CHECKING:
    from dit_runtime.bundle.records import Stage

# Name -> module, or what in it; the fastest first.
BACKENDS = {"tensorrt": "trt:TENSORRT", "tensorrt-rtx": "trt:RTX", "openvino": "ov", "onnxruntime": "ort"}
CPU = ("onnxruntime", "openvino")  # whose engines run where they are built, on as many threads as they are told
PORTABLE_BACKEND = "onnxruntime"  # opens every graph of a bundle, on any CPU
LEANEST = "onnxruntime"  # while it loads: about the weights' size, where OpenVINO takes twice that
QUANTIZED = ("int8", "fp8")
PROVIDER_FORMS = {"onnxruntime-cuda": ("onnxruntime", "cuda")}  # forms that single providers open: backend, provider


@dataclass(frozen=True)
class Tuning:
    """TensorRT build options, under TensorRT's own names."""

    compute_capability: tuple[str, ...] = ()  # empty: all that can
    builder_optimization_level: int | None = None
    pool_limit: tuple[str, ...] = ()  # workspace:4G
    version_compatible: bool = False
    hardware_compatibility_level: str = "none"
    weight_streaming: bool = False
    strip_plan: bool = False
    refittable: bool = False
    timing_cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("compute_capability", "pool_limit"):  # JSON and TOML have lists
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True)
class Options:
    threads: int | None = None  # None: as many as the backend thinks right
    provider: str | None = None  # ONNX Runtime's execution provider: "cpu", "cuda", "cuda:1"
    precision: str = "fp32"  # of the graph
    cache: Path | None = None  # where a backend may keep what it compiled; None: nowhere
    low_memory: bool = False  # less memory before speed
    streamed: bool = False  # of a stage that runs once a prompt: weights are packed and widened where they are used
    row: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # shapes of one row, where rows may run apart
    grouped: tuple[str, ...] = ()  # of a step stage: the inputs that have a group for each condition
    at_once: int = 1  # rows that may run at the same time, if they run apart
    tuning: Tuning = Tuning()
    islands: tuple[str, ...] = ()  # nodes of a typed graph that stay fp32
    built: Mapping[str, Any] = field(default_factory=dict)  # what the manifest says of the engine that is opened
    beside: Any = None  # an open engine of the same backend, to work in order with


class Compiled(NamedTuple):
    files: tuple[str, ...] = ()  # none: the backend opens the ONNX form itself
    built: Mapping[str, Any] = {}  # with what and for what, for the manifest


class Engine(Protocol):
    """A network, ready to run; arrays go in and come out by name."""

    @property
    def io(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of inputs and of outputs."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...

    def close(self) -> None: ...


@runtime_checkable
class Resident(Engine, Protocol):
    """An engine whose arrays may stay where it computes, from run to run."""

    def put(self, values: np.ndarray) -> Any:
        """Return the array there: its rows are taken as NumPy takes them, and np.asarray brings it home."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Return such an array there without values, for `into`."""

    def run(self, inputs: Mapping[str, Any], into: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
        """Write outputs into the device arrays in `into`, by name; return nothing then, and do not wait."""


def backend(name: str) -> Any:
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is not known{nearest(name, BACKENDS)}; known: {', '.join(BACKENDS)}")
    module, _, member = BACKENDS[name].partition(":")
    loaded = import_module(f"{__name__}.{module}")
    return getattr(loaded, member) if member else loaded


def files(stage: Stage, options: Options) -> tuple[str, ...]:
    """Return the files that a stage's backend opens: the form of its provider or its own, else the portable one."""
    form = getattr(backend(stage.backend), "form", None)
    return stage.engines.get(form(options) if form else stage.backend, stage.onnx_files)


def refusal(name: str, precision: str, provider: str | None = None) -> str | None:
    """Return why a backend's provider cannot run a graph of this precision; None where it can."""
    refuse = getattr(backend(name), "refusal", None)
    return refuse(precision, provider) if refuse else None


def typed(name: str, precision: str) -> str | None:
    """Return the 16-bit type that a backend needs its graph in for a precision; None where the graph stays fp32."""
    inner = backend(name).FLOAT_AROUND_INT8 if precision in QUANTIZED else precision
    return inner if inner in backend(name).NEEDS_TYPED_GRAPH else None


def computed(name: str, precision: str) -> str:
    """Return a precision in the words of what computes it here: "int8 with bf16", "bf16 as fp32"."""
    floats = _floats(name, precision)
    if floats in (None, precision):
        return precision
    return f"{precision} {'with' if precision in QUANTIZED else 'as'} {floats}"


def note(name: str, precision: str) -> str | None:
    """Return a line for people where a backend does not compute here in the precision that was asked for."""
    floats = _floats(name, precision)
    if precision in QUANTIZED or floats in (None, precision):
        return None
    return f"this CPU has no {precision}: {name} computes in {floats}, and nothing is gained over {floats}"


def _floats(name: str, precision: str) -> str | None:
    """Return what floats are computed in here, where a backend that is here has a say in it."""
    module: Any = backend(name) if name in BACKENDS else None
    return module.float_type(precision) if hasattr(module, "float_type") and module.version() else None


def require(name: str, precision: str, tuning: Tuning) -> None:
    """Refuse, before any work, what a backend cannot build."""
    targets = getattr(backend(name), "targets", None)
    if targets is not None:
        targets(precision, tuning)
    elif tuning != Tuning():
        raise UsageError(f"the options of TensorRT were given, and this builds for {name}")


def versions() -> dict[str, str | None]:
    """Return each backend's version, None where it is not installed."""
    return {name: backend(name).version() for name in BACKENDS}


def place(runs: str, name: str) -> str:
    """Return the backend of a stage in a bundle of another's: on a CPU, text encoders run where that takes the least
    memory."""
    return LEANEST if runs == "prompt" and name in CPU and versions()[LEANEST] else name


def choose(name: str, precision: str = "fp32") -> str:
    """Return the name, or for `auto` the fastest that has the precision and runs here, or else compiles here."""
    installed = versions()
    able = [known for known in BACKENDS if precision in backend(known).PRECISIONS]
    if name == "auto":
        able = [known for known in able if not refusal(known, precision)]
        here = [known for known in able if installed[known]]
        name = next((known for known in here if backend(known).why_unavailable() is None), here[0] if here else "")
        if not name:
            extras = " or ".join(f"'dit-runtime[{known}]'" for known in able)
            raise UsageError(f"no backend for {precision} is installed: pip install {extras}")
    elif backend(name) and installed[name] is None:
        raise UsageError(f"backend {name!r} is not installed: pip install 'dit-runtime[{name}]'")
    elif name not in able:
        raise UsageError(f"backend {name!r} has no {precision}; it has {', '.join(backend(name).PRECISIONS)}")
    return name

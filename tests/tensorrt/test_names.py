"""Every name of TensorRT's API that we use is in the flavours that it is used on.

The full TensorRT's library cannot be installed everywhere, but its public bindings can: the names stand in the binary.
"""

from __future__ import annotations

import ast
import ctypes
import re
from importlib.metadata import files, version
from pathlib import Path

import pytest

from dit_runtime.backends import cuda, trt, trt_engine, trt_network

CPP = Path(__file__).parents[2] / "runtime" / "cpp" / "src" / "engine_trt.cpp"

# What of TensorRT the sources hold in their hands, by the names that they give it.
HELD = {"trt", "builder", "network", "parser", "config", "profile", "layer", "maker", "tensor", "logger", "context"}
HELD |= {"engine", "inspector", "runtime", "refitter", "weights", "settings", "trt.IProgressMonitor"}
HELD |= {"self._engine", "self._runtime", "self._runtime_cache"}
OURS = {"last", "stage", "step", "items", "__class__"}
# In TensorRT-RTX alone; used where the table of flavours says so.
RTX_ONLY = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability", "CudaGraphStrategy"}
RTX_ONLY |= {"DynamicShapesKernelSpecializationStrategy", "dynamic_shapes_kernel_specialization_strategy", "EAGER"}
RTX_ONLY |= {"WHOLE_GRAPH_CAPTURE", "cuda_graph_strategy", "create_runtime_cache", "set_runtime_cache", "deserialize"}
BY_NAME = {*trt.FLAGS.values(), *trt.HARDWARE.values(), *trt_network.PRODUCTS, *trt_network.MOVERS, *trt_network.TYPES}
BY_NAME |= {"DEQUANTIZE", "WORKSPACE", *trt_engine.DTYPES}


def used() -> set[str]:
    names = set(BY_NAME)
    for module in (trt, trt_network, trt_engine):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.Attribute) and _is_held(node.value):
                names.add(node.attr)
    return names - OURS


def _is_held(node: ast.expr) -> bool:
    text = ast.unparse(node)
    return text in HELD or text.startswith("trt.")


def test_what_is_looked_for_is_what_is_used() -> None:
    names = used()
    assert {"build_serialized_network", "execute_async_v3", "STRONGLY_TYPED", "refit_from_file", "FP8"} <= names
    assert len(names) > 90 and names >= RTX_ONLY


def test_tensorrt_rtx_has_every_name() -> None:
    import tensorrt_rtx

    known = set(dir(tensorrt_rtx))
    for name in dir(tensorrt_rtx):
        known |= {*dir(getattr(tensorrt_rtx, name))}
    assert used() - known == set()


def test_the_full_tensorrt_has_every_name_but_those_of_rtx() -> None:
    assert version("tensorrt-cu13-bindings").startswith("11.")
    (binary,) = [entry for entry in files("tensorrt-cu13-bindings") or [] if entry.name == "tensorrt.so"]
    content = Path(str(binary.locate())).read_bytes()
    missing = {name for name in used() if f"{name}\0".encode() not in content}
    assert missing == RTX_ONLY


def test_the_library_exports_what_cpp_links() -> None:
    """The C functions behind NvInferRuntime.h, which no package has; all other calls go through virtual tables."""
    import tensorrt_rtx_libs

    called = set(re.findall(r"\b(getInferLib\w+|createInfer\w+)\(", CPP.read_text()))
    assert called == {"createInferRuntime", *(f"getInferLib{part}Version" for part in ("Major", "Minor", "Patch"))}
    (library,) = Path(tensorrt_rtx_libs.__path__[0]).glob("libtensorrt_rtx.so.*")
    exported = ctypes.CDLL(str(library))
    names = {f"{name}_INTERNAL" if name.startswith("create") else name for name in called}
    assert [name for name in names if not hasattr(exported, name)] == []
    assert not hasattr(exported, "createInferRuntime_INTERNAL_V2")


def test_cuda_bindings_has_every_name() -> None:
    from cuda.bindings import runtime

    names = set(re.findall(r"\bcuda[A-Z]\w+", Path(cuda.__file__).read_text()))
    known = set(dir(runtime)) | {*dir(runtime.cudaMemcpyKind), *dir(runtime.cudaStreamCaptureMode)}
    assert len(names) > 20 and names - known - {*dir(runtime.cudaDeviceAttr)} == set()


@pytest.mark.parametrize("name", ["set_flags", "BF17", "execute_async_v4"])
def test_a_name_that_is_not_there_is_seen(name: str) -> None:
    (binary,) = [entry for entry in files("tensorrt-cu13-bindings") or [] if entry.name == "tensorrt.so"]
    assert f"{name}\0".encode() not in Path(str(binary.locate())).read_bytes()

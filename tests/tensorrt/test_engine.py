"""The engine at work, with a driver, a GPU and a TensorRT that are fakes."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_runtime import UsageError
from dit_runtime.backends import Options, Tuning, backend, cuda, trt_engine
from dit_runtime.backends.trt_network import logger_of
from dit_runtime.errors import BundleError, EngineError
from tests.tensorrt.conftest import BUILT, rows
from tests.tensorrt.fake_tensorrt import Engine, Unset


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_every_shape_of_both_profiles(device, trt, plan, name) -> None:
    engine = backend(name).open([plan], Options(built=BUILT))
    assert engine.io == (("x",), ("y",))
    engine.run({"x": rows(1)})  # which takes the host's memory
    held = set(device.open)
    results = []
    for count in (1, 3, 4, 5, 8, 8, 8, 1, 8):
        results.append((count, engine.run({"x": rows(count)})["y"]))
    for count, y in results:  # what came out is not overwritten by what comes later
        np.testing.assert_array_equal(y, 2 * rows(count))
    if name == "tensorrt-rtx":
        assert set(device.open) == held  # no memory is taken in a run, only before
    with pytest.raises(UsageError, match=r"no profile of this engine takes x \[9, 3\].*--max-batch"):
        engine.run({"x": rows(9)})
    engine.close()
    engine.close()
    assert device.open == {}


def test_each_shape_is_recorded_once(device, trt, plan) -> None:
    """A run of 5 samples where an engine takes 2 asks for two shapes in turn, in every step."""
    engine = backend("tensorrt").open([plan], Options(built=BUILT))
    for _ in range(6):
        for count in (2, 2, 1):
            np.testing.assert_array_equal(engine.run({"x": rows(count)})["y"], 2 * rows(count))
    assert device.instantiated == 2
    assert (
        device.launches == 6 * 3 - 2 * 2 and trt.runs == 6 * 3
    )  # the first run of a shape sets up, the second records
    engine.close()
    assert device.open == {}


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_only_the_shapes_used_last_have_a_context(device, trt, plan, name, monkeypatch) -> None:
    """A context that goes is not in use any more: the fake fails work whose context is gone."""
    monkeypatch.setattr(trt_engine, "SHAPES", 2)
    engine = backend(name).open([plan], Options(built=BUILT))
    targets = {count: engine.put(np.zeros((count, 3), np.float32)) for count in (1, 2, 3)}
    sources = {count: engine.put(rows(count)) for count in (1, 2, 3)}  # which no run waits for
    for count in (1, 2, 1, 1, 3, 1, 2):
        engine.run({"x": sources[count]}, {"y": targets[count]})
        assert sum(made() is not None for made in trt.contexts) == 2
    for count in (1, 2, 3):
        np.testing.assert_array_equal(np.asarray(targets.pop(count)), 2 * rows(count))
    assert len(trt.contexts) == 2 + 4  # the largest of both profiles, and 1, 2, 3, 2 again
    assert device.launches == (2 if name == "tensorrt" else 0)  # of the one that stayed
    sources.clear()
    engine.close()
    assert device.open == {}


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_contexts_share_their_memory(device, trt, plan, name) -> None:
    engine = backend(name).open([plan], Options(built=BUILT))
    for count in (1, 2, 5):
        engine.run({"x": rows(count)})
    (address,) = {made().memory for made in trt.contexts}
    assert address in device.open
    engine.close()


def test_rows_of_another_shape_are_not_written(device, trt, plan) -> None:
    """The buffer that they would be copied from is of the largest shape, and has old rows behind the new ones."""
    engine = backend("tensorrt").open([plan], Options(built=BUILT))
    target = engine.put(np.zeros((3, 3), np.float32))
    with pytest.raises(EngineError, match=r"y has shape \[2, 3\], expected \[3, 3\]"):
        engine.run({"x": rows(2)}, {"y": target})
    np.testing.assert_array_equal(np.asarray(target), 0)
    engine.close()


def test_streamed_weights_are_not_recorded(device, trt, plan, capsys) -> None:
    """NVIDIA's headers say that such work cannot be."""
    engine = backend("tensorrt").open([plan], Options(built={**BUILT, "tuning": {"weight_streaming": True}}))
    for _ in range(3):
        engine.run({"x": rows(2)})
    assert device.instantiated == 0 and capsys.readouterr().err == ""
    engine.close()


def test_without_cuda_graphs_it_runs_and_says_so_once(device, trt, plan, capsys) -> None:
    device.captures = False
    engine = backend("tensorrt").open([plan], Options(built=BUILT))
    for _ in range(4):
        np.testing.assert_array_equal(engine.run({"x": rows(2)})["y"], 2 * rows(2))
    error = capsys.readouterr().err
    assert error.count("no CUDA graph") == 1 and "cudaErrorStreamCaptureUnsupported" in error and device.launches == 0


def test_work_that_cannot_be_recorded_says_why(device, trt, plan, capsys) -> None:
    """CUDA then refuses to end the capture, too: TensorRT's reason is the one to read."""
    trt.unrecordable = "a loop cannot be captured"
    engine = backend("tensorrt").open([plan], Options(built=BUILT))
    for _ in range(3):
        np.testing.assert_array_equal(engine.run({"x": rows(2)})["y"], 2 * rows(2))
    error = capsys.readouterr().err
    assert error.count("no CUDA graph of tensorrt's work, it runs without: a loop cannot be captured\n") == 1
    engine.close()
    assert device.open == {}


@pytest.mark.parametrize(
    ("instantiates", "reason"), [(False, "cudaErrorMemoryAllocation"), (True, "cudaErrorStreamCaptureInvalidated")]
)
def test_a_recording_that_fails_leaves_nothing(device, instantiates, reason) -> None:
    stream = cuda.Stream()
    device.instantiates = instantiates
    with pytest.raises(cuda.CudaError, match=reason), cuda.Recording(stream):
        device.invalid = instantiates
    assert [*device.open.values()] == ["stream"]


def test_kernels_are_kept_for_the_next_time(device, trt, plan, tmp_path) -> None:
    cache = tmp_path / "cache"
    for kernels in ([], [b"kernels"]):
        engine = backend("tensorrt-rtx").open([plan], Options(built=BUILT, cache=cache))
        engine.close()
        assert trt.kernels == kernels
    assert [path.name for path in cache.iterdir()] == ["denoiser.tensorrt.kernels.checked"]


def test_a_cache_that_cannot_be_written_is_done_without(device, trt, plan) -> None:
    engine = backend("tensorrt-rtx").open([plan], Options(built=BUILT, cache=plan / "cache"))
    np.testing.assert_array_equal(engine.run({"x": rows(2)})["y"], 2 * rows(2))
    engine.close()
    assert device.open == {}


def test_kernels_that_cannot_be_kept_leave_nothing(device, trt, plan, tmp_path) -> None:
    file = tmp_path / "cache" / "denoiser.tensorrt.kernels.checked"
    file.mkdir(parents=True)  # which no file takes the place of
    backend("tensorrt-rtx").open([plan], Options(built=BUILT, cache=file.parent)).close()
    assert [*file.parent.iterdir()] == [file]


def test_kernels_of_a_shape_are_its_own_from_the_first_run_on(device, trt, plan) -> None:
    backend("tensorrt-rtx").open([plan], Options(built=BUILT)).close()
    eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    assert [made.dynamic_shapes_kernel_specialization_strategy for made in trt.settings] == [eager, eager]


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_memory_that_runs_out_is_one_line_and_given_back(device, trt, plan, name) -> None:
    for device.room in range(5):  # activations, x and y: on the device when it is opened, the host's when it runs
        with pytest.raises(EngineError, match=r"^cudaMalloc.*: cudaErrorMemoryAllocation$"):
            backend(name).open([plan], Options(built=BUILT)).run({"x": rows(2)})
        gc.collect()
        assert device.open == {}
    device.room = 5
    backend(name).open([plan], Options(built=BUILT)).run({"x": rows(2)})


def test_what_a_plan_was_built_with_is_done_for_it(device, trt, plan) -> None:
    for tuning, host_code, budget in (
        ({}, False, None),
        ({"version_compatible": True, "weight_streaming": True}, True, 60),
    ):
        backend("tensorrt").open([plan], Options(built={**BUILT, "tuning": tuning})).close()
        assert trt.runtime.engine_host_code_allowed is host_code
        trt.host_code = True  # from here on, as such a plan has it
        assert trt.engine.weight_streaming_budget_v2 == budget


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_annotations_of_the_build_cost_no_run_anything(device, trt, plan, name) -> None:
    """Engines are built with detailed annotations, for their census; NVIDIA's profiler gets none."""
    engine = backend(name).open([plan], Options(built=BUILT))
    assert {made().nvtx_verbosity for made in trt.contexts} == {trt.ProfilingVerbosity.NONE}
    engine.close()


def test_a_stripped_plan_takes_its_weights_from_the_onnx_form(device, trt, plan) -> None:
    backend("tensorrt").open([plan, Path("denoiser.onnx"), Path("denoiser.onnx.data")], Options(built=BUILT)).close()
    assert trt.refitted == ["denoiser.onnx"]
    with pytest.raises(BundleError, match=r"its weights are not those of other\.data"):
        backend("tensorrt").open([plan, Path("other.data")], Options(built=BUILT))
    trt.refuses = "refit_cuda_engine"
    with pytest.raises(BundleError, match=r"not those of denoiser\.onnx: refit_cuda_engine is not today's"):
        backend("tensorrt").open([plan, Path("denoiser.onnx")], Options(built=BUILT))


def made(datatype: str, *nodes: str, key: str = "Format/Datatype") -> dict:
    metadata = "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)
    return {"Name": "x", "Outputs": [{"Name": "y", "Format": "N/A", key: datatype}], "Metadata": metadata}


def test_an_engine_is_inspected_where_it_can_be_opened(device, trt) -> None:
    """In the words of several versions; a layer without details is told by its name alone."""
    trt.layers = [
        made("Half", "qkv", "bias"),
        made("Row major linear FP16 format", "proj"),
        made("Float"),
        made("BFloat16"),
        made("Row major linear INT8 format", "fc1", "quantize"),
        made("FP8"),
        made("Int64"),
        made("Half", "fc2", key="DataType"),  # of TensorRT 11
        made("Half", key="of another version"),
        {"Name": "no output"},
        "only a name",
    ]

    def inspect(*capabilities: str, **tuning: bool) -> dict[str, Any]:
        return backend("tensorrt")._inspected(trt, logger_of(trt), b"plan", capabilities, Tuning(**tuning))

    census = {"layers": {"fp16": 3, "fp32": 1, "bf16": 1, "int8": 1, "fp8": 1, "other": 2}, "fused": 2}
    assert inspect("8.6", "8.9") == census
    assert inspect("12.0") == {}
    trt.host_code = True  # as a version-compatible plan has
    assert inspect("8.9", version_compatible=True) == census
    assert inspect("8.9") == {}
    trt.host_code = False
    for trt.layers in (None, [{"Outputs": "none"}], [{"Metadata": None}]):  # words of a version to come
        assert inspect("8.9") == {}
    trt.opens = False
    assert inspect("8.9") == {}
    device.devices = 0
    assert inspect("8.9") == {}


def test_an_input_of_one_shape_is_in_no_profile(device, trt, plan, monkeypatch) -> None:
    """TensorRT has no bounds for it: those of the engine itself hold, in each profile."""
    monkeypatch.setattr(Engine, "get_tensor_shape", lambda self, name: (3, 3))
    monkeypatch.setattr(Engine, "get_tensor_profile_shape", lambda self, name, profile: [Unset()] * 3)
    engine = backend("tensorrt").open([plan], Options(built=BUILT))
    np.testing.assert_array_equal(engine.run({"x": rows(3)})["y"], 2 * rows(3))
    with pytest.raises(UsageError, match=r"no profile of this engine takes x \[2, 3\]"):
        engine.run({"x": rows(2)})
    engine.close()
    assert device.open == {}

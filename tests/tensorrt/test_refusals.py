"""Refusals before an engine is compiled, opened or run, with a driver, a GPU and a TensorRT that are fakes."""

from __future__ import annotations

import gc
import os
import re
from typing import Any
from unittest.mock import MagicMock

import pytest

from dit_runtime import UsageError
from dit_runtime.backends import Options, Tuning, backend
from dit_runtime.backends import trt as trt_backend
from dit_runtime.backends.trt import Flavour
from dit_runtime.bundle.manifest import Stage, TensorSpec
from dit_runtime.errors import BundleError, EngineError
from dit_runtime.progress import Progress
from tests.tensorrt.conftest import BUILT, rows
from tests.tensorrt.fake_tensorrt import Context, Unset


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("create_execution_context", "has no memory for this engine"),
        ("set_optimization_profile_async", "does not set profile 0"),
        ("set_input_shape", r"does not take x \[4, 3\]"),
        ("set_tensor_address", "does not bind x"),
        ("execute_async_v3", "does not run"),
    ],
)
def test_a_context_that_says_no(device, trt, plan, call, reason) -> None:
    trt.refuses = call
    with pytest.raises((EngineError, UsageError), match=f"^tensorrt {reason}: {call} is not today's$"):
        backend("tensorrt").open([plan], Options(built=BUILT)).run({"x": rows(2)})
    gc.collect()
    assert device.open == {}


@pytest.mark.parametrize("shape", [(-1, 3), Unset()], ids=["of a free size", "of no answer"])
def test_an_output_of_unknown_shape_is_refused(device, trt, plan, monkeypatch, shape) -> None:
    monkeypatch.setattr(Context, "get_tensor_shape", lambda self, name: shape)
    with pytest.raises(EngineError, match=r"^tensorrt does not know the shape of y: "):
        backend("tensorrt").open([plan], Options(built=BUILT))


@pytest.mark.parametrize(("made", "taken"), [(None, True), ("cache", False), ("cache", True)])
def test_a_timing_cache_that_does_not_fit_is_refused(made, taken) -> None:
    spec = TensorSpec("x", "float32", ("batch", 3))
    stage, builder = Stage("denoiser", "step", (spec,), (spec,), "denoiser.onnx"), MagicMock()
    config = builder.create_builder_config.return_value
    config.create_timing_cache.return_value, config.set_timing_cache.return_value = made, taken

    def configure() -> Any:
        return backend("tensorrt")._configure(MagicMock(), builder, None, stage, Tuning(timing_cache="of-another"), ())

    if made and taken:
        assert configure() is config
    else:
        with pytest.raises(UsageError, match="timing-cache of-another: tensorrt does not take it"):
            configure()


def test_a_gpu_without_room_for_the_weights_is_refused_before_the_work(device, trt, tmp_path) -> None:
    spec = TensorSpec("x", "float32", ("batch", 3))
    stage = Stage("denoiser", "step", (spec,), (spec,), "denoiser.onnx", precision="fp16")
    for file, size in zip(stage.onnx_files, (1 << 20, 400 << 20), strict=True):
        (tmp_path / file).touch()
        os.truncate(tmp_path / file, size)  # a hole, on most file systems
    device.free = 300 << 20

    def compile_(**tuning: Any) -> None:
        backend("tensorrt").compile(tmp_path, stage, Options(precision="fp16", tuning=Tuning(**tuning)), Progress())

    with pytest.raises(UsageError, match=r"0\.3 GB of GPU memory free, expected 0\.4 GB to compile this graph"):
        compile_()
    for free, tuning in ((402 << 20, {}), (0, {"weight_streaming": True})):  # of which the GPU holds a part
        device.free = free
        with pytest.raises(AttributeError, match="Builder"):  # the work, which the fake has not
            compile_(**tuning)


@pytest.mark.parametrize(("version", "taken"), [("10.13.3.9", False), ("10.14.1.48", True), ("11.4.0.106", True)])
def test_a_tensorrt_whose_parser_lacks_attention_is_too_old(monkeypatch, version, taken) -> None:
    module = object()
    monkeypatch.setattr(trt_backend, "import_module", lambda name: module)
    monkeypatch.setattr(Flavour, "version", lambda self: version)
    if taken:
        assert backend("tensorrt").load() is module
    else:
        with pytest.raises(UsageError, match=r"tensorrt 10\.13\.3\.9 is too old; expected 10\.14 or later"):
            backend("tensorrt").load()


def test_a_timing_cache_needs_a_folder_before_the_work(device, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert backend("tensorrt").targets("fp16", Tuning(timing_cache="~/trt.cache")) == ("8.9",)
    with pytest.raises(UsageError, match=f"the folder {tmp_path}/nowhere does not exist"):
        backend("tensorrt").targets("fp16", Tuning(timing_cache="~/nowhere/trt.cache"))


def test_a_runtime_that_does_not_start(device, trt, plan) -> None:
    trt.starts = False
    with pytest.raises(UsageError, match=r"tensorrt does not start here: .*returned nullptr"):
        backend("tensorrt").open([plan], Options(built=BUILT))


@pytest.mark.parametrize(
    ("change", "built", "reason"),
    [
        ({"driver": 0}, {}, "no NVIDIA driver"),
        ({"devices": 0}, {}, "no NVIDIA GPU"),
        ({"driver": 12080}, {}, "the NVIDIA driver has CUDA 12, expected 13"),
        ({"capability": "9.0"}, {}, "compute capability 9.0 here, and the engine is for 8.6, 8.9"),
        (
            {"capability": "7.5"},
            {"compute_capabilities": ["8.0+"]},
            "compute capability 7.5 here, and the engine is for",
        ),
        ({}, {"version": "1.7.0"}, "built by tensorrt-rtx 1.7.0, and here is 1.7.1"),
        ({}, {"version": "1.8.0", "tuning": {"version_compatible": True}}, "built by tensorrt-rtx 1.8.0"),
        ({}, {"version": "0.9", "tuning": {"version_compatible": True}}, "built by tensorrt-rtx 0.9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_before_it_is_deserialized(device, trt, plan, change, built, reason) -> None:
    vars(device).update(change)
    trt.Runtime = None  # which would be called
    with pytest.raises(
        BundleError, match=f"cannot run here: {re.escape(reason)}.*dit-run compile .* --backend tensorrt-rtx"
    ) as refused:
        backend("tensorrt-rtx").open([plan], Options(built={**BUILT, **built}))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("capability", "built"),
    [
        ("8.6", {}),
        ("12.0", {"compute_capabilities": ["8.0+"]}),
        ("8.9", {"version": "1.6", "tuning": {"version_compatible": True}}),
    ],
)
def test_what_is_not_refused(device, trt, plan, capability, built) -> None:
    device.capability = capability
    backend("tensorrt-rtx").open([plan], Options(built={**BUILT, **built})).close()


def test_an_engine_that_tensorrt_itself_refuses(device, trt, plan) -> None:
    trt.opens = False
    with pytest.raises(BundleError, match="open it: the plan is of another GPU; on the target, make it with: dit-run"):
        backend("tensorrt").open([plan], Options(built=BUILT))
    assert device.open == {}

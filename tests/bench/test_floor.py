"""The floor: the paper's own figures, and the fastest rate of all that were timed."""

from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from dit_export.bench.floor import (
    BITS,
    GEMMS,
    LAUNCHES,
    Gemms,
    _cuda,
    floor,
    flops,
    full_range,
    gemm_shapes,
    rates,
    step_bytes,
    step_flops,
)
from dit_export.bench.run import problems
from dit_export.networks.dit import DiT
from dit_export.networks.spec import CONDITIONINGS, ModelSpec, model, with_conditioning

# Gflops of Peebles & Xie (arXiv 2212.09748), table 4: multiply-adds of one row at 256 px.
PAPER = {"S/2": 6.06, "B/2": 23.01, "L/2": 80.71, "XL/2": 118.64, "S/4": 1.41, "XL/8": 7.39, "B/8": 1.42, "L/4": 19.70}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_figures(name):
    # The paper's come from a profiler that sees every linear and no bias; 1 % is one unit of its last digit at S/4.
    assert sum(flops(model(name))) / 2e9 == pytest.approx(PAPER[name], rel=0.01)


def test_the_papers_figure_at_512_pixels():
    assert sum(flops(replace(model("XL/2"), latent_size=64))) / 2e9 == pytest.approx(524.60, rel=0.01)


def test_a_guided_step_is_two_rows_a_picture_without_what_is_hoisted():
    spec = model("S/2")
    assert step_flops(spec, 3) == 3 * step_flops(spec, 1)
    assert 2 * flops(spec).blocks < step_flops(spec, 1) < 2 * sum(flops(spec))
    linears = sum(2 * m * k * n for m, k, n in gemm_shapes(spec, 1)) * spec.depth
    attention = 2 * spec.depth * 4 * spec.tokens**2 * spec.hidden
    assert linears + attention == 2 * flops(spec).blocks


def test_rates_take_the_fastest_call_of_any_library_and_of_a_wider_precision():
    seconds = {
        "pytorch": {"fp32": {"10x10x10": [2e-6, 1e-6]}, "bf16": {"10x10x10": [4e-6]}},
        "onnxruntime": {"fp32": {"10x10x10": [5e-6], "20x10x10": [1.6e-6, 9e-6]}},
    }
    fastest = rates(seconds)
    assert fastest["fp32"] == (pytest.approx(4000 / 1.6e-6), "onnxruntime")
    assert fastest["bf16"] == fastest["fp32"]  # bf16 in software is slower than fp32, and nobody must use it
    assert fastest["fp16"] == fastest["bf16"]
    assert "int8" not in fastest  # nothing as narrow was timed: no floor rather than a wrong one


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_step_reads_the_weights_of_its_linears_once(conditioning):
    spec = with_conditioning(model("S/2"), conditioning)
    with torch.device("meta"):
        network = DiT(spec)
    hoisted = ("embedders.", "modulation.", "cross.kv.")
    weights = sum(
        weight.numel()
        for name, weight in network.named_parameters()
        if weight.ndim in (2, 4) and not any(part in name for part in hoisted)
    )
    assert step_bytes(spec, "fp32") == 4 * weights
    assert step_bytes(spec, "fp8") == step_bytes(spec, "int8") == weights


def test_the_floor_is_the_larger_of_work_and_bytes():
    spec = model("S/2")
    work, size = step_flops(spec, 1), step_bytes(spec, "fp16")
    compute = floor(spec, 1, "fp16", work / 2.0, "pytorch", size / 1.0)
    assert compute["step"] == pytest.approx(2.0) and compute["bytes"] == size
    assert floor(spec, 1, "fp16", work / 2.0, "pytorch", size / 3.0)["step"] == pytest.approx(3.0)
    assert floor(spec, 2, "fp16", work / 2.0, "pytorch", size / 3.0)["step"] == pytest.approx(4.0)  # bytes stay
    on_cpu = floor(spec, 1, "fp16", work / 2.0, "pytorch", None)
    assert on_cpu["step"] == pytest.approx(2.0) and "bytes" not in on_cpu


def test_every_precision_of_a_gpu_has_a_size():
    assert {*GEMMS["cuda"]["pytorch"]} == {*BITS}
    assert rates({"pytorch": {"fp16": {"1x1x1": [1.0]}, "fp8": {"1x1x1": [2.0]}}})["fp8"] == (2.0, "pytorch")


def test_a_floor_above_a_measurement_is_a_bug(result):
    assert problems(result["rows"], result["floors"]) == []
    result["floors"]["bf16"]["step"] = 0.0395  # the least is 98 % of 40 ms
    (problem,) = problems(result["rows"], result["floors"])
    assert problem.startswith("ours-openvino-bf16: a step of 39.20 ms is below the floor of 39.50 ms")


@pytest.mark.parametrize("error", [0.4, float("nan")])
def test_a_competitor_that_computes_something_else_is_named(result, error):
    result["rows"][1]["error"] = error
    (problem,) = problems(result["rows"], {})
    assert problem.startswith("plain-openvino-bf16: its prediction is")


@pytest.mark.parametrize(("precision", "largest"), [("int8", 127), ("fp8", 448), ("fp16", 3)])
def test_operands_use_the_range_of_their_type(precision, largest):
    """Small integers have few bits set: a card draws less power and multiplies them faster than a network's."""
    for operand in full_range((64, 64, 64), precision):
        assert 0.8 * largest <= np.abs(operand).max() <= (448 if precision == "fp8" else 2 * largest)
        assert np.unique(operand.astype(np.int8)).size > (100 if precision == "int8" else 4)


def test_a_gpus_products_are_launched_by_a_graph(monkeypatch):
    """Launched from Python, the product of a batch of 1 would be a measurement of Python."""
    products, graph = [], MagicMock()
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *operands: products.append(1) or linear(*operands))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch, "ones", lambda shape, device: 1.0)
    for name, value in (("CUDAGraph", lambda: graph), ("graph", MagicMock()), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    timed = _cuda((8, 8, 8), "fp32", 1)
    assert len(products) > LAUNCHES
    products.clear()
    timed()
    assert products == [] and graph.replay.called


@pytest.mark.parametrize("library", GEMMS["cpu"])
def test_each_library_times_each_shape(library):
    spec = ModelSpec(depth=1, hidden=32, heads=2, patch=2, latent_size=4)
    timed = Gemms(library, spec, batch=1, threads=1, precisions=("fp32", "bf16", "int8")).run()
    assert tuple(timed) == GEMMS["cpu"][library]
    for shapes in timed.values():
        assert list(shapes) == ["8x32x96", "8x32x32", "8x32x128", "8x128x32"]
        assert np.isfinite(list(shapes.values())).all()

"""Engines, rows and the loop on a device: the real CUDA runtime where there is a GPU, else a fake one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from dit_runtime.backends import Options, backend, cuda
from dit_runtime.backends.trt import Flavour
from dit_runtime.sampling import loops
from tests.gpu import double
from tests.gpu.double import MOST, WIDTH, TensorRT
from tests.tensorrt.fake_cuda import Cuda

SAMPLES, STEPS, CONDITIONS = 5, 6, 4
FLAVOURS = ["tensorrt", "tensorrt-rtx"]


@pytest.fixture(params=["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def driver(request, monkeypatch) -> Cuda | None:
    """None: the one of this machine."""
    if request.param == "fake":
        fake = Cuda()
        monkeypatch.setattr(cuda, "runtime", lambda: fake)
        return fake
    if reason := cuda.why_unavailable():
        pytest.skip(reason)
    pytest.importorskip("cupy")
    return None


@pytest.fixture
def trt(driver, monkeypatch) -> TensorRT:
    made = TensorRT(driver)
    monkeypatch.setattr(Flavour, "load", lambda self: made)
    monkeypatch.setattr(Flavour, "version", lambda self: "1.7.1")
    return made


@pytest.fixture
def opened(trt, tmp_path) -> Callable[..., object]:
    built = {"version": "1.7.1", "cuda": 12, "compute_capabilities": [cuda.capability()], "tuning": {}}

    def open_engine(flavour: str, network: str, beside: object = None) -> object:
        plan = tmp_path / f"{network}.engine"
        plan.write_bytes(network.encode())
        return backend(flavour).open([plan], Options(built=built, beside=beside))

    return open_engine


def inputs(rows: int, groups: int, seed: int = 0) -> dict[str, NDArray]:
    random = np.random.default_rng(seed)
    shapes = {"latents": (rows, WIDTH), "conditioning": (groups, rows, 2), "guidance": (rows,)}
    arrays = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return arrays | {"labels": np.arange(rows) + seed}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_both_profiles_at_every_shape(opened, flavour) -> None:
    """Each three times, of other numbers: set up, recorded, replayed."""
    engine = opened(flavour, "step")
    results = []
    for rows, groups in ((1, 1), (3, 2), (3, 1), (2, 2), (3, 2), (1, 1)):
        for seed in range(3):
            feeds = inputs(rows, groups, seed)
            results.append((feeds, engine.run(feeds)["prediction"]))
    for feeds, got in results:  # after all runs: what came out is not overwritten
        np.testing.assert_array_equal(got, double.step(feeds)["prediction"])
    engine.close()


def test_a_shape_that_stays_is_replayed(opened, trt) -> None:
    engine = opened("tensorrt", "step")
    enqueued = []
    for seed in range(6):
        feeds = inputs(MOST, 2, seed)
        np.testing.assert_array_equal(engine.run(feeds)["prediction"], double.step(feeds)["prediction"])
        enqueued.append(trt.enqueued)
    assert enqueued[2:] == [enqueued[1]] * 4  # two runs set up and record, the others launch what was recorded
    engine.close()


class Host:
    """The same two networks in NumPy, with arrays that stay where they are."""

    def put(self, values: NDArray) -> NDArray:
        return values.copy()

    def denoise(self, feeds: dict, into: dict) -> None:
        into["prediction"][...] = double.step(feeds)["prediction"]

    def update(self, feeds: dict, into: dict) -> None:
        made = double.update(feeds)  # before any is written: the next state is the state's array
        for name, target in into.items():
            target[...] = made[name]


def sampled(put, denoise, update, groups: Sequence[int]) -> NDArray[np.float64]:
    """Go all steps, with one number of groups after the other, and chunks of 2, 2 and 1 samples; bring the state home
    once in between."""
    random = np.random.default_rng(1)
    matrices = random.standard_normal((STEPS, 2, 3)) / 2
    x = random.standard_normal((SAMPLES, WIDTH))
    table = put(random.standard_normal((STEPS * CONDITIONS, 2)).astype(np.float32))
    guidance = put(random.standard_normal(SAMPLES).astype(np.float32))
    labels = put(np.arange(SAMPLES))
    which = random.integers(0, CONDITIONS, (max(groups), SAMPLES))

    def step_inputs(step: int, samples: slice) -> dict:
        rows = table[CONDITIONS * step + which[: groups[step % len(groups)], samples]]
        return {"conditioning": rows, "guidance": guidance[samples], "labels": labels[samples]}

    advance = loops.with_matrices(matrices, loops.Device(put, denoise, update, "latents"), x, step_inputs, 2)
    for step in range(STEPS):
        home = advance(step)
        if step == 2:
            home()
    return home()


@pytest.mark.parametrize("records", [True, False], ids=["recorded", "not recorded"])
@pytest.mark.parametrize("groups", [(1,), (2,), (2, 2, 1)], ids=str)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_loop_on_the_device_is_the_hosts_to_the_bit(opened, monkeypatch, capsys, flavour, groups, records) -> None:
    def refused(self) -> None:
        raise cuda.CudaError("recording is off")

    if not records:
        monkeypatch.setattr(cuda.Recording, "__enter__", refused)
    step = opened(flavour, "step")
    update = opened(flavour, "update", step)
    got = sampled(step.put, step.run, update.run, groups)
    host = Host()
    np.testing.assert_array_equal(got, sampled(host.put, host.denoise, host.update, groups))
    update.close()
    step.close()


def test_rows_are_numpys(driver) -> None:
    stream = cuda.Stream()
    values = np.arange(24, dtype=np.float32).reshape(6, 2, 2)
    rows = cuda.Rows.put(values, stream)
    for which in (slice(1, 4), 3, np.array([5, 0, 1, 2]), np.array([[1, 1], [0, 5]])):
        np.testing.assert_array_equal(np.asarray(rows[which]), values[which])


def test_what_is_put_may_change_at_once(driver) -> None:
    stream = cuda.Stream()
    values = np.ones(1 << 12 if driver else 1 << 26, np.float32)  # 256 MB take longer to copy than to overwrite a part
    rows = cuda.Rows.put(values, stream)
    values[...] = 7
    got = np.asarray(rows)
    assert got.min() == got.max() == 1


def test_everything_is_given_back(opened, driver) -> None:
    def held() -> int:
        gc.collect()
        return len(driver.open) if driver else -int(cuda.runtime().cudaMemGetInfo()[1])

    def once() -> None:
        engine = opened("tensorrt", "step")
        for seed in range(4):
            engine.run(inputs(3, 2, seed))
        engine.close()

    once()  # leaves CUDA's own context, and the kernels
    before = held()
    for _ in range(8):
        once()
    assert held() <= before + (0 if driver else 4 << 20)

"""A whole bundle on a GPU and a TensorRT that are fakes: what stays on the device, what crosses, what is given back."""

from __future__ import annotations

import gc
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dit_runtime import EngineError, Pipeline, verify
from dit_runtime import run as run_module
from dit_runtime.backends import Options, cuda
from dit_runtime.backends.trt import Flavour
from dit_runtime.backends.trt_engine import TrtEngine
from dit_runtime.sampling import loops
from dit_runtime.sampling.noise import Noise
from tests.tamper import edit, seal
from tests.tensorrt.fake_cuda import Cuda
from tests.tensorrt.fake_tensorrt import TensorRT

BUILT = {"version": "1.7.1", "cuda": 13, "compute_capabilities": ["8.9"], "tuning": {}}
LABELS = [1, 3, 0, 4, 3]  # more than the three rows that an engine takes
OPTIONS = {"steps": 25, "guidance": 3.0, "seed": 2, "output": "latents"}
UP, HOME, WITHIN = 1, 2, 3
FREE_RUN = 1e-4  # the same networks on the same CPU, the latents in float32; measured 4e-7


@pytest.fixture
def device(monkeypatch) -> Cuda:
    fake = Cuda()
    monkeypatch.setattr(cuda, "runtime", lambda: fake)
    monkeypatch.setattr(Flavour, "load", lambda self: TensorRT(fake))
    monkeypatch.setattr(Flavour, "version", lambda self: "1.7.1")
    return fake


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def compiled(request, handmade, device, tmp_path):
    """A kind's bundle with engines of a backend that the fakes open."""

    def compile_(kind: str) -> Path:
        folder = Path(shutil.copytree(handmade(kind), tmp_path / "bundle"))

        def change(table: dict) -> None:
            table["built_with"]["engines"] = {request.param: {}}
            for stage in table["stages"]:
                engine = f"{stage['name']}.{request.param}.engine"
                (folder / engine).write_text(str(folder / stage["onnx"]))
                stage |= {"backend": request.param, "engines": {request.param: [engine]}}
                table["files"][engine] = {}
                table["built_with"]["engines"][request.param][stage["name"]] = BUILT

        edit(folder, change)
        seal(folder)
        return folder

    return compile_


@pytest.fixture
def puts(monkeypatch) -> Counter[int]:
    """Count, by size, the arrays that go to the device to be read there at every step."""
    sizes: Counter[int] = Counter()
    put = cuda.Rows.put

    def counted(values: np.ndarray, stream: cuda.Stream) -> cuda.Rows:
        sizes[values.nbytes] += 1
        return put(values, stream)

    monkeypatch.setattr(cuda.Rows, "put", counted)
    return sizes


@pytest.fixture
def bundle(compiled) -> Path:
    return compiled("labels")


@pytest.fixture
def pipe(bundle):
    with Pipeline.load(bundle) as opened:
        yield opened


def far(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


@pytest.mark.parametrize("solver", ["ddim", "dpm++"])
def test_the_pictures_of_the_cpu(handmade, pipe, solver) -> None:
    with Pipeline.load(handmade("labels"), threads=1) as other:
        expected = other.sample(LABELS, **OPTIONS, solver=solver)
    assert 0 < far(pipe.sample(LABELS, **OPTIONS, solver=solver), expected) <= FREE_RUN


def test_a_matrix_that_forgets_is_seen(handmade, pipe, monkeypatch) -> None:
    with Pipeline.load(handmade("labels"), threads=1) as other:
        expected = other.sample(LABELS, **OPTIONS, solver="dpm++")
    linear = run_module.linear
    monkeypatch.setattr(run_module, "linear", lambda *arguments, **how: linear(*arguments, **how) * [1, 1, 0])
    assert far(pipe.sample(LABELS, **OPTIONS, solver="dpm++"), expected) > 100 * FREE_RUN


def crossed(pipe, device, kind: int, **options) -> int:
    """Copies of a run, but for those of the conditioner: two inputs up, three rows at a time."""
    before = sum(count for (which, _), count in device.copied.items() if which == kind)
    options = OPTIONS | options
    pipe.sample(LABELS[:3], **options)
    calls = math.ceil(4 * options["steps"] / 3)  # three labels and the null label
    made = 2 * calls if kind == UP else 0
    return sum(count for (which, _), count in device.copied.items() if which == kind) - before - made


def test_nothing_crosses_in_a_step(pipe, device) -> None:
    """However many steps: what goes up goes before the first, and only the last latents come home."""
    (up, home), (more_up, more_home) = (
        [crossed(pipe, device, kind, steps=steps) for kind in (UP, HOME)] for steps in (2, 10)
    )
    assert (up, home) == (more_up, more_home)
    watched = crossed(pipe, device, HOME, steps=10, on_step=lambda *_: None)
    assert watched == home + 10
    # Told to draw noise, it is the solver's loop: latents go up and predictions and variances come home.
    assert crossed(pipe, device, UP, steps=10, eta=0.5) == crossed(pipe, device, UP, steps=2, eta=0.5) + 8


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_the_conditioning_never_leaves_the_device(pipe, device, eta) -> None:
    """Its engine writes the rows of all steps where the denoiser's engine reads them."""
    device.copied.clear()
    pipe.sample(LABELS[:3], **OPTIONS | {"eta": eta})
    _, vectors, width = pipe.manifest.before_loop[0].gives[0].shape
    row = 4 * vectors * width
    state, matrices = 4 * 3 * math.prod(pipe.manifest.state.shape), 4 * 25 * 2 * 3
    copies = {(kind, size): count for (kind, size), count in device.copied.items() if size not in (state, matrices)}
    assert not {(kind, size) for kind, size in copies if kind != WITHIN and size >= row}
    moved = {size: count for (kind, size), count in copies.items() if kind == WITHIN and size % row == 0}
    made = 25 * 4  # steps x (three labels and the null label)
    assert sum(size * count for size, count in moved.items()) == (made + 25 * 2 * 3) * row


@pytest.mark.parametrize("kind", ["captioned", "wave"])
def test_what_no_step_changes_goes_up_once_a_run(compiled, handmade, puts, kind) -> None:
    """Five samples where an engine takes three: the parts are picked on the device, not sent again at each step."""
    condition = {
        "captioned": {"captions": Noise(1).normal((5, 5, 3))},
        "wave": {"words": Noise(1).normal((5, 3, 4)), "pooled": Noise(2).normal((5, 5))},
    }[kind]
    negative = {name: 0 * rows[:1] for name, rows in condition.items()}
    options = OPTIONS | {"condition": condition, "negative": negative}
    with Pipeline.load(handmade(kind), threads=1) as other:
        expected = other.sample(**options)
    with Pipeline.load(compiled(kind)) as pipe:
        assert far(pipe.sample(**options), expected) <= FREE_RUN
        calls: list[int] = []
        for steps in (2, 10):
            before = puts.total()
            pipe.sample(**options | {"steps": steps})
            calls.append(puts.total() - before)
        assert calls[0] == calls[1] > 0


def test_what_is_queued_is_not_overtaken(pipe, monkeypatch) -> None:
    """Without its wait, an upload would change what an earlier one has not taken yet: the fake's queue shows it."""
    rows = {"latents": np.ones((1, *pipe.manifest.state.shape), np.float32)}
    rows |= {"prediction": rows["latents"], "previous": rows["latents"]}
    denoiser, update = pipe.engines.residents()
    for expected in (True, False):
        targets = [denoiser.put(np.zeros_like(rows["latents"])) for _ in range(2)]
        with monkeypatch.context() as patch:
            if not expected:
                patch.setattr(cuda.Stream, "wait", lambda self: None)
            for number, target in enumerate(targets, 1):
                update.run(rows | {"coefficients": np.full((2, 3), number, np.float32)}, {"next": target})
        means = [float(np.asarray(target).mean()) for target in targets]
        assert (means == [3.0, 6.0]) is expected


def test_everything_is_given_back(pipe, device) -> None:
    after = []
    for _ in range(2):  # the first opens the update's engine, and takes the host's memory where it is needed
        pipe.sample(LABELS, **OPTIONS)
        pipe.sample(LABELS, **OPTIONS | {"eta": 0.5})
        gc.collect()
        after.append(len(device.open))
    assert after[0] == after[1]
    pipe.close()
    assert device.open == {}


def test_uneven_parts_are_recorded_once(pipe, device) -> None:
    """Five samples where an engine takes three: in steps of 3 and 2, with no recording after the first few."""
    for _ in range(2):
        pipe.sample(LABELS, **OPTIONS)
    recorded = device.instantiated
    pipe.sample(LABELS, **OPTIONS | {"steps": 40})
    assert device.instantiated == recorded


def test_a_warmed_pipeline_opens_nothing_more(bundle, monkeypatch) -> None:
    """The update's engine is opened where a run comes to it."""
    with Pipeline.load(bundle) as pipe:
        assert "update" not in pipe.engines.opened
    with Pipeline.load(bundle, warm=(3,)) as pipe:
        monkeypatch.setattr(Flavour, "open", None)
        assert np.isfinite(pipe.sample(LABELS[:3], **OPTIONS)).all()


def test_low_memory_keeps_nothing(pipe, device) -> None:
    pipe.close()
    pipe.engines.options = Options(low_memory=True)
    assert crossed(pipe, device, UP, steps=10) > crossed(pipe, device, UP, steps=2)
    assert [*pipe.engines.opened] == ["denoiser"]
    pipe.close()
    assert device.open == {}


def test_a_pipeline_that_does_not_open_keeps_nothing(bundle, device, monkeypatch) -> None:
    Pipeline.load(bundle).close()
    closed = []
    close = TrtEngine.close
    monkeypatch.setattr(TrtEngine, "close", lambda self: (closed.append(self), close(self)))
    # One for activations and one for each input and output: the conditioner has 3 of those, the denoiser 5.
    for device.room, opened in ((0, 0), (4, 1), (9, 1)):
        closed.clear()
        with pytest.raises(EngineError, match="cudaMalloc: cudaErrorMemoryAllocation"):
            Pipeline.load(bundle)
        assert len(closed) == opened  # at once, for a notebook keeps what was raised
        closed.clear()
        gc.collect()
        assert device.open == {}


def test_every_engine_is_closed_whichever_fails(bundle, device, monkeypatch) -> None:
    pipe = Pipeline.load(bundle)
    monkeypatch.setattr(pipe.engines.opened["denoiser"], "close", lambda: 1 / 0)
    engines = dict(pipe.engines.opened)
    with pytest.raises(ZeroDivisionError):
        pipe.close()
    closed = {name for name, engine in engines.items() if engine._engine is None}
    assert closed == {"conditioner", "decoder"}


def test_verified_where_an_engine_takes_one_row(bundle) -> None:
    """The reference has two samples; the engine's own most is the manifest's."""

    def change(table: dict) -> None:
        next(stage for stage in table["stages"] if stage["runs"] == "step")["max_batch"] = 1

    edit(bundle, change)
    with Pipeline.load(bundle) as pipe:
        figures = verify.verify(pipe)
    metrics = {figure.metric for figure in figures}
    assert all(figure.passed for figure in figures) and {"prediction, rel-L2", "null condition, rel-L2"} <= metrics


def test_what_is_put_may_change_at_once(device) -> None:
    stream = cuda.Stream()
    values = np.ones((2, 3), np.float32)
    rows = cuda.Rows.put(values, stream)
    values[...] = 7
    np.testing.assert_array_equal(np.asarray(rows), 1)


def test_rows_are_numpys(device) -> None:
    stream = cuda.Stream()
    values = np.arange(24, dtype=np.float32).reshape(6, 2, 2)
    rows = cuda.Rows.put(values, stream)
    for which in (slice(1, 4), 3, np.array([5, 0, 1, 2]), np.array([[1, 1], [0, 5]])):
        np.testing.assert_array_equal(np.asarray(rows[which]), values[which])
        assert rows[which].shape == values[which].shape
    assert np.asarray(rows[1:5][::2][:, None]).shape == (2, 1, 2, 2)
    assert loops._chunks(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 6)]

"""Warm pipelines: a request of a size that was warmed opens nothing, compiles nothing and has no new shape."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping

import numpy as np
import pytest

from dit_runtime import EngineError, Pipeline, UsageError, backends
from dit_runtime.bundle import manifest
from dit_runtime.facts import DEFAULT_STEPS
from dit_runtime.sampling.noise import Noise
from dit_runtime.warming import made_up
from tests.tamper import edit, seal, weight

Shapes = set[tuple[str, tuple[int, ...]]]
STEP_OR_END = ("denoiser", "decoder")
OPTIONS = {
    "labels": {"labels": [1, 3, 2]},
    "captioned": {
        "condition": {"captions": Noise(1).normal((3, 4, 3))},
        "negative": {"captions": Noise(2).normal((1, 2, 3))},
    },
    "wave": {"condition": {"words": Noise(3).normal((3, 2, 4)), "pooled": Noise(4).normal((3, 5))}},
    "video": {"labels": [0, 1, 2], "condition": {"rate": np.array([0.5, 0.1, 2.0])}},
    "free": {},
}


@pytest.fixture
def shapes(monkeypatch) -> Shapes:
    """Record the shapes that opened engines run at, by stage: of the loop and of the decoder, their inputs' shapes."""
    recorded: Shapes = set()
    module = backends.backend("onnxruntime")
    open_ = module.open

    class Watched:
        def __init__(self, files, options) -> None:
            self.stage, self.engine = files[0].stem, open_(files, options)
            self.io, self.close = self.engine.io, self.engine.close

        def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            if self.stage in STEP_OR_END:
                recorded.update((f"{self.stage} {name}", values.shape) for name, values in inputs.items())
            return self.engine.run(inputs)

    monkeypatch.setattr(module, "open", Watched)
    return recorded


@pytest.mark.parametrize("kind", OPTIONS)
def test_requests_have_no_new_shapes(handmade, shapes, kind) -> None:
    with Pipeline.load(handmade(kind), threads=1, warm=(1, 3)) as pipe:
        warmed = set(shapes)
        output = "images" if pipe.manifest.end else "latents"
        for count in (1, 3):
            for guidance in (3.0, 1.0):
                options = {name: rows[:count] for name, rows in OPTIONS[kind].items() if name == "labels"}
                condition = OPTIONS[kind].get("condition", {})
                options["condition"] = {name: rows[:count] for name, rows in condition.items()}
                options["negative"] = OPTIONS[kind].get("negative") if guidance != 1 else None
                pipe.sample(**options, guidance=guidance, seed=[*range(count)], steps=2, output=output)
                assert warmed and shapes == warmed
    shapes.clear()
    Pipeline.load(handmade(kind), threads=1).close()
    assert not shapes


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("warm", [(), (1, 3)], ids=["cold", "warm"])
def test_first_requests_need_no_file(bundle, tmp_path, monkeypatch, backend, warm) -> None:
    """To open or to compile a graph takes what was read of its files at first; the bundle is gone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "platform", "linux")  # where two rows run at once, and a single one by another copy
    monkeypatch.setattr(backends.backend("openvino"), "UNLIKE", tmp_path / "cpu_atom")

    def change(table: dict) -> None:
        for stage in table["stages"]:
            stage["backend"] = backend

    edit(bundle, change)
    with Pipeline.load(bundle, threads=2, warm=warm) as pipe:
        assert len(pipe.engines.opened) == 3  # none is still being opened
        shutil.rmtree(bundle)
        requests = [([1], 1.0), ([2, 3, 4], 4.0), ([2], 4.0), ([1, 2, 3], 1.0)]
        for labels, guidance in requests:
            assert pipe.sample(labels, guidance=guidance, steps=2).std() > 0


def test_warming_changes_no_picture(handmade) -> None:
    with Pipeline.load(handmade("labels"), threads=1) as pipe:
        expected = pipe.sample([3], steps=3)
    with Pipeline.load(handmade("labels"), threads=1, warm=(3,)) as pipe:
        np.testing.assert_array_equal(pipe.sample([3], steps=3), expected)


def test_made_up_numbers_refuse_no_bundle(bundle, shapes) -> None:
    """A narrow type may overflow with them; the decoder is warmed all the same."""
    weight(bundle, "denoiser", name="mixed")[0] = np.nan
    seal(bundle)
    with Pipeline.load(bundle, threads=1, warm=(2,)) as pipe:
        assert {name.split()[0] for name, _ in shapes} == {"denoiser", "decoder"}
        with pytest.raises(EngineError, match="not finite"):
            pipe.sample([1], steps=2)


def test_a_schedule_of_few_steps(bundle) -> None:
    """A run of the default steps is more than these have."""

    def change(table: dict) -> None:
        table["process"]["train_steps"] = 7

    edit(bundle, change)
    assert DEFAULT_STEPS > 7
    with Pipeline.load(bundle, threads=1, warm=(1,)) as pipe:
        assert pipe.manifest.process.train_steps == 7


@pytest.mark.parametrize(
    ("warm", "low_memory", "words"),
    [
        ((0,), False, "warm has 0; expected batch sizes from 1 to 3, where requests are split"),
        ((1, 4), False, "warm has 4"),
        ((True,), False, "warm has True"),
        (("1",), False, "warm has '1'"),
        ((1,), True, "got both warm and low_memory"),
    ],
    ids=str,
)
def test_refused_before_anything_is_opened(handmade, monkeypatch, warm, low_memory, words) -> None:
    monkeypatch.setattr(backends.backend("onnxruntime"), "open", None)
    with pytest.raises(UsageError, match=words):
        Pipeline.load(handmade("labels"), warm=warm, low_memory=low_memory)


def test_an_engine_that_fails_leaves_nothing_open(handmade, monkeypatch) -> None:
    module = backends.backend("onnxruntime")
    closed: list[object] = []
    monkeypatch.setattr(module.OrtEngine, "run", lambda self, inputs: 1 / 0)
    monkeypatch.setattr(module.OrtEngine, "close", lambda self: closed.append(self))
    with pytest.raises(EngineError, match="the conditioner's engine failed: division by zero"):
        Pipeline.load(handmade("labels"), warm=(1,))
    assert len(closed) == 3


def test_made_up_conditions_are_what_ports_take(handmade) -> None:
    for kind in OPTIONS:
        contract = manifest.read(handmade(kind))
        rows = made_up(contract, 7)
        assert {name: (values.dtype.name, values.shape) for name, values in rows.items()} == {
            port.name: (port.dtype, (7, *port.shape)) for port in contract.conditions
        }
        for port in contract.conditions:
            assert not port.size or rows[port.name].max() < port.size
            assert not port.masks or (rows[port.name] == 1).all()

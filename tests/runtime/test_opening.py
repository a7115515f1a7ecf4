"""Stages that open in the background: who waits for them, and what becomes of one that does not open."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from dit_runtime import BundleError, Pipeline, Request, backends

LABELS = [3, 0]
WAIT = 30  # seconds, after which a test that hangs fails


@pytest.fixture
def gate(monkeypatch) -> Callable[[str], threading.Event]:
    """Let a stage open only after an event."""
    module = backends.backend("onnxruntime")
    open_ = module.open

    def hold(stage: str) -> threading.Event:
        event = threading.Event()

        def held(files, options):
            if files[0].name.startswith(stage):
                assert event.wait(WAIT)
            return open_(files, options)

        monkeypatch.setattr(module, "open", held)
        return event

    return hold


def test_only_the_pictures_wait_for_the_decoder(bundle, gate) -> None:
    with Pipeline.load(bundle, threads=1) as pipe:
        expected = pipe.sample(LABELS, steps=3)
    event = gate("decoder")
    with Pipeline.load(bundle, threads=1) as pipe:
        run = pipe.run(Request(LABELS, steps=3))
        while run.step():
            pass
        waiting = threading.Timer(0.2, event.set)
        waiting.start()
        np.testing.assert_array_equal(run.result(), expected)
        assert event.is_set()


def test_the_load_waits_for_the_step_stage(bundle, gate) -> None:
    event = gate("denoiser")
    threading.Timer(0.2, event.set).start()
    with Pipeline.load(bundle, threads=1) as pipe:
        assert event.is_set() and "denoiser" in pipe.engines.opened


def test_an_error_does_not_wait_for_its_stage(bundle, gate) -> None:
    """A run of a thousand steps must not end in a decoder that was known to be damaged after the first."""
    content = bytearray((bundle / "decoder.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "decoder.onnx").write_bytes(content)
    event = gate("decoder")
    with Pipeline.load(bundle, threads=1) as pipe:
        run = pipe.run(Request(LABELS, steps=5))
        assert run.step()
        event.set()
        with pytest.raises(BundleError, match=r"decoder\.onnx does not have the sha256"):
            while run.step():
                threading.Event().wait(0.1)
        assert run.done < 5


def test_closing_closes_what_is_still_opening(bundle, gate, monkeypatch) -> None:
    """A stage that waits for the one being opened is not opened first, only to be closed."""
    event, opened, closed = gate("conditioner"), [], []
    module = backends.backend("onnxruntime")
    held, real = module.open, module.OrtEngine.close
    monkeypatch.setattr(module, "open", lambda files, options: opened.append(files[0].stem) or held(files, options))
    monkeypatch.setattr(module.OrtEngine, "close", lambda engine: closed.append(engine) or real(engine))
    pipe = Pipeline.load(bundle, threads=1)
    threading.Timer(0.2, event.set).start()
    pipe.close()
    assert [name.partition(".")[0] for name in opened] == ["denoiser", "conditioner"] and len(closed) == 2
    pipe.close()
    assert len(closed) == 2


def test_sums_are_compared_once_a_file(bundle, monkeypatch) -> None:
    """In low memory a stage is opened again in each run."""
    from dit_runtime.bundle import manifest

    summed: list[str] = []
    real = manifest.sha256
    monkeypatch.setattr(manifest, "sha256", lambda path: summed.append(path.name) or real(path))
    with Pipeline.load(bundle, threads=1, low_memory=True) as pipe:
        for _ in range(2):
            pipe.sample(LABELS, steps=2)
    assert summed and len(summed) == len({*summed})

"""The number of samples that share a call, from a measured curve."""

from __future__ import annotations

import numpy as np
import pytest

from dit_runtime import Pipeline
from dit_runtime.serve import Batcher
from dit_runtime.serve.rows import knee, measure, sizes


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ({1: 100.0, 2: 200.0, 4: 400.0}, 1),  # flat: larger batches only cost latency
        ({1: 1.22, 2: 1.88, 4: 3.16, 8: 5.73, 16: 10.9, 32: 21.4}, 8),  # the demo's
        ({1: 1.0, 2: 1.75, 4: 3.3}, 2),  # 4 gains 6 % more
        ({1: 1.0, 2: 1.5, 3: 2.0}, 3),
    ],
)
def test_the_smallest_size_that_is_nearly_best(curve: dict[int, float], expected: int) -> None:
    assert knee(curve) == expected


def test_sizes_double_up_to_the_largest() -> None:
    assert [sizes(1), sizes(6), sizes(8)] == [[1], [1, 2, 4, 6], [1, 2, 4, 8]]


class Timed:
    """An engine whose calls take what a table says, on a clock of its own."""

    def __init__(self, engine, seconds: dict[int, float]) -> None:
        self.engine, self.io, self.close, self.seconds, self.now = engine, engine.io, engine.close, seconds, 0.0
        self.shapes: set[tuple[int, ...]] = set()

    def run(self, inputs):
        groups, samples = inputs["conditioning"].shape[:2]
        self.shapes.add((groups, samples))
        self.now += self.seconds[samples]
        return self.engine.run(inputs)


@pytest.mark.parametrize(
    ("seconds", "measured", "places"),
    [
        ({1: 1.0, 2: 1.2, 3: 1.4}, [1, 2, 3], 3),
        ({1: 1.0, 2: 2.0, 3: 3.0}, [1, 2, 3], 1),
    ],
)
def test_a_bundle_is_measured(bundle, seconds, measured, places, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Pipeline.load(bundle, threads=1)
    timed = Timed(pipe.engines.opened["denoiser"], seconds)
    pipe.engines._opened["denoiser"] = timed
    curve = measure(pipe.engines, lambda: timed.now)
    assert curve == pytest.approx({size: seconds[size] for size in measured})
    assert timed.shapes == {(2, size) for size in measured}  # guided
    monkeypatch.setattr("dit_runtime.serve.batcher.measure", lambda engines: curve)
    object.__setattr__(pipe.manifest, "batch_invariant", True)
    batcher = Batcher(pipe)
    assert batcher.places == places
    # Rows, not samples: a guided sample has two.
    assert batcher.costs("row") == pytest.approx(seconds[places] / places / 2)
    batcher.close()


def test_no_shared_calls_where_bits_depend_on_them(bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_runtime.serve.batcher.measure", lambda engines: {1: 1.0, 2: 1.2, 3: 1.4})
    pipe = Pipeline.load(bundle, threads=1)
    object.__setattr__(pipe.manifest, "batch_invariant", False)
    batcher = Batcher(pipe)
    assert batcher.places == 1
    batcher.close()


@pytest.mark.parametrize("kind", ["captioned", "wave", "free", "prompted", "embedded", "video"])
def test_bundles_of_every_kind_are_measured(opened, kind: str) -> None:
    pipe = opened(kind)
    if kind == "prompted":
        pytest.importorskip("tokenizers")
    curve = measure(pipe.engines)
    assert [*curve] == sizes(pipe.manifest.step.max_batch)[: len(curve)] and all(np.array([*curve.values()]) > 0)

"""int8 of networks drawn by a seed: every build ends in a bundle that passes, and how far a run ends by a step's error.

`pytest -s -m slow tests/precision/test_random_networks.py` prints both tables.
"""

from __future__ import annotations

import io
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from dit_export.bundle import build
from dit_export.bundle.assemble import Assembly
from dit_export.bundle.scratch import build_scratch_bundle
from dit_export.bundle.tracing import trace_graphs
from dit_export.checkpoints import Loaded
from dit_export.graph.oracle import Oracle
from dit_export.networks import fixtures
from dit_export.networks.codec import Decoder, make_decoder
from dit_export.precision import search
from dit_export.precision.search import Search
from dit_export.recipe import Recipe
from dit_export.verify.check import Built
from dit_runtime.bundle import manifest
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from dit_runtime.verify import TOLERANCES, load_reference, relative_error, replay
from tests.precision.drawn import draw

COUNT = 20
BACKENDS = ("onnxruntime", "openvino")
ALONE = ("unguided", "null condition")  # the answers of one evaluation each
COARSER = (1, 4, 16)  # times the step of every activation's grid


class Traced(NamedTuple):
    """A network, traced once for all of its builds."""

    loaded: Loaded
    decoder: Decoder | None
    plain: Path
    oracle: Oracle


@pytest.fixture
def traced(tmp_path, monkeypatch, one_thread) -> Iterator[Callable[[int], Traced]]:
    """Trace a network; builds of the same one then take a copy."""

    def trace(seed: int) -> Traced:
        loaded = draw(seed)
        decoder = make_decoder(loaded.vae) if loaded.vae is not None else None
        plain = tmp_path / f"plain-{seed}"
        oracle = trace_graphs(plain, loaded, decoder, Progress(io.StringIO()))

        def again(folder: Path, *_: object) -> Oracle:
            shutil.copytree(plain, folder)
            return oracle

        monkeypatch.setattr(build, "trace_graphs", again)
        return Traced(loaded, decoder, plain, oracle)

    with one_thread():
        yield trace


def build_int8(drawn: Traced, backend: str, folder: Path, **fields: object) -> Built:
    recipe = Recipe(precision="int8", backend=backend, max_batch=4, output=str(folder), **fields)
    return build.build(recipe, Progress(io.StringIO()), loaded=drawn.loaded)


class Row(NamedTuple):
    passed: bool
    in_float: int
    layers: int
    speed_up: float  # of a guided step, over the fp32 build
    cost: float  # of the layers in float: a guided step's time over that with all layers in int8
    step: float  # largest error of an evaluation without guidance
    ends: tuple[float, ...]  # where the runs of the reference's samples end: relative L2


def measure(drawn: Traced, backend: str, folder: Path) -> Row:
    """Build in int8; time its guided step on one thread, against those in fp32 and with all layers in int8."""
    built = build_int8(drawn, backend, folder / "built")
    in_float = manifest.read(built.folder).built_with.get("kept_float", {})
    ratios = []
    with Pipeline.load(built.folder, threads=1) as pipe:
        step = guided_step(pipe, drawn.loaded)
        for precision in ("fp32", "int8") if in_float else ("fp32",):
            other, recipe = folder / precision, Recipe(precision=precision, backend=backend, max_batch=4)
            build_scratch_bundle(other, drawn.loaded, drawn.decoder, recipe, Progress(io.StringIO()), drawn.plain)
            with Pipeline.load(other, threads=1) as plain:
                ratios.append(search._ratio(guided_step(plain, drawn.loaded), step))
    shutil.rmtree(folder)
    answers, truth = built.replay, built.reference
    return Row(
        built.passed,
        len(in_float.get("layers", [])),
        in_float.get("of", 0),
        round(ratios[0], 2),
        round(1 / ratios[-1], 2) if in_float else 1.0,
        round(max(answer.error for answer in answers.answers if answer.name in ALONE), 4),
        tuple(round(relative_error(*pair), 4) for pair in zip(answers.latents[-1], truth.latents[-1], strict=True)),
    )


def guided_step(pipe: Pipeline, loaded: Loaded) -> Callable[[], object]:
    own, null = fixtures.conditions(loaded.network, 1), fixtures.null(loaded.network)
    state = np.random.default_rng(0).normal(size=(1, *loaded.network.state.shape)).astype(np.float32)
    times, weights = np.array([pipe.manifest.process.span / 2]), np.full(1, 4, np.float32)
    inputs = pipe.engines.inputs(times, own, null, weights)
    return lambda: pipe.engines.denoise(state, inputs, 0)


def test_a_network_with_a_hot_channel_keeps_a_layer_in_float(traced, tmp_path) -> None:
    """Seed 3, the smallest of those below that int8 breaks."""
    built = build_int8(traced(3), "openvino", tmp_path / "bundle")
    contract = manifest.read(built.folder)
    (layer,) = contract.built_with["kept_float"]["layers"]
    assert built.passed and contract.source["recipe"]["keep_float"] == [layer] and layer.endswith("fc2")


@pytest.mark.slow
def test_every_network_ends_in_a_bundle_that_passes(traced, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(search, "clock", time.process_time)  # what other processes do does not count
    table = {backend: [] for backend in BACKENDS}
    for seed in range(COUNT):
        drawn = traced(seed)
        for backend in BACKENDS:
            row = measure(drawn, backend, tmp_path / f"{seed}-{backend}")
            table[backend].append(row)
            model = drawn.loaded.network.model
            print(f"{seed:2} {model['name']:>8} {model['conditioning']:<16} {backend:<12} {row}", flush=True)
    for backend, rows in table.items():
        searched = [row for row in rows if row.in_float]
        print(
            f"{backend}: {sum(row.passed for row in rows)} of {len(rows)} pass; {len(searched)} keep layers in float, "
            f"{[f'{row.in_float}/{row.layers}' for row in searched]}, at a median cost of "
            f"{statistics.median([row.cost for row in searched] or [1]):.2f}; guided step "
            f"{statistics.median([row.speed_up for row in rows]):.2f} times as fast as fp32"
        )
    assert all(row.passed for rows in table.values() for row in rows)


class End(NamedTuple):
    """Return where the run of a sample ends."""

    step: float  # largest error of an evaluation without guidance, of both samples
    guided: float
    guidance: float
    latents: float
    psnr: float  # NaN without a decoder


def ends(drawn: Traced, backend: str, folder: Path) -> list[End]:
    """Return the ends of the reference's two samples, with grids as they are and coarser."""
    with searching(drawn, backend, folder) as (own, reference):
        rows = []
        for factor in COARSER:
            chosen = {name: replace(one, step=factor * one.step) for name, one in own._smoothed.chosen.items()}
            exact, own._smoothed = own._smoothed, own._smoothed._replace(chosen=chosen)
            with own._opened([], "int8") as pipe:
                answers = replay(pipe, reference, thorough=True)
            own._smoothed = exact
            step = max(answer.error for answer in answers.answers if answer.name in ALONE)
            guided = max(answer.error for answer in answers.answers if answer.name == "prediction")
            pictures = answers.pictures
            for sample, weight in enumerate(reference.guidance):
                latents = relative_error(answers.latents[-1][sample], reference.latents[-1][sample])
                psnr = np.nan
                if pictures is not None:
                    psnr = search.images.psnr(pictures[sample], reference.images[sample])
                rows.append(End(step, guided, float(weight), latents, psnr))
        return rows


@contextmanager
def searching(drawn: Traced, backend: str, folder: Path):
    """Open the search of an int8 bundle that nothing has verified, and give its reference."""
    folder.mkdir(parents=True)
    recipe, quiet = Recipe(precision="int8", backend=backend, max_batch=4), Progress(io.StringIO())
    assembly = Assembly(folder, drawn.plain, drawn.loaded, drawn.decoder, recipe, backend, quiet)
    contract = assembly.run()
    build._make_reference(assembly, drawn.oracle)
    reference = load_reference(folder, contract)
    smoothed = assembly.once_more().smoothed
    assert smoothed is not None
    with Search(folder, contract, smoothed, drawn.loaded.network, lambda done, total: None) as own:
        yield own, reference


@pytest.mark.slow
def test_a_step_within_its_limit_leads_to_an_end_within_the_run_s(traced, tmp_path) -> None:
    """The limits of a step follow from those of the run: see dit_runtime/verify/judge.py."""
    limits, rows = TOLERANCES["int8"], []
    for seed in range(COUNT):
        rows += (network := ends(traced(seed), "openvino", tmp_path / str(seed)))
        print(*(f"{seed:2} {row}" for row in network), sep="\n", flush=True)
    for guidance in (4.0, 1.5):
        some = [row for row in rows if row.guidance == guidance]
        factors = np.array([row.latents / row.step for row in some])
        within = [row for row in some if row.step <= limits.prediction]
        inside = [row for row in within if row.latents <= limits.latents and not row.psnr < limits.pictures]
        print(
            f"guidance {guidance}: end per step's error {np.quantile(factors, [0.5, 0.9, 1]).round(2)} (median, 90 %, "
            f"most); {len(inside)} of {len(within)} within the step's limit end within the run's"
        )
        assert len(inside) >= 0.9 * len(within)

"""C++ and Python draw the same pictures on the same engine."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from dit_runtime import Pipeline
from dit_runtime.backends import Options
from dit_runtime.bundle import manifest
from dit_runtime.sampling.process import FLOW_SOLVERS

ENGINES = ("onnxruntime", "openvino")
WAYS = [*((name, 1) for name in ENGINES), ("openvino", 2)]  # on two threads its two rows run at once
FORMS = [
    *(("fp32", name) for name in ENGINES),
    ("int8", "onnxruntime"),
    pytest.param("int8", "openvino", marks=pytest.mark.slow),
    pytest.param("bf16", "openvino", marks=pytest.mark.slow),
]
SOLVERS = ("ddim", "ddpm", "dpm++")
STEPS = 6
LATENTS_RTOL = 1e-5  # of the norm; the engine, its threads and the order of sums are the same
LEVELS, SHARE = 1, 1e-3  # a uint8 value may round the other way where it falls on a half


def load(bundle: Path, name: str, threads: int = 1) -> Pipeline:
    """Python on this engine, whatever the bundle was built for."""
    contract = manifest.read(bundle)
    stages = tuple(replace(stage, backend=name) for stage in contract.stages)
    return Pipeline(bundle, replace(contract, stages=stages), {}, Options(threads=threads))


def same_pictures(first: np.ndarray, second: np.ndarray) -> bool:
    difference = np.abs(first.astype(int) - second)
    return first.shape == second.shape and difference.max() <= LEVELS and (difference > 0).mean() <= SHARE


def same_latents(first: np.ndarray, second: np.ndarray) -> bool:
    return first.shape == second.shape and np.linalg.norm(first - second) <= LATENTS_RTOL * np.linalg.norm(second)


def flags(labels: list[int], guidance: float, solver: str, seed: object) -> list[object]:
    seeds = seed if isinstance(seed, list) else [seed]
    chosen: list[object] = ["--labels", *labels, "--guidance", guidance, "--solver", solver, "--seed", *seeds]
    return [*chosen, "--steps", STEPS]


@pytest.mark.parametrize(("engine", "threads"), WAYS)
@pytest.mark.parametrize(("network", "solvers"), [("meta", SOLVERS), ("velocity", FLOW_SOLVERS)])
def test_the_same_latents(request, dit_generate, tmp_path, network, solvers, engine, threads):
    """A model that predicts its variance, so DDPM draws noise with every step; and one that predicts a velocity."""
    bundle = request.getfixturevalue(network).bundle
    with load(bundle, engine, threads) as pipe:
        for solver, guidance, batch in product(solvers, (1.0, 4.0), (1, 3)):
            labels, file = [7, 2, 11][:batch], tmp_path / "x.npy"
            arguments = [*flags(labels, guidance, solver, 5), "--backend", engine, "-o", file, "--json"]
            done = dit_generate(bundle, *arguments, threads=threads)
            assert done.returncode == 0, done.stderr
            expected = pipe.sample(labels, steps=STEPS, guidance=guidance, solver=solver, seed=5, output="latents")
            assert same_latents(np.load(file), expected), (solver, guidance, batch)
            another = pipe.sample(
                labels, steps=STEPS, guidance=guidance * 1.001, solver=solver, seed=5, output="latents"
            )
            assert not same_latents(np.load(file), another)  # a thousandth more guidance is seen


@pytest.mark.parametrize(("precision", "engine"), FORMS)
def test_the_same_pictures(shared_embedders, narrow, dit_generate, tmp_path, precision, engine):
    """Names, one seed each, and the decoder; a batch of three."""
    labels, seeds = [207, 360, 5], [2**32 + 1, -3, 8]
    names = ["golden retriever", "river dog", "5"]
    bundle = shared_embedders.bundle if precision == "fp32" else narrow(precision, engine)
    cases = [("ddpm", 0.0, 4.0, 3), ("ddim", 0.5, 1.0, 3)]
    if precision == "fp32":
        cases = [*product(SOLVERS, (0.0,), (1.0, 4.0), (1, 3)), cases[-1]]
    with load(bundle, engine) as pipe:
        assert pipe.manifest.step.precision == precision
        for solver, eta, guidance, batch in cases:
            file = tmp_path / "x.npz"
            chosen = flags(labels[:batch], guidance, solver, seeds[:batch])
            chosen[1 : 1 + batch] = names[:batch]
            done = dit_generate(bundle, *chosen, "--eta", eta, "--backend", engine, "-o", file)
            assert done.returncode == 0 and done.stdout == f"{file}\n", done.stderr
            asked = {"steps": STEPS, "guidance": guidance, "solver": solver, "eta": eta, "seed": seeds[:batch]}
            expected = pipe.sample(labels[:batch], **asked)
            assert same_pictures(np.load(file)["arr_0"], expected), (solver, eta, guidance, batch)
            assert not same_pictures(np.load(file)["arr_0"], np.roll(expected, 1, axis=2))


@pytest.mark.parametrize(("precision", "threads"), [("fp32", 2), pytest.param("int8", 2, marks=pytest.mark.slow)])
def test_latents_are_the_same_in_any_batch(shared_embedders, narrow, dit_generate, tmp_path, precision, threads):
    """OpenVINO gives a row the same bits in a batch of three as alone, guided with a weight of its own or not."""
    bundle = shared_embedders.bundle if precision == "fp32" else narrow(precision, "openvino")
    labels, seeds, file = [207, 360, 5], [3, 4, 5], tmp_path / "x.npy"

    def latents(rows: slice, weights: list[float], threads: int) -> np.ndarray:
        chosen = ["--labels", *labels[rows], "--guidance", *weights[rows], "--seed", *seeds[rows], "--steps", 2]
        done = dit_generate(bundle, *chosen, "--backend", "openvino", "-o", file, threads=threads)
        assert done.returncode == 0, done.stderr
        return np.load(file)

    for weights, rows in (([4.0, 1.5, 7.0], (0, 1, 2)), ([1.0, 1.0, 1.0], (2,))):
        together = latents(slice(0, 3), weights, threads)
        for row in rows:
            alone = latents(slice(row, row + 1), weights, 1)
            assert np.array_equal(together[row : row + 1], alone), (weights, row)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("network", ["meta", "velocity"])
def test_verify(request, dit_generate, network, engine):
    done = dit_generate(request.getfixturevalue(network).bundle, "--verify", "--backend", engine)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "verified"


def test_a_solver_of_another_prediction(meta, velocity, dit_generate):
    for bundle, solver, fit in (
        (meta.bundle, "heun", "ddpm, ddim"),
        (velocity.bundle, "ddim", "dpm++1, dpm++, dpm++3"),
    ):
        done = dit_generate(bundle, "--labels", 1, "--solver", solver, "-o", "x.npy")
        assert done.returncode == 2 and f"take one of {fit}" in done.stderr


def test_png_and_own_latents(shared_embedders, dit_generate, tmp_path):
    from PIL import Image

    own = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    np.save(tmp_path / "own.npy", own)
    for name in ("x.png", "x.npz"):
        done = dit_generate(
            shared_embedders.bundle, "--labels", 1, 2, 3, "--steps", 2, "--latents", tmp_path / "own.npy",
            "-o", tmp_path / name, "--low-memory",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    pictures, sheet = np.load(tmp_path / "x.npz")["arr_0"], np.asarray(Image.open(tmp_path / "x.png"))
    with load(shared_embedders.bundle, "onnxruntime") as pipe:
        assert same_pictures(pictures, pipe.sample([1, 2, 3], steps=2, latents=own))
    assert sheet.shape == (128, 128, 3) and not sheet[64:, 64:].any()
    for number, (y, x) in enumerate(((0, 0), (0, 64), (64, 0))):
        assert np.array_equal(sheet[y : y + 64, x : x + 64], pictures[number])

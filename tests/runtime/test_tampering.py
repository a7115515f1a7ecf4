"""A bundle that is wrong but whole: every sha256 is right, so only verification can notice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import onnx
import pytest

from dit_runtime.cli import main
from tests.tamper import edit, seal, shapes, swap_vectors, weight

HIDDEN, CLASSES = 64, 12  # of the bundle that the fixture `meta` has built
REFERENCE_LABELS = {CLASSES // 4, 3 * CLASSES // 4}


@pytest.fixture
def verify(capsys, meta_copy) -> Callable[[], tuple[int, dict[str, list[dict]]]]:
    """`dit-run verify --json`: the exit code, and the checks that failed by name."""

    def run() -> tuple[int, dict[str, list[dict]]]:
        seal(meta_copy)
        capsys.readouterr()
        code = main(["verify", str(meta_copy), "--json", "--threads", "1"])
        captured = capsys.readouterr()
        result = json.loads(captured.out)
        failed: dict[str, list[dict]] = {}
        for check in result["checks"]:
            if not check["passed"]:
                failed.setdefault(check["name"], []).append(check)
        assert result["passed"] is not bool(failed) and "Traceback" not in captured.err
        return code, failed

    return run


def test_the_untouched_copy_passes(verify):
    assert verify() == (0, {})


@pytest.mark.parametrize("pair", [(5, 6), (3, 4), (0, CLASSES)], ids=str)
def test_two_swapped_label_embeddings(meta_copy, verify, pair):
    """Labels of the reference run or not, the null label too: a run of two labels would not hear the others."""
    table = weight(meta_copy, "conditioner", (CLASSES + 1, HIDDEN))
    table[[*pair]] = table[[*reversed(pair)]]
    table.flush()
    code, failed = verify()
    assert code == 1
    assert failed["conditioner, rel-L2"][0]["where"] in {f"label {label}" for label in pair}
    heard = REFERENCE_LABELS | {CLASSES}
    assert ("prediction, rel-L2" in failed) == bool(heard & {*pair})


def test_a_slightly_wrong_label_embedding(meta_copy, verify):
    """One row that is off by one percent: what a careless quantization would do."""
    weight(meta_copy, "conditioner", (CLASSES + 1, HIDDEN))[8] *= 1.01
    code, failed = verify()
    assert (code, [*failed], failed["conditioner, rel-L2"][0]["where"]) == (1, ["conditioner, rel-L2"], "label 8")


def test_gain_and_shift_swapped_in_the_denoiser(meta_copy, verify):
    """Two outputs of the Split change places: those that a block multiplies with and then adds."""
    swap_vectors(meta_copy, 2)  # the second block's first
    code, failed = verify()
    assert code == 1 and {"prediction, rel-L2", "free run, rel-L2"} <= {*failed}
    assert "conditioner, rel-L2" not in failed


def test_gain_and_shift_swapped_in_the_conditioner(meta_copy, verify):
    """The same mistake where the vectors are made: rows of one block's modulation, weights and biases."""
    columns = [name for name, shape in shapes(meta_copy, "conditioner") if sorted(shape) == [HIDDEN, 6 * HIDDEN]]
    biases = [name for name, shape in shapes(meta_copy, "conditioner") if shape == (6 * HIDDEN,)]
    assert len(columns) == len(biases) == 2
    shift, gain = slice(0, HIDDEN), slice(HIDDEN, 2 * HIDDEN)
    for name in (columns[0], biases[0]):
        values = weight(meta_copy, "conditioner", name=name)
        values = values.T if values.shape[0] == HIDDEN else values
        values[shift], values[gain] = values[gain].copy(), values[shift].copy()
    code, failed = verify()
    assert code == 1 and {"conditioner, rel-L2", "prediction, rel-L2"} <= {*failed}


@pytest.mark.parametrize("beta_end", [math.nextafter(0.02, 1), 0.03])
def test_the_last_digit_of_a_beta(meta_copy, verify, beta_end):
    """0.020000000000000004 draws the same picture, so only a comparison of the betas themselves can see it."""
    edit(meta_copy, lambda table: table["diffusion"].update(beta_end=beta_end))
    code, failed = verify()
    assert code == 1 and failed["betas that differ"][0]["value"] >= 1
    assert ("free run, rel-L2" in failed) == (beta_end == 0.03)


def test_another_beta_start(meta_copy, verify):
    edit(meta_copy, lambda table: table["diffusion"].update(beta_start=math.nextafter(1e-4, 1)))
    code, failed = verify()
    assert (code, [*failed]) == (1, ["betas that differ"])


@pytest.mark.parametrize("spoil", ["one value", "the order of the seeds", "a seed"])
def test_changed_noise_in_the_reference(meta_copy, verify, spoil):
    arrays = dict(np.load(meta_copy / "reference.npz"))
    if spoil == "one value":
        arrays["latents"][0, 0, 0, 0, 0] += 1e-3
    else:
        arrays["seeds"] = arrays["seeds"][::-1] if spoil == "the order of the seeds" else arrays["seeds"] + 2
    np.savez(meta_copy / "reference.npz", **arrays)
    code, failed = verify()
    assert code == 1 and "noise, max abs error" in failed


@pytest.mark.parametrize(
    ("array", "check"),
    [
        ("prediction", "prediction, rel-L2"),
        ("variance", "variance, rel-L2"),
        ("conditional", "unguided, rel-L2"),
        ("null", "null label, rel-L2"),
        ("fingerprint", "conditioner, rel-L2"),
        ("timesteps", "timesteps that differ"),
    ],
)
def test_each_part_of_the_reference_is_compared(meta_copy, verify, array, check):
    """One sample's or row's part is a thousandth off: ten times the tolerance, for each of the arrays."""
    arrays = dict(np.load(meta_copy / "reference.npz"))
    arrays[array][0] *= 1.001
    np.savez(meta_copy / "reference.npz", **arrays)
    code, failed = verify()
    assert code == 1 and check in failed


def test_a_denoiser_that_gives_nan(meta_copy, verify):
    """NaN compares false with everything: it must not slip through as an error that is not above the limit."""
    weight(meta_copy, "denoiser", (HIDDEN, 4, 2, 2))[0] = np.nan
    code, failed = verify()
    assert code == 1 and {"prediction, rel-L2", "free run, rel-L2"} <= {*failed}
    assert "step 1" in failed["free run, rel-L2"][0]["where"]


def test_swapped_guidance(meta_copy, verify):
    """Own and null rows change places: right without guidance, wrong with it."""
    path = meta_copy / "denoiser.onnxruntime.onnx"
    model = onnx.load(path, load_external_data=False)
    subtractions = [node for node in model.graph.node if node.op_type == "Sub"]
    assert subtractions, "guidance is last + guidance * (first - last)"
    for node in subtractions:
        first, second = node.input
        node.input[0], node.input[1] = second, first
    onnx.save(model, path)
    code, failed = verify()
    assert code == 1 and "prediction, rel-L2" in failed
    assert "unguided, rel-L2" not in failed and "null label, rel-L2" not in failed

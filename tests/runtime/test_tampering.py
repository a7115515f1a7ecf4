"""A bundle that is wrong but whole: every sha256 is right, so only verification can notice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest

from dit_runtime.bundle import manifest
from dit_runtime.cli import main
from dit_runtime.sampling.process import Process
from dit_runtime.verify import Figure, load_reference, sampler
from tests.tamper import edit, leak, seal, weight

CLASSES = 5  # of the hand-made bundle
REFERENCE_LABELS = {1, 3}
FINGERPRINT, NULL = "conditioner: fingerprint, rel-L2", "denoiser: null condition, rel-L2"
PREDICTION, UNGUIDED = "denoiser: prediction, rel-L2", "denoiser: unguided, rel-L2"
LATENTS = "run: latents, rel-L2"


@pytest.fixture
def verify(capsys, bundle) -> Callable[[], tuple[int, dict[str, list[dict]]]]:
    """`dit-run verify --json`: the exit code, and the checks that failed by name."""

    def run() -> tuple[int, dict[str, list[dict]]]:
        seal(bundle)
        capsys.readouterr()
        code = main(["verify", str(bundle), "--json", "--threads", "1"])
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


@pytest.mark.parametrize("pair", [(2, 4), (3, 4), (0, CLASSES)], ids=str)
def test_two_swapped_label_embeddings(bundle, verify, pair):
    """Labels of the reference run or not, the null label too: a run of two labels would not hear the others."""
    table = weight(bundle, "conditioner", name="table")
    table[[*pair]] = table[[*reversed(pair)]]
    table.flush()
    code, failed = verify()
    assert code == 1
    assert failed[FINGERPRINT][0]["where"] in {f"label {label}" for label in pair}
    heard = REFERENCE_LABELS | {CLASSES}
    assert (PREDICTION in failed) == bool(heard & {*pair})


def test_a_slightly_wrong_label_embedding(bundle, verify):
    """One row that is off by one percent: what a careless quantization would do."""
    weight(bundle, "conditioner", name="table")[4] *= 1.01
    code, failed = verify()
    assert (code, [*failed], failed[FINGERPRINT][0]["where"]) == (1, [FINGERPRINT], "label 4")


def test_gain_and_shift_swapped_in_the_denoiser(bundle, verify):
    """Two outputs of the graph's selection change places: the one that it multiplies with and the one that it adds."""
    path = bundle / "denoiser.onnx"
    model = onnx.load(path, load_external_data=False)
    gains, shifts = [node for node in model.graph.node if node.output[0] in ("gains", "shifts")]
    gains.output[0], shifts.output[0] = shifts.output[0], gains.output[0]
    onnx.save(model, path)
    code, failed = verify()
    assert code == 1 and {PREDICTION, LATENTS} <= {*failed}
    assert FINGERPRINT not in failed


def test_gain_and_shift_swapped_in_the_conditioner(bundle, verify):
    """The same mistake where the vectors are made."""
    table = weight(bundle, "conditioner", name="table")
    table[:] = table[:, ::-1].copy()
    table.flush()
    code, failed = verify()
    assert code == 1 and {FINGERPRINT, PREDICTION} <= {*failed}


@pytest.mark.parametrize("beta_end", [math.nextafter(0.02, 1), 0.03])
def test_the_last_digit_of_a_beta(bundle, verify, beta_end):
    """0.020000000000000004 draws the same picture, so only a comparison of the betas themselves can see it."""
    edit(bundle, lambda table: table["process"].update(beta_end=beta_end))
    code, failed = verify()
    assert code == 1 and failed["sampler: betas that differ"][0]["value"] >= 1
    assert (LATENTS in failed) == (beta_end == 0.03)


def test_another_beta_start(bundle, verify):
    edit(bundle, lambda table: table["process"].update(beta_start=math.nextafter(1e-4, 1)))
    code, failed = verify()
    assert (code, [*failed]) == (1, ["sampler: betas that differ"])


@pytest.mark.parametrize("spoil", ["one value", "the order of the seeds", "a seed"])
def test_changed_noise_in_the_reference(bundle, verify, spoil):
    arrays = dict(np.load(bundle / "reference.npz"))
    if spoil == "one value":
        arrays["latents"][0, 0, 0, 0, 0] += 1e-3
    else:
        arrays["seeds"] = arrays["seeds"][::-1] if spoil == "the order of the seeds" else arrays["seeds"] + 2
    np.savez(bundle / "reference.npz", **arrays)
    code, failed = verify()
    assert code == 1 and "sampler: noise, max abs error" in failed


@pytest.mark.parametrize(
    ("array", "check"),
    [
        ("prediction", PREDICTION),
        ("variance", "denoiser: variance, rel-L2"),
        ("conditional", UNGUIDED),
        ("null", NULL),
        ("fingerprint", FINGERPRINT),
        ("timesteps", "sampler: timesteps that differ"),
    ],
)
def test_each_part_of_the_reference_is_compared(bundle, verify, array, check):
    """One sample's or row's part is a thousandth off: ten times the tolerance, for each of the arrays."""
    arrays = dict(np.load(bundle / "reference.npz"))
    arrays[array][0] *= 1.001
    np.savez(bundle / "reference.npz", **arrays)
    code, failed = verify()
    assert code == 1 and check in failed


def test_a_denoiser_that_gives_nan(bundle, verify):
    """NaN compares false with everything: it must not slip through as an error that is not above the limit."""
    weight(bundle, "denoiser", name="mixed")[0] = np.nan
    code, failed = verify()
    assert code == 1 and {PREDICTION, LATENTS} <= {*failed}
    assert "step 1" in failed[LATENTS][0]["where"]


@pytest.mark.parametrize("limit", [None, 1.0])
def test_nan_never_passes(limit) -> None:
    assert not Figure("denoiser", "error", math.nan, limit).passed
    assert not Figure("denoiser", "error", math.nan, limit, at_least=True).passed


def test_swapped_guidance(bundle, verify):
    """Own and null rows change places: right without guidance, wrong with it."""
    path = bundle / "denoiser.onnx"
    model = onnx.load(path, load_external_data=False)
    subtractions = [node for node in model.graph.node if node.op_type == "Sub"]
    assert subtractions, "guidance is last + guidance * (first - last)"
    for node in subtractions:
        first, second = node.input
        node.input[0], node.input[1] = second, first
    onnx.save(model, path)
    code, failed = verify()
    assert code == 1 and PREDICTION in failed
    assert UNGUIDED not in failed and NULL not in failed


@pytest.mark.parametrize(("graph", "output"), [("denoiser", "prediction"), ("decoder", "images")])
def test_a_row_that_depends_on_its_batch(bundle, verify, graph, output):
    """It differs by a few ulps, as with a kernel that sums in another order: far below all other limits."""
    leak(bundle, graph, output)
    code, failed = verify()
    name = f"{graph}: a row in a batch and alone, max abs difference"
    assert code == 1 and [*failed] == [name] and 0 < failed[name][0]["value"] < 1e-4


@pytest.mark.parametrize(
    ("kind", "name", "stage"),
    [
        ("captioned", "condition.mask", "context+modulation"),
        ("captioned", "null.captions", "context+modulation"),
        ("wave", "condition.pooled", "context+summary+modulation+conditioner"),
        ("wave", "condition.words_mask", "context+summary+modulation+conditioner"),
        ("video", "condition.rate", "conditioner"),
    ],
)
def test_each_condition_counts(copied, capsys, kind, name, stage):
    """Another condition than PyTorch's gives another fingerprint and another prediction."""
    folder = copied(kind)
    arrays = dict(np.load(folder / "reference.npz"))
    if name.endswith("mask"):
        arrays[name][0, :1] = 1 - arrays[name][0, :1]
        arrays[name][0, -1] = 1
    else:
        arrays[name] = arrays[name] + 0.5
    np.savez(folder / "reference.npz", **arrays)
    seal(folder)
    assert main(["verify", str(folder), "--json", "--threads", "1"]) == 1
    failed = {check["name"] for check in json.loads(capsys.readouterr().out)["checks"] if not check["passed"]}
    assert {f"{stage}: fingerprint, rel-L2", PREDICTION} <= failed


@pytest.mark.parametrize("kind", ["labels", "captioned", "wave", "video", "free"])
def test_every_kind_verifies(handmade, capsys, kind):
    """Against a reference that NumPy made without this runtime; float16 arrays are read as float32."""
    assert main(["verify", str(handmade(kind)), "--threads", "1"]) == 0
    assert main(["verify", str(handmade(kind)), "--low-memory"]) == 0
    assert capsys.readouterr().out.count("verified\n") == 2


def test_a_constant_counts_where_another_port_has_none(copied, capsys):
    """The free run leads away from the manifest's constants, and from the reference's rows where there are none."""
    folder = copied("wave")
    edit(folder, lambda table: table["null"].pop("pooled"))
    assert main(["verify", str(folder), "--threads", "1"]) == 0
    edit(folder, lambda table: table["null"].update(words=0.5))
    capsys.readouterr()
    assert main(["verify", str(folder), "--json", "--threads", "1"]) == 1
    failed = {check["name"] for check in json.loads(capsys.readouterr().out)["checks"] if not check["passed"]}
    assert LATENTS in failed and PREDICTION not in failed


def test_a_flow_has_none_of_the_references_betas(bundle):
    contract = manifest.read(bundle)
    reference = load_reference(bundle, contract)
    flow = Process.from_dict({"kind": "flow", "train_steps": 1000})
    assert next(figure.value for figure in sampler(contract, reference)) == 0
    assert next(figure.value for figure in sampler(replace(contract, process=flow), reference)) == len(reference.betas)


def test_conditions_may_be_stored_in_half_precision(copied, capsys):
    folder = copied("video")
    arrays = dict(np.load(folder / "reference.npz"))
    assert np.array_equal(arrays["null.rate"], arrays["null.rate"].astype(np.float16))
    np.savez(folder / "reference.npz", **arrays | {"null.rate": arrays["null.rate"].astype(np.float16)})
    seal(folder)
    assert main(["verify", str(folder)]) == 0

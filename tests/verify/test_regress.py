"""The gate has teeth: each way to break an engine turns it red and is named, and identical engines pass."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from dit_export.cli import main
from dit_runtime.verify import TOLERANCES
from tests.conftest import HEADS, HIDDEN, META_CLASSES
from tests.tamper import linears, seal, shapes, swap_vectors, weight

REFERENCE_LABELS = [META_CLASSES // 4, 3 * META_CLASSES // 4]


def test_an_identical_engine_passes(meta, baseline, regress, tmp_path, one_thread):
    """Built again from the same checkpoint, and the same one again."""
    assert regress(meta.bundle, "--baseline", str(baseline)) == (0, None, [], {}, set())
    with one_thread():
        recipe = json.loads((meta.bundle / "manifest.json").read_text())["source"]["recipe"]
        options = ["--heads", str(HEADS), "--latents-only", "--labels", recipe["labels"], "--max-batch", "4"]
        again = ["build", "--checkpoint", str(meta.checkpoint), "--backend", "onnxruntime", *options]
        assert main([*again, "-o", str(tmp_path / "again")]) == 0
    assert regress(tmp_path / "again", "--baseline", str(baseline)).code == 0
    assert regress(tmp_path / "again", "--against", str(meta.bundle)).code == 0


def test_no_limit_is_tighter_than_that_of_fp32(baseline):
    table, fp32 = json.loads(baseline.read_text()), TOLERANCES["fp32"]
    least = dict.fromkeys(("fingerprint", "fingerprint of the null"), fp32.conditioner)
    least |= dict.fromkeys(("unguided", "null condition"), fp32.prediction)
    least |= {"prediction": fp32.guided, "variance": fp32.guided, "latents": fp32.latents}
    limits = [(entry["metric"].split(", "), entry["limits"]) for entry in table["metrics"]]
    smallest = {name: min(values) for (name, unit), values in limits if unit == "rel-L2"}
    assert smallest == least  # what was measured is far below


@pytest.mark.parametrize("block", [0, 1])
def test_a_doubled_scale(meta, meta_copy, baseline, regress, block):
    """A doubled last linear of an attention moves that block's first sum, and nothing before it."""
    weights = weight(meta_copy, "denoiser", name=linears(meta_copy, HIDDEN, HIDDEN)[block])
    weights *= 2
    weights.flush()
    seal(meta_copy)
    for truth in ([], ["--against", str(meta.bundle)]):  # PyTorch, and a bundle that is right
        verdict = regress(meta_copy, "--baseline", str(baseline), *truth)
        assert verdict.code == 1
        assert (verdict.first["stage"], verdict.first["metric"]) == ("denoiser", "prediction, rel-L2")
        assert verdict.first["where"].startswith("step 1 of ") and verdict.first["step"] == 1
        (sentence,) = verdict.located
        assert sentence.startswith(f"denoiser: first moved: blocks.{block}.attn (residual sum {2 * block + 1} of 4)")
        errors = list(verdict.taps.values())
        assert max(errors[: 2 * block + 1]) < 1e-5 and min(errors[2 * block + 1 :]) > 1e-3


@pytest.mark.parametrize("block", [0, 1])
def test_zeroed_rows_of_one_layer(meta_copy, baseline, regress, block):
    """A quarter of what an MLP's second linear reads."""
    weight(meta_copy, "denoiser", name=linears(meta_copy, 4 * HIDDEN, HIDDEN)[block])[:HIDDEN] = 0
    seal(meta_copy)
    verdict = regress(meta_copy, "--baseline", str(baseline))
    assert (verdict.code, verdict.first["stage"], verdict.first["step"]) == (1, "denoiser", 1)
    assert verdict.located[0].startswith(
        f"denoiser: first moved: blocks.{block}.mlp (residual sum {2 * block + 2} of 4)"
    )


@pytest.mark.parametrize(
    ("pair", "place"),
    [(0, "blocks.0.attn "), (3, "blocks.1.mlp "), (4, "after the last residual sum")],
)
def test_gain_and_shift_swapped(meta_copy, baseline, regress, pair, place):
    swap_vectors(meta_copy, pair)
    seal(meta_copy)
    verdict = regress(meta_copy, "--baseline", str(baseline))
    assert (verdict.code, verdict.first["stage"], verdict.first["step"]) == (1, "denoiser", 1)
    assert verdict.located[0].startswith(f"denoiser: first moved: {place}") and len(verdict.located) == 1


def test_a_wrong_null_row(meta, meta_copy, baseline, regress):
    """The null row of a class table affects guidance only."""
    table = weight(meta_copy, "conditioner", (META_CLASSES + 1, HIDDEN))
    table[META_CLASSES] = table[5]
    table.flush()
    seal(meta_copy)
    for truth in ([], ["--against", str(meta.bundle)]):
        verdict = regress(meta_copy, "--baseline", str(baseline), *truth)
        assert (verdict.code, verdict.first["stage"]) == (1, "conditioner")
        assert verdict.first["name"] == "conditioner: fingerprint of the null, rel-L2"
        assert verdict.first["where"] == f"the null (labels {META_CLASSES})"
        assert verdict.located == [verdict.located[0]]  # the denoiser, asked with the right vectors, is right
        assert verdict.located[0].startswith(
            f"conditioner: every tensor of conditioning, for the null (labels {META_CLASSES})"
        )
        assert ("denoiser", "null condition, rel-L2") in verdict.failed
        assert ("denoiser", "unguided, rel-L2") not in verdict.failed


def test_a_stale_conditioner(meta, meta_copy, later, baseline, regress):
    """Its files are those of an earlier build, whole and well, but of other weights than the denoiser's."""
    for name in ("conditioner.onnx", "conditioner.onnx.data"):
        shutil.copyfile(later.bundle / name, meta_copy / name)
    seal(meta_copy)
    verdict = regress(meta_copy, "--baseline", str(baseline))
    assert (verdict.code, verdict.first["stage"]) == (1, "conditioner")
    assert verdict.first["where"] == "every condition: stale, or of other weights"
    assert len(verdict.located) == 1
    assert verdict.located[0].startswith("conditioner: every tensor of conditioning, for every condition asked")


def test_one_block_of_the_conditioner(meta_copy, baseline, regress):
    """A bias of one block's modulation: the vectors that it makes are named."""
    names = [n for n, shape in shapes(meta_copy, "conditioner") if shape == (6 * HIDDEN,)]
    weight(meta_copy, "conditioner", name=names[1])[:HIDDEN] += 0.5  # the first part is attention's shift
    seal(meta_copy)
    verdict = regress(meta_copy, "--baseline", str(baseline))
    assert (verdict.code, verdict.first["stage"]) == (1, "conditioner")
    sentence = verdict.located[0]
    assert re.match(r"conditioner: conditioning \d+ of 14 \(blocks.1.modulation\), for every condition asked", sentence)


def test_both_at_once(meta_copy, baseline, regress):
    """A broken conditioner does not hide a broken denoiser."""
    table = weight(meta_copy, "conditioner", (META_CLASSES + 1, HIDDEN))
    table[REFERENCE_LABELS[0]] *= 1.1
    table.flush()
    swap_vectors(meta_copy, 2)
    seal(meta_copy)
    verdict = regress(meta_copy, "--baseline", str(baseline))
    assert verdict.first["where"] == f"labels {REFERENCE_LABELS[0]}"
    assert [sentence.partition(":")[0] for sentence in verdict.located] == ["conditioner", "denoiser"]


def test_a_nan_is_no_small_error(meta_copy, baseline, regress):
    weight(meta_copy, "denoiser", (HIDDEN, 4, 2, 2))[0] = np.nan
    seal(meta_copy)
    verdict = regress(meta_copy, "--baseline", str(baseline))
    assert (verdict.code, verdict.first["stage"], verdict.first["value"]) == (1, "denoiser", "nan")
    assert verdict.located[0].startswith("denoiser: first moved: before the first residual sum")


def test_where_nothing_right_is_at_hand(meta_copy, regress):
    """Without the checkpoint the graph and the step are still named, and what would find the block."""
    table = json.loads((meta_copy / "manifest.json").read_text())
    table["source"]["recipe"]["checkpoint"] = "/nowhere/checkpoint.pt"
    (meta_copy / "manifest.json").write_text(json.dumps(table))
    swap_vectors(meta_copy, 2)
    seal(meta_copy)
    verdict = regress(meta_copy)
    assert (verdict.code, verdict.first["stage"]) == (1, "denoiser")
    assert verdict.located[0].startswith("not localized: ") and "--against" in verdict.located[0]


def test_verify_and_regress(meta, meta_copy, baseline, capsys):
    """One command: verify also asks PyTorch at other batches, unless a baseline or another bundle is the truth."""

    def metrics(*arguments: str) -> set[str]:
        capsys.readouterr()
        assert main([*arguments, "--threads", "1", "--json"]) == 0
        return {figure["name"] for figure in json.loads(capsys.readouterr().out)["checks"]}

    asked = {"proof: another condition, rel-L2", "denoiser: prediction at a batch, rel-L2"}
    bundle = str(meta.bundle)
    replayed = metrics("regress", bundle)
    assert not replayed & asked and metrics("verify", bundle) >= replayed | asked
    assert metrics("verify", bundle, "--no-weights") == replayed == metrics("verify", bundle, "--against", bundle)
    assert metrics("verify", bundle, "--baseline", str(baseline)) == replayed | {"reference: drift, rel-L2"}

    table = json.loads((meta_copy / "manifest.json").read_text())
    table["source"]["recipe"]["checkpoint"] = "/nowhere/checkpoint.pt"
    (meta_copy / "manifest.json").write_text(json.dumps(table))
    assert main(["verify", str(meta_copy)]) == 2 and "/nowhere" in capsys.readouterr().err
    assert metrics("regress", str(meta_copy)) == replayed


def test_a_baseline_belongs_to_its_weights(later, baseline, regress, tmp_path):
    verdict = regress(later.bundle, "--baseline", str(baseline))
    assert verdict.code == 2 and "of another weights" in verdict.located[0]
    table = json.loads(baseline.read_text())
    table["model"]["hidden"] = 128
    (tmp_path / "other.json").write_text(json.dumps(table))
    verdict = regress(later.bundle, "--baseline", str(tmp_path / "other.json"))
    assert verdict.code == 2 and "of another model: hidden is 128 there and 64 in this bundle" in verdict.located[0]


def test_a_baseline_holds_what_it_measured(meta, baseline, regress, tmp_path):
    """A limit below the figure, a metric that is gone, and another answer by PyTorch are failures."""
    judged = {"stage": "run", "metric": "judge's agreement, share", "values": [1], "limits": [0.9]}
    for change, expected in (
        (lambda table: row(table, "prediction, rel-L2")["limits"].__setitem__(3, 1e-12), ("denoiser", 4)),
        (lambda table: table["metrics"].append(judged), ("run", None)),
        (lambda table: table["reference"].__setitem__(0, 9.0), ("reference", None)),
    ):
        table = json.loads(baseline.read_text())
        change(table)
        (tmp_path / "changed.json").write_text(json.dumps(table))
        verdict = regress(meta.bundle, "--baseline", str(tmp_path / "changed.json"))
        assert (verdict.code, (verdict.first["stage"], verdict.first["step"])) == (1, expected)


def row(table: dict, metric: str) -> dict:
    return next(row for row in table["metrics"] if row["metric"] == metric)


def test_a_bad_bundle_is_no_baseline(meta_copy, regress, tmp_path):
    swap_vectors(meta_copy, 2)
    seal(meta_copy)
    verdict = regress(meta_copy, "--baseline", str(tmp_path / "bad.json"), "--update-baseline")
    assert (verdict.code, verdict.first["stage"]) == (1, "denoiser")
    assert not (tmp_path / "bad.json").exists()


@pytest.mark.parametrize("content", [None, "", "[]", '{"format": 9}', '{"format": 1}'])
def test_what_is_no_baseline(meta, regress, tmp_path, content):
    if content is not None:
        (tmp_path / "b.json").write_text(content)
    verdict = regress(meta.bundle, "--baseline", str(tmp_path / "b.json"))
    assert (verdict.code == 2 and "--update-baseline" in verdict.located[0]) or any(
        words in verdict.located[0] for words in ("not a baseline", "not JSON")
    )


def test_table_and_junit(meta_copy, baseline, tmp_path, capsys):
    swap_vectors(meta_copy, 2)
    seal(meta_copy)
    junit = tmp_path / "junit.xml"
    arguments = ["--threads", "1", "--baseline", str(baseline), "--junit", str(junit)]
    assert main(["regress", str(meta_copy), *arguments]) == 1
    *_, failed, moved, following = capsys.readouterr().out.splitlines()
    assert failed.startswith("FAILED denoiser: prediction, rel-L2, step 1 of 10, t = 900: ")
    assert moved.startswith("denoiser: first moved: blocks.1.attn ")
    named = f"regress {meta_copy} --baseline {baseline} --threads 1 --report report.html"
    assert following == f"next: dit-export {named}"  # no baseline takes what fails its tolerances
    root = ElementTree.parse(junit).getroot()
    suites = {suite.get("name"): suite for suite in root}
    assert list(suites) == ["reference", "sampler", "conditioner", "denoiser", "run"]
    assert suites["conditioner"].get("failures") == "0" and int(suites["denoiser"].get("failures")) > 0
    case = suites["denoiser"].find("testcase[@name='prediction, rel-L2, step 1']/failure")
    assert "blocks.1" in case.text and "expected at most" in case.get("message")
    assert len(root.findall(".//testcase")) == int(root.get("tests"))
    assert len(root.findall(".//failure")) == int(root.get("failures"))


def test_a_gate_that_passes_needs_no_pytorch(meta, meta_copy, baseline, tmp_path):
    """A failing gate without PyTorch still names graph and step. It also says what it takes to name the block."""
    samples = tmp_path / "features.npz"
    np.savez(samples, features=np.random.default_rng(0).standard_normal((9, 2)))
    swap_vectors(meta_copy, 2)
    seal(meta_copy)
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnx_graphsurgeon", "diffusers", "scipy", "PIL"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Blocker())
from dit_export.cli import main
sys.exit(main(sys.argv[1:]))
"""
    for bundle, expected in ((meta.bundle, 0), (meta_copy, 1)):
        arguments = ["regress", str(bundle), "--baseline", str(baseline), "--report", str(tmp_path / "report.html")]
        arguments += ["--samples", str(samples), "--real", str(samples)]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
    assert "FAILED denoiser: prediction, rel-L2, step 1 of 10" in done.stdout
    assert "not localized: " in done.stdout and "pip install 'dit-export[export]'" in done.stdout.splitlines()[-1]


def test_a_broken_decoder_is_not_the_denoisers_fault(shared_embedders, tmp_path, regress):
    bundle = Path(shutil.copytree(shared_embedders.bundle, tmp_path / "bundle"))
    np.memmap(bundle / "decoder.onnx.data", np.float32, "r+")[:4000] *= 3
    seal(bundle)
    verdict = regress(bundle)
    assert (verdict.code, verdict.first["stage"], verdict.located) == (1, "decoder", [])
    assert {graph for graph, _ in verdict.failed} == {"decoder", "run"}

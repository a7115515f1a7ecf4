"""The commands that look at bundles and graphs: what they print for people and for machines."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import dit_export.cli
import dit_runtime
import dit_runtime.cli
import dit_runtime.verify
import dit_serve.cli
from dit_export.cli.console import sample_command
from dit_runtime import Pipeline
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Port
from dit_runtime.files import write_file
from dit_runtime.run import Run
from tests.conftest import Built

LABELS = Port("labels", "condition", "int64", (), size=13)
STYLE = Port("style", "condition", "float32", (4,))
Capture = pytest.CaptureFixture[str]


def run_json(capsys: Capture, main, *arguments: str) -> dict:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("main", [dit_export.cli.main, dit_runtime.cli.main, dit_serve.cli.main])
def test_version(main, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out.split()[1:] == [dit_runtime.__version__]


def test_info(meta: Built, capsys: Capture) -> None:
    assert dit_runtime.cli.main(["info", str(meta.bundle)]) == 0
    text = capsys.readouterr().out
    assert "2x64/2 at 64 px, 12 classes" in text
    assert f"backend onnxruntime: {onnxruntime.__version__}" in text
    table = run_json(capsys, dit_runtime.cli.main, "info", str(meta.bundle))
    assert table["bundle"]["labels"][3] == "dog"
    assert run_json(capsys, dit_runtime.cli.main, "info").keys() == {"backends"}


def test_compile_makes_engines_and_verifies(meta_copy: Path, capsys: Capture) -> None:
    before = manifest.read(meta_copy)
    assert run_json(capsys, dit_runtime.cli.main, "compile", str(meta_copy), "--backend", "onnxruntime")["passed"]
    after = manifest.read(meta_copy)
    assert replace(after, parity=before.parity) == before  # ONNX Runtime has no engine files of its own
    assert after.parity["worst"].keys() < before.parity["worst"].keys() and after.parity["passed"]

    weights = meta_copy / "denoiser.onnx.data"
    damaged = bytearray(weights.read_bytes())
    damaged[1000] ^= 64
    weights.write_bytes(damaged)
    assert dit_runtime.cli.main(["compile", str(meta_copy)]) == 2


def test_compile_takes_no_stray_files_and_keeps_no_failure(
    meta_copy: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (meta_copy / "manifest.json").read_bytes()
    (meta_copy / "notes.txt").write_text("mine")
    strict = replace(dit_runtime.verify.TOLERANCES["fp32"], latents=0.0)
    with monkeypatch.context() as patch:
        patch.setitem(dit_runtime.verify.TOLERANCES, "fp32", strict)
        assert dit_runtime.cli.main(["compile", str(meta_copy)]) == 1
    assert (meta_copy / "manifest.json").read_bytes() == before
    assert dit_runtime.cli.main(["compile", str(meta_copy)]) == 0
    (meta_copy / "notes.txt").unlink()
    assert dit_runtime.cli.main(["info", str(meta_copy)]) == 0


def test_writing_a_manifest_follows_no_link(meta_copy: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (meta_copy / "manifest.json.partial").symlink_to(victim)
    manifest.write(meta_copy, manifest.read(meta_copy))
    assert victim.read_text() == "precious"


def test_what_cannot_be_put_in_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.engine").mkdir()  # which no file takes the place of
    with pytest.raises(OSError, match="directory"):
        write_file(tmp_path / "x.engine", b"plan")
    assert [path.name for path in tmp_path.iterdir()] == ["x.engine"]


def test_hoist_leaves_its_own_input_alone(meta_copy: Path, capsys: Capture) -> None:
    weights = meta_copy / "denoiser.onnx.data"
    size = weights.stat().st_size
    arguments = ["hoist", str(meta_copy / "denoiser.onnx"), "--loop-input", "latents", "-o", str(meta_copy)]
    assert dit_export.cli.main(arguments) == 2
    assert weights.stat().st_size == size


def test_make_reads_its_variables() -> None:
    def command(*variables: str) -> str:
        return subprocess.run(["make", "-n", "engine", *variables], capture_output=True, text=True).stdout

    assert "--synthetic" in command("MODEL=S/2", "SYNTHETIC=1")
    assert "--synthetic" not in command("MODEL=S/2", "SYNTHETIC=0")
    assert "--checkpoint '/my dir/x.pt'" in command("CHECKPOINT=/my dir/x.pt")


def test_bench_times_each_graph(meta: Built, capsys: Capture) -> None:
    arguments = ["bench", str(meta.bundle), "--rounds", "2", "--steps", "2", "--batch", "3"]
    capsys.readouterr()
    assert dit_runtime.cli.main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["timings"]
    assert {"denoiser, a guided step", "latents, 2 guided steps", "the host's loop itself, 2 guided steps"} <= {
        row["name"] for row in rows
    }
    assert all(0 < row["least_ms"] <= row["median_ms"] <= row["most_ms"] for row in rows)


def test_no_step_is_waited_for_where_nobody_watches(
    meta: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, state = [], Run.state
    monkeypatch.setattr(Run, "state", property(lambda run: steps.append(run.done) or state.fget(run)))
    arguments = ["--labels", "1", "--steps", "2", "-o", str(tmp_path / "x.npy")]
    assert dit_runtime.cli.main(["sample", str(meta.bundle), *arguments]) == 0
    assert steps == [2]  # of the last step alone is the state brought home


def test_verify_against_pytorch_knows_its_weights(
    meta_copy: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, load = [], Pipeline.load
    monkeypatch.setattr(Pipeline, "load", lambda *_, **how: opened.append(how) or load(*_, **how))
    assert run_json(capsys, dit_export.cli.main, "verify", str(meta_copy), "--low-memory", "--threads", "1")["passed"]
    assert opened == [{"size": None, "threads": 1, "provider": None, "low_memory": True}]
    table = json.loads((meta_copy / "manifest.json").read_text())
    digests = dict.fromkeys(table["source"]["sha256"], "0" * 64)
    for change, said in (
        ({"sha256": digests}, "not the ones of this bundle"),
        (
            {"recipe": table["source"]["recipe"] | {"flavour": 1}},
            "has 'flavour', which this version does not know; rebuild",
        ),
    ):
        (meta_copy / "manifest.json").write_text(json.dumps(table | {"source": table["source"] | change}))
        assert dit_export.cli.main(["verify", str(meta_copy)]) == 2
        assert said in capsys.readouterr().err


def test_inspect_counts_ops_and_weights(meta: Built, capsys: Capture) -> None:
    table = run_json(capsys, dit_export.cli.main, "inspect", str(meta.bundle))
    assert table.keys() == {"conditioner", "denoiser", "update"}
    assert table["denoiser"]["ops"]["Attention"] == 2
    assert table["conditioner"]["outputs"] == {"conditioning": ["float32", "rows", 14, 64]}
    size = meta.bundle.joinpath("denoiser.onnx.data").stat().st_size
    assert table["denoiser"]["weight_bytes"]["float32"] == pytest.approx(size, rel=0.02)
    assert table["denoiser"]["cut"]["crossing"] == 14 and table["denoiser"]["cut"]["priced_out"] == 0
    assert "cut" not in table["conditioner"]
    assert dit_export.cli.main(["inspect", str(meta.bundle)]) == 0
    size = meta.bundle.joinpath("conditioner.onnx.data").stat().st_size
    text = capsys.readouterr().out
    assert f"  left the loop: {size / 1e6:.1f} MB of weights\n  crosses: 14 tensors" in text
    assert dit_export.cli.main(["inspect", str(meta.bundle / "denoiser.onnx")]) == 0
    assert "LayerNormalization 5" in capsys.readouterr().out
    assert dit_export.cli.main(["inspect", str(meta.bundle / "manifest.json")]) == 2


class Foreign(nn.Module):
    """Somebody else's loop body: convolutions, a GRU-like gate, conditioning by multiplication and concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 24))
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.join = nn.Conv2d(48, 3, 1)

    def forward(self, sample: Tensor, condition: Tensor) -> Tensor:
        vector = self.embed(condition)[:, :, None, None]
        x = self.stem(sample) * (1 + vector).sigmoid()
        return self.join(torch.cat([x, vector.expand(-1, -1, 8, 8)], dim=1))


def test_hoist_splits_a_model_from_elsewhere(tmp_path: Path, capsys: Capture) -> None:
    torch.manual_seed(0)
    path, inputs = tmp_path / "model.onnx", (torch.randn(2, 3, 8, 8), torch.randn(2, 5))
    torch.onnx.export(Foreign().eval(), inputs, dynamo=True, input_names=["sample", "condition"], verbose=False).save(
        path
    )
    table = run_json(capsys, dit_export.cli.main, "hoist", str(path), "--loop-input", "sample")
    folder = Path(table["folder"])
    assert folder == tmp_path / "model-hoisted"

    feeds = {"sample": inputs[0].numpy(), "condition": inputs[1].numpy()}
    run = {name: onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("invariant", "loop")}
    (whole,) = onnxruntime.InferenceSession(path).run(None, feeds)
    frontier = run["invariant"].run(None, {"condition": feeds["condition"]})
    feeds = {"sample": feeds["sample"]} | dict(zip(table["frontier"], frontier, strict=True))
    np.testing.assert_allclose(run["loop"].run(None, feeds)[0], whole, rtol=0, atol=1e-6)  # the same ops, split

    ops = {name: [node.op_type for node in onnx.load(folder / f"{name}.onnx").graph.node] for name in run}
    assert not {"Gemm", "Tanh", "Sigmoid"} & set(ops["loop"])
    assert ops["loop"].count("Conv") == 2
    assert all(np.prod(tensor.shape) <= 2 * 24 for tensor in frontier)  # the vector travels, not its 8 × 8 copies

    capsys.readouterr()
    assert dit_export.cli.main(["hoist", str(path), "--loop-input", "smaple"]) == 2
    assert 'did you mean "sample"?' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ports", "null", "options"),
    [
        ([LABELS], {"labels": 12}, "--labels 3 9"),
        ([LABELS], {}, "--labels 3 9 --negative-condition NEGATIVE.npz"),
        ([LABELS, STYLE], {"labels": 12}, "--labels 3 9 --condition CONDITION.npz --negative-condition NEGATIVE.npz"),
        ([LABELS, STYLE], {"labels": 12, "style": 0.0}, "--labels 3 9 --condition CONDITION.npz"),
        ([STYLE], {}, "--condition CONDITION.npz --negative-condition NEGATIVE.npz"),
        ([], {}, ""),
    ],
)
def test_the_next_command_brings_what_the_network_takes(meta: Built, ports, null, options) -> None:
    contract = manifest.read(meta.bundle)
    if "labels" not in null:
        ports = [replace(port, size=12) if port.size else port for port in ports]
    contract = replace(contract, ports=(contract.state, contract.time, *ports), null=null)
    words = sample_command(meta.bundle, contract).partition(str(meta.bundle))[2].removesuffix("-o latents.npy")
    assert words.strip() == options

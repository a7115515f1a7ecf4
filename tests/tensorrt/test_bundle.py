"""A bundle compiled for TensorRT-RTX on a machine with no GPU, and refused there in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import dit_runtime.cli
from dit_export.cli import main
from dit_export.recipe import Recipe
from dit_runtime.backends import Tuning, cuda
from dit_runtime.backends.trt import RTX, TENSORRT, Flavour
from dit_runtime.bundle import manifest
from dit_runtime.errors import BundleError
from dit_runtime.facts import FACTS
from dit_runtime.verify import Figure
from tests.conftest import HEADS
from tests.tamper import edit
from tests.tensorrt.fake_cuda import Cuda


def run(capsys, *command: str) -> tuple[int, str]:
    capsys.readouterr()
    code = dit_runtime.cli.main([*command])
    captured = capsys.readouterr()
    assert captured.err.count("error:") <= 1 and "Traceback" not in captured.err
    return code, captured.err if code else captured.out


@pytest.fixture(scope="module")
def built(handmade, tmp_path_factory) -> Path:
    """Hand-made graphs with engines for some compute capabilities, so that there are others to refuse."""
    bundle = proven(handmade("labels"), tmp_path_factory.mktemp("tensorrt") / "bundle")
    command = ["compile", str(bundle), "--backend", "tensorrt-rtx", "--compute-capability", "8.6", "8.9"]
    assert dit_runtime.cli.main(command) == 0
    return bundle


@pytest.fixture
def plain(handmade, tmp_path) -> Path:
    """The same without engines."""
    return proven(handmade("labels"), tmp_path / "plain")


def proven(source: Path, target: Path) -> Path:
    """A copy that says of itself what a build has proven."""
    shutil.copytree(source, target)
    manifest.write(target, replace(manifest.read(target), parity={"proof": "sensitive", "passed": True, "worst": {}}))
    return target


@pytest.fixture
def bundle(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def test_each_flavour_has_precisions_of_its_own(monkeypatch) -> None:
    monkeypatch.setitem(FACTS["precisions"], "tensorrt-rtx", ["fp32", "fp16"])
    assert RTX.PRECISIONS == ("fp32", "fp16") and "bf16" in TENSORRT.PRECISIONS


def test_what_a_build_leaves(meta, tmp_path, one_thread) -> None:
    bundle = tmp_path / "bundle"
    options = ["--heads", str(HEADS), "--latents-only", "--max-batch", "2", "--compute-capability", "8.6", "8.9"]
    command = ["build", "--checkpoint", str(meta.checkpoint), "--backend", "tensorrt-rtx", "--precision", "fp16"]
    with one_thread():
        assert main([*command, *options, "-o", str(bundle)]) == 0
    contract = manifest.read(bundle)
    assert {(stage.name, stage.precision, stage.backend) for stage in contract.stages} == {
        ("conditioner", "fp32", "tensorrt-rtx"),
        ("denoiser", "fp16", "tensorrt-rtx"),
        ("update", "fp32", "tensorrt-rtx"),
    }
    assert contract.step.files == ("denoiser.tensorrt-rtx.engine",)
    engines = contract.built_with["engines"]["tensorrt-rtx"]
    assert engines["denoiser"]["compute_capabilities"] == ["8.6", "8.9"]
    assert engines["denoiser"]["census"] == {"of": "network", "products": {"fp16": 5 * 2 + 2}, "islands": []}
    assert engines["update"]["census"]["products"] == {"fp32": 1}
    recipe = Recipe(**contract.source["recipe"])  # with which the engines can be made again
    assert recipe.tuning == Tuning(compute_capability=("8.6", "8.9")) and recipe.precision == "fp16"
    assert 'compute_capability = ["8.6", "8.9"]' in recipe.to_toml()
    checks = json.loads((bundle / "parity.json").read_text())["checks"]
    names = {check["name"] for check in checks}
    assert all(check["passed"] for check in checks) and "twin: run: runs that are not finite" in names
    assert {name.split(": ")[0] for name in names} == {"proof", "twin"}  # no engine ran, and none is said to have
    assert "The engines do not run where this was built" in (bundle / "report.html").read_text()


@pytest.mark.parametrize(
    "command", [["verify"], ["sample", "--labels", "1", "-o", "x.npy"], ["bench"]], ids=lambda c: c[0]
)
def test_without_a_driver(built, capsys, command) -> None:
    code, output = run(capsys, command[0], str(built), *command[1:])
    assert code == 2 and "conditioner.tensorrt-rtx.engine: cannot run here: " in output
    assert f"dit-run compile {built} --backend tensorrt-rtx" in output and output.count("\n") == 1


def test_a_flipped_byte_is_seen_first(bundle, capsys) -> None:
    path = bundle / "conditioner.tensorrt-rtx.engine"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, output = run(capsys, "verify", str(bundle))
    assert code == 2 and "conditioner.tensorrt-rtx.engine does not have the sha256 of its manifest" in output


@pytest.mark.parametrize("version", ["1.6.0", "2.0"])
def test_another_version(bundle, capsys, monkeypatch, version) -> None:
    monkeypatch.setattr(cuda, "runtime", Cuda)

    def change(table: dict) -> None:
        table["built_with"]["engines"]["tensorrt-rtx"]["conditioner"]["version"] = version

    edit(bundle, change)
    code, output = run(capsys, "verify", str(bundle))
    assert code == 2 and f"built by tensorrt-rtx {version}, and here is 1.7" in output


def test_another_gpu(built, capsys, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "runtime", lambda: Cuda("9.0"))
    code, output = run(capsys, "verify", str(built))
    assert code == 2 and "compute capability 9.0 here, and the engine is for 8.6, 8.9" in output


@pytest.mark.parametrize("wrong", [3, [], {"version": 3}, {"compute_capabilities": "8.9"}, {"tuning": None}], ids=str)
def test_a_malformed_record_of_an_engine(bundle, capsys, wrong) -> None:
    def change(table: dict) -> None:
        table["built_with"]["engines"]["tensorrt-rtx"]["conditioner"] = wrong

    edit(bundle, change)
    code, output = run(capsys, "verify", str(bundle))
    assert (code == 2 and "cannot run here" in output) or "built_with says" in output


def test_compiled_again_on_the_target(plain, capsys) -> None:
    """A bundle that was built for another backend is compiled from its ONNX."""
    code, output = run(capsys, "compile", str(plain), "--backend", "tensorrt-rtx", "--compute-capability", "12.0")
    assert code == 0 and output.startswith("compiled and not verified: ")
    contract = manifest.read(plain)
    assert contract.step.files == ("denoiser.tensorrt-rtx.engine",)
    built = contract.built_with["engines"]["tensorrt-rtx"]["denoiser"]
    assert built["census"]["products"] == {"fp32": 2} and built["compute_capabilities"] == ["12.0"]
    assert run(capsys, "verify", str(plain))[0] == 2


def files(bundle: Path) -> dict[str, tuple[int, int]]:
    """Return the inode and the time of the last change of each file, by name."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in bundle.iterdir()}


def test_compiled_again_beside_what_works(bundle, capsys, monkeypatch) -> None:
    """Damaged engines are no obstacle, links are not followed, and only what was verified replaces."""
    victim = bundle.with_name("victim")
    victim.write_text("precious")
    (bundle / "denoiser.tensorrt-rtx.again.engine").symlink_to(victim)
    (bundle / "conditioner.tensorrt-rtx.engine").write_bytes(b"half of it")
    command = ["compile", str(bundle), "--backend", "tensorrt-rtx", "--compute-capability", "12.0"]
    before, contract = files(bundle), manifest.read(bundle, engines=False)

    monkeypatch.setattr(dit_runtime.cli, "why_unavailable", lambda *_: None)
    wrong = [Figure("denoiser", "prediction, rel-L2", 1.0, 1e-4)]
    monkeypatch.setattr(dit_runtime.cli, "_figures", lambda options: wrong)
    assert run(capsys, *command)[0] == 1
    after = files(bundle)
    assert manifest.read(bundle, engines=False) == contract and victim.read_text() == "precious"
    unchanged = {name for name in before if not name.endswith(".again.engine")} - {"manifest.json"}
    assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}
    assert unchanged | {"manifest.json"} == after.keys()  # nor are engines left that failed

    monkeypatch.setattr(dit_runtime.cli, "_figures", lambda options: [replace(wrong[0], value=1e-5)])
    for turn, name in (("again", "denoiser.tensorrt-rtx.again.engine"), ("back", "denoiser.tensorrt-rtx.engine")):
        assert run(capsys, *command)[0] == 0, turn
        contract = manifest.read(bundle)
        assert contract.step.files == (name,)
        assert [path.name for path in bundle.glob("denoiser*.engine")] == [name]
        assert contract.parity == {
            "proof": "sensitive",
            "passed": True,
            "worst": {"denoiser: prediction, rel-L2": 1e-5},
        }


def test_a_graph_that_does_not_compile_leaves_the_rest_as_it_was(bundle, capsys, monkeypatch) -> None:
    compile_ = Flavour.compile

    def failing(self, folder, stage, *options):
        if stage.name == "decoder":
            raise BundleError("no room for the last")
        return compile_(self, folder, stage, *options)

    monkeypatch.setattr(Flavour, "compile", failing)
    before = files(bundle)
    assert "no room for the last" in run(capsys, "compile", str(bundle), "--backend", "tensorrt-rtx")[1]
    assert files(bundle) == before


def test_a_disk_that_is_full_at_the_end(bundle, capsys, monkeypatch) -> None:
    """The manifest that would name the new engines cannot be written: they go."""
    before = files(bundle)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(manifest, "write", full)
    code, output = run(capsys, "compile", str(bundle), "--backend", "tensorrt-rtx")
    assert code == 2 and "No space left" in output
    assert files(bundle) == before


def test_what_was_not_verified_does_not_say_that_it_was(plain, capsys) -> None:
    command = ["compile", str(plain), "--backend", "tensorrt-rtx", "--json"]
    code, output = run(capsys, *command)
    assert code == 0 and json.loads(output)["passed"] is None
    assert manifest.read(plain).parity == {"proof": "sensitive"}  # of the weights, which are the same
    assert "parity     not verified, proof: sensitive" in run(capsys, "info", str(plain))[1]


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_an_engine_of_another_backend_is_no_obstacle(plain, capsys, damage) -> None:
    """A bundle that came without its large engines runs on what is here, and names them no more."""
    assert run(capsys, "compile", str(plain), "--backend", "tensorrt-rtx")[0] == 0
    engine = plain / "denoiser.tensorrt-rtx.engine"
    engine.unlink() if damage == "missing" else engine.write_bytes(b"half of it")
    assert run(capsys, "compile", str(plain), "--backend", "onnxruntime")[0] == 0
    contract = manifest.read(plain)
    assert engine.name not in contract.files and not engine.exists()
    assert contract.step.engines == {}
    assert contract.built_with["engines"]["tensorrt-rtx"].keys() == {"conditioner", "update", "decoder"}
    assert contract.update.engines == {"tensorrt-rtx": ("update.tensorrt-rtx.engine",)}  # which is whole
    assert contract.parity["passed"] and contract.parity["proof"] == "sensitive"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["openvino", "--compute-capability", "8.9", "--strip-plan"], "the options of TensorRT were given"),
        (["tensorrt-rtx", "--threads", "4"], "threads and provider are options of the CPU's backends"),
        (["tensorrt-rtx", "--timing-cache", "x"], "tensorrt-rtx has no --timing-cache"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_options_of_another_backend_are_refused(plain, capsys, options, reason) -> None:
    before = files(plain)
    code, error = run(capsys, "compile", str(plain), "--backend", *options)
    assert code == 2 and reason in error and files(plain) == before


def test_a_bundle_of_another_precision_is_not_compiled(plain, capsys) -> None:
    """OpenVINO's bf16 is computed from an fp32 graph."""

    def change(table: dict) -> None:
        next(stage for stage in table["stages"] if stage["name"] == "denoiser")["precision"] = "bf16"

    edit(plain, change)
    code, output = run(capsys, "compile", str(plain), "--backend", "tensorrt-rtx")
    assert code == 1 and "denoiser: 2 of 2 products are not in bf16" in output
    assert manifest.read(plain).step.backend == "onnxruntime"


def test_the_options_are_refused_before_the_work(meta, tmp_path, capsys) -> None:
    command = ["build", "--checkpoint", str(meta.checkpoint), "--precision", "fp8", "-o", str(tmp_path / "x")]
    for options, reason in (
        (["--backend", "tensorrt-rtx", "--compute-capability", "8.6"], "compute capability 8.6 has no fp8"),
        (["--backend", "tensorrt-rtx", "--version-compatible"], "tensorrt-rtx has no --version-compatible"),
        (["--backend", "onnxruntime", "--precision", "fp16", "--refittable"], "options of TensorRT were given"),
    ):
        assert main([*command, *options]) == 2
        assert reason in capsys.readouterr().err

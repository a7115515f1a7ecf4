"""The user's own mistakes: one line that says what, got and expected; exit code 2; nothing written."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from dit_export.cli import main as export
from dit_runtime.cli import main as run
from tests.conftest import meta_state

pytestmark = pytest.mark.filterwarnings("error")  # a warning would be a second line on standard error


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch, listing):
    """Runs a command in a folder of its own and checks all that every refusal has in common."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def check(main, *arguments: object, said: tuple[str, ...], watched: tuple[Path, ...] = ()) -> str:
        folders = (tmp_path, *watched)
        before = [listing(folder) for folder in folders]
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert code == 2, captured.err
        assert len(lines) == 1 and ": error: " in lines[0], captured.err
        assert captured.out == ""
        for words in said:
            assert words in lines[0], f"{words!r} is not in {lines[0]!r}"
        assert [listing(folder) for folder in folders] == before, "something was written"
        return lines[0]

    return check


BUILD = [
    (["XL/3", "--synthetic"], ["'XL/3'", 'did you mean "XL/', "S/8"]),
    (["xl/2", "--synthetic"], ['did you mean "XL/2"']),
    (["S/8", "--synthetic", "--precision", "fp17"], ["precision 'fp17'", "fp32"]),
    (["S/8", "--synthetic", "--backend", "onnxruntim"], ["backend 'onnxruntim'", 'did you mean "onnxruntime"']),
    (
        ["S/8", "--synthetic", "--presets", "x.json"],
        ["x.json: no such file", "dit-export tune BUNDLE --presets x.json"],
    ),
    (["S/8", "--synthetic", "--max-batch", "0"], ["max-batch 0", "at least 1"]),
    (["S/8", "--synthetic", "--caption-tokens", "0"], ["caption-tokens 0", "at least 1"]),
    (["S/8", "--synthetic", "--caption-tokens", "-3"], ["caption-tokens -3", "at least 1"]),
    (["S/8", "--synthetic", "--caption-tokens", "20"], ["caption-tokens 20", "no captions"]),
    (["S/8", "--synthetic", "--embedded-guidance", "3.5"], ["embedded-guidance 3.5", "no weight of guidance"]),
    (["S/8", "--synthetic", "--resolution", "100"], ["100"]),
    (["S/8", "--synthetic", "--resolution", "big"], ["resolution big", "512x256"]),
    (["S/8", "--synthetic", "--resolution", "257"], ["257"]),
    (["S/8", "--synthetic", "--resolution", "-256"], ["-256"]),
    (["S/8", "--synthetic", "--resolution", "0"], ["resolution 0", "multiple of 8"]),
    (["S/8", "--synthetic", "--heads", "5"], ["heads", "6", "5"]),
    (["S/8", "--synthetic", "--checkpoint", "x.pt"], ["x.pt", "--synthetic", "one of them"]),
    (["S/8", "--synthetic", "--prediction", "velocty"], ["prediction is 'velocty'", "epsilon", "velocity"]),
    (["--synthetic"], ["model", "S/8"]),
    ([], ["--checkpoint"]),
    (["none.toml"], ["none.toml"]),
    (["--checkpoint", "none.pt"], ["none.pt", "no such file"]),
    (["--checkpoint", "."], ["config.json"]),
    (["B/4"], ["no public weights", "B/4", "--checkpoint", "--synthetic"]),
    (["S/8", "--synthetic", "--keep-float", "fc2"], ["keep-float ['fc2']", "int8", "fp32"]),
    (["S/8", "--synthetic", "--strict"], ["strict True", "int8", "fp32"]),
    (["S/8", "--synthetic", "--calibration", "c.npz"], ["calibration c.npz", "int8", "fp32"]),
    (
        ["S/8", "--precision", "int8", "--calibration", "c.npz", "--conditions", "p.npz"],
        ["c.npz", "p.npz", "one of them"],
    ),
    (["S/8", "--synthetic", "--latents-only", "--vae", "x"], ["a VAE (x)", "--latents-only", "one of them"]),
]
QUANTIZE = [
    (["--budget", "psnr"], ["budget 'psnr'", "PSNR=DECIBELS", "latent-rel-l2=ERROR"]),
    (["--budget", "PSNR=-1"], ["budget 'PSNR=-1'"]),
    (["--precision", "fp16"], ["precision 'fp16'", "int8"]),
    (["--precision", "fp32"], ["precision 'fp32'", "int8"]),
    (["--recipe", "nowhere/x.toml"], ["nowhere/x.toml", "nowhere does not exist"]),
]


@pytest.mark.parametrize(("arguments", "said"), BUILD, ids=lambda value: " ".join(value)[:40])
def test_build(refused, arguments, said):
    refused(export, "build", *arguments, "-o", "bundle", said=tuple(said))


@pytest.mark.parametrize(("arguments", "said"), QUANTIZE, ids=lambda value: " ".join(value)[:40])
def test_quantize(refused, arguments, said):
    refused(export, "quantize", "S/8", "--synthetic", *arguments, "-o", "bundle", said=tuple(said))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('model = "S/8"\npreccision = "fp32"', ["'preccision'", 'did you mean "precision"']),
        ('model = "S/8', ["not a TOML recipe"]),
        ('model = "S/8"\nresolution = 25.6', ["resolution is 25.6", "int"]),
        ("model = 8\nsynthetic = 0", ["model is 8", "str"]),
        ('model = "S/8"\nkeep-float = "fc2"', ["keep-float is 'fc2'", "list"]),
        ('model = "S/8"\nkeep-float = [2]', ["keep-float is [2]", "strings"]),
        ('model = "S/8"\nsynthetic = true', ["synthetic is True", "int"]),
    ],
)
def test_recipe(refused, tmp_path, text, said):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    refused(export, "build", recipe, said=("recipe.toml", *said))


def test_quantize_makes_no_other_precision_of_a_recipe(refused, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = "S/8"\nsynthetic = 0\nprecision = "fp8"')
    refused(export, "quantize", recipe, said=("precision 'fp8'", "int8"))


def test_what_an_int8_build_needs_is_asked_before_it_starts(refused, meta, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ["--checkpoint", meta.checkpoint, "--heads", 4, "--latents-only", "--precision", "int8"]
    refused(export, "quantize", *options, "--budget", "PSNR=30", said=("PSNR=30", "no decoder"))
    refused(export, "build", *options, "--conditions", "c.npy", said=("c.npy", "no such file"))
    refused(export, "build", *options, "--calibration", "~/c.npz", said=(str(tmp_path / "c.npz"), "calibration"))


def test_an_output_folder_that_is_no_bundle(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    refused(export, "build", "S/8", "--synthetic", "-o", tmp_path / "mine", said=("mine", "no bundle", "-o"))
    refused(export, "build", "S/8", "--synthetic", "-o", "~/mine", said=(str(tmp_path / "mine"), "no bundle", "-o"))


def test_weights_of_a_graph_that_were_cut_short(refused, meta_copy):
    file = meta_copy / "denoiser.onnx"
    weights = meta_copy / "denoiser.onnx.data"
    for size in (weights.stat().st_size // 2, 0):
        os.truncate(weights, size)
        said = (f"{weights}: {size} bytes, expected at least",)
        refused(export, "inspect", file, said=said)
        refused(export, "hoist", file, "--loop-input", "latents", said=said)


def test_no_hub(refused, meta, monkeypatch):
    """Without weights and without a network nothing falls back to made-up weights in silence."""

    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    said = ("facebook/DiT-XL-2-256", "no route to host", "--checkpoint", "--synthetic")
    assert refused(export, "build", "XL/2", said=said).startswith("dit-export: error: ")
    refused(export, "build", "XL/2", "--resolution", 512, said=("facebook/DiT-XL-2-512", *said[1:]))
    refused(export, "build", "--checkpoint", "someone/dit", said=("someone/dit", *said[1:]))
    arguments = ["--checkpoint", meta.checkpoint, "--heads", 4, "--vae"]
    refused(export, "build", *arguments, "some/vae", said=("some/vae", "no route", "--vae", "--latents-only"))
    refused(export, "build", *arguments, "no/such/folder", said=("no/such/folder",))


class Trap:
    """Unpickled, it makes a file: the sign that code ran."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["torch.save", "pickle"])
def test_code_in_a_checkpoint_does_not_run(refused, tmp_path, form):
    file, marker = tmp_path / "evil.pt", tmp_path / "ran"
    if form == "torch.save":
        torch.save({"ema": {"x_embedder.proj.weight": torch.zeros(2)}, "extra": Trap(marker)}, file)
    else:
        file.write_bytes(pickle.dumps({"ema": {}, "extra": Trap(marker)}, protocol=2))
    refused(export, "build", "--checkpoint", file, "--latents-only", said=("evil.pt", "code", "mkdir"))
    assert not marker.exists()
    torch.load(file, weights_only=False) if form == "torch.save" else pickle.loads(file.read_bytes())
    assert marker.exists()  # the trap works


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint(refused, tmp_path, suffix, share):
    file = tmp_path / f"short{suffix}"
    save_file(meta_state(), file) if suffix == ".safetensors" else torch.save(meta_state(), file)
    os.truncate(file, int(share * file.stat().st_size))
    said = (f"short{suffix}: damaged, or not a",)
    refused(export, "build", "--checkpoint", file, "--heads", 4, "--latents-only", said=said)


def test_weights_that_do_not_fit(refused, tmp_path):
    """Missing, extra and misshapen keys: at most five by name, the rest counted."""
    options = ["--checkpoint", tmp_path / "odd.pt", "--heads", 4, "--latents-only"]
    state = meta_state() | {"blocks.1.attn.qkv.bias": torch.zeros(7)}
    del state["final_layer.linear.bias"]
    torch.save(state, tmp_path / "odd.pt")
    said = ("final_layer.linear.bias is missing", "blocks.1.attn.qkv.bias is [7], expected [192]")
    refused(export, "build", *options, said=said)
    torch.save(state | {f"extra.{n}": torch.zeros(1) for n in range(20)}, tmp_path / "odd.pt")
    assert refused(export, "build", *options, said=(said[0], "17 more")).count("extra.") == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(refused, tmp_path, value):
    state = meta_state()
    state["blocks.0.mlp.fc1.bias"][3] = value
    torch.save(state, tmp_path / "nan.pt")
    said = ("blocks.0.mlp.fc1.bias", "NaN or infinite")
    refused(export, "build", "--checkpoint", tmp_path / "nan.pt", "--heads", 4, "--latents-only", said=said)


def test_a_checkpoint_without_a_vae(refused, meta):
    said = ("--vae", "--latents-only")
    refused(export, "build", "--checkpoint", meta.checkpoint, "--heads", 4, said=said)


SAMPLE = [
    (["--labels", "catt"], ["'catt'", 'did you mean "cat"']),
    (["--labels", "Lynks"], ['did you mean "lynx"']),
    (["--labels", "submarine"], ["'submarine'"]),
    (["--labels", "12"], ["label 12", "0 to 11"]),
    (["--labels", "-1"], ["label -1", "0 to 11"]),
    (["--labels=--5"], ["'--5'"]),
    (["--labels", "1.5"], ["'1.5'"]),
    (["--labels", "1", "--steps", "0"], ["steps is 0", "1 to 1000"]),
    (["--labels", "1", "--steps", "-3"], ["steps is -3"]),
    (["--labels", "1", "--steps", "1001"], ["steps is 1001", "1 to 1000"]),
    (["--labels", "1", "--steps", "999"], ["999"]),  # no whole stride: says which do
    (["--labels", "1", "--guidance", "nan"], ["guidance is nan", "finite"]),
    (["--labels", "1", "--guidance", "inf"], ["guidance is inf", "finite"]),
    (["--labels", "1", "--guidance", "1e39"], ["guidance is 1e+39", "finite"]),  # inf in float32
    (["--labels", "1", "2", "--guidance", "1", "2", "3"], ["guidance", "3", "2"]),
    (["--labels", "1", "--solver", "ddimm"], ["solver 'ddimm'", 'did you mean "ddim"', "dpm++"]),
    (["--labels", "1", "--spacing", "trailling"], ["spacing 'trailling'", 'did you mean "trailing"']),
    (["--labels", "1", "--eta", "2"], ["eta is 2.0", "0", "1"]),
    (["--labels", "1", "--eta", "nan"], ["eta is nan"]),
    (["--labels", "1", "--eta", "0.5", "--solver", "dpm++"], ["eta", "dpm++", "ddim"]),
    (["--labels", "1", "--seed", str(-(2**63) - 1)], ["seed is -9223372036854775809", "-2**63"]),
    (["--labels", "1", "--seed", str(2**64)], ["seed is 18446744073709551616", "2**64 - 1"]),
    (["--labels", "1", "--seed", "1", "2"], ["2 seeds", "1 samples"]),
    (["--labels", "1", "--latents", "none.npy"], ["none.npy"]),
    (["--labels", "1", "--provider", "tpu"], ["provider 'tpu'", "cpu"]),
    (["--labels", "1", "--threads", "-1"], ["threads", "-1"]),
]


@pytest.mark.parametrize(("arguments", "said"), SAMPLE, ids=lambda value: " ".join(value)[:40])
def test_sample(refused, meta, arguments, said):
    refused(run, "sample", meta.bundle, "-o", "x.npy", *arguments, said=tuple(said), watched=(meta.bundle,))


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("missing/x.npy", ["missing", "does not exist"]),
        ("x.jpg", ["x.jpg", ".png", ".npz", ".npy"]),
        ("x", ["no decoder"]),  # a folder of images
        ("x.png", ["no decoder"]),
        ("x.npz", ["no decoder"]),
    ],
)
def test_sample_output(refused, meta, output, said):
    refused(run, "sample", meta.bundle, "--labels", 1, "-o", output, said=tuple(said))


@pytest.mark.parametrize(
    "content",
    [b"", b"not an array", pickle.dumps([1]), b"\x93NUMPY\x01\x00\x01\x00{"],
    ids=["empty", "text", "pickle", "half a header"],
)
def test_latents_that_are_no_array(refused, meta, tmp_path, content):
    file = tmp_path / "latents.npy"
    file.write_bytes(content)
    refused(run, "sample", meta.bundle, "--labels", 1, "-o", "x.npy", "--latents", file, said=("latents.npy",))


@pytest.mark.parametrize("command", [["compile"], ["bench"], ["verify"], ["info"]])
def test_no_bundle(refused, command):
    refused(run, *command, "nothing-here", said=("nothing-here", "manifest.json"))


def test_compile_for_an_unknown_backend(refused, meta):
    said = ("backend 'tensorflow'", "onnxruntime")
    refused(run, "compile", meta.bundle, "--backend", "tensorflow", said=said, watched=(meta.bundle,))


@pytest.mark.parametrize("value", ["--batch", "--steps", "--rounds"])
def test_bench(refused, meta, value):
    refused(run, "bench", meta.bundle, value, "0", said=(value.strip("-"), "0"))


@pytest.mark.parametrize("program", ["dit_export.cli", "dit_runtime.cli"])
def test_as_a_program(tmp_path, meta, program):
    """The same from a shell, with the exit code that a CI sees."""
    command = (
        ["build", "XL/3"]
        if program == "dit_export.cli"
        else ["sample", str(meta.bundle), "-o", "x.npy", "--labels", "catt"]
    )
    done = subprocess.run([sys.executable, "-m", program, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "did you mean" in done.stderr
    assert not list(tmp_path.iterdir())


def test_no_label_file(refused, meta):
    options = ["--checkpoint", meta.checkpoint, "--heads", 4, "--latents-only", "--labels", "none.txt"]
    refused(export, "build", *options, said=("none.txt",))

"""A damaged, foreign or hostile bundle: one line, exit code 2, nothing opened that is not what the manifest says."""

from __future__ import annotations

import copy
import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from dit_runtime import BundleError
from dit_runtime.bundle import manifest
from dit_runtime.bundle.summary import summary
from dit_runtime.cli import main
from tests.hostile.files import addressed

COMMANDS = {
    "sample": ["--labels", "1", "-o", "x.npy", "--steps", "2"],
    "verify": [],
    "compile": ["--backend", "onnxruntime"],
    "bench": ["--steps", "2", "--rounds", "1"],
    "info": [],
}
OPENED = "denoiser.onnx"
OPENING = ("sample", "verify", "compile", "bench")  # info opens no graph


def test_the_untouched_copy_is_not_refused(bundle, capsys, tmp_path, monkeypatch):
    """Each command runs as it is called below, so what the tests see is the damage."""
    monkeypatch.chdir(tmp_path)
    for command, arguments in COMMANDS.items():
        assert main([command, str(bundle), *arguments]) == 0, capsys.readouterr().err


@pytest.fixture
def refused(capsys, bundle, tmp_path, monkeypatch, listing):
    """Each command refuses the bundle in the same way, and leaves it as it is."""
    monkeypatch.chdir(tmp_path)

    def check(*said: str, commands=COMMANDS) -> None:
        before = listing(tmp_path)
        for command in commands:
            capsys.readouterr()
            code = main([command, str(bundle), *COMMANDS[command]])
            captured = capsys.readouterr()
            lines = captured.err.splitlines()
            assert code == 2, f"{command}: {captured.err}{captured.out}"
            assert captured.out == "" and len(lines) == 1, captured.err
            for words in ("dit-run: error: ", *said):
                assert words in lines[0], f"{command}: {words!r} is not in {lines[0]!r}"
        assert listing(tmp_path) == before

    return check


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def files(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["files"]


def stage(table: dict, name: str) -> dict:
    return next(entry for entry in table["stages"] if entry["name"] == name)


def described(path: Path) -> dict:
    return {"size": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("name", ["conditioner.onnx.data", "denoiser.onnx.data", OPENED])
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_a_flipped_byte(refused, bundle, name, where):
    content = bytearray((bundle / name).read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    (bundle / name).write_bytes(content)
    refused(name, "sha256", "rebuild", commands=OPENING)


def test_a_flipped_byte_in_the_reference(refused, bundle):
    content = bytearray((bundle / "reference.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "reference.npz").write_bytes(content)
    refused("reference.npz", "sha256", commands=["verify"])


@pytest.mark.parametrize("name", ["conditioner.onnx", "denoiser.onnx.data", "reference.npz"])
def test_a_missing_file(refused, bundle, name):
    (bundle / name).unlink()
    refused(name, "missing", "rebuild")


@pytest.mark.parametrize("name", ["denoiser.onnx.data", "reference.npz"])
@pytest.mark.parametrize("change", ["shorter", "longer"])
def test_a_file_of_another_size(refused, bundle, name, change):
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[:-1] if change == "shorter" else content + b"\0")
    refused(name, f"expected {len(content)}")


def test_no_manifest(refused, bundle):
    (bundle / "manifest.json").unlink()
    refused("manifest.json", "dit-export build")


@pytest.mark.parametrize(
    ("version", "said"),
    [(3, "upgrade"), (99, "upgrade"), (1, "rebuild"), ("2", "format"), (None, "format"), (2.5, "format")],
)
def test_another_format(refused, bundle, version, said):
    edit(bundle, format=version, something="that format 2 does not know")
    refused("manifest.json", said, "expected 2")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"a"', '{"format": 2}', "\ufeff{}", "\x00"])
def test_malformed_json(refused, bundle, text):
    (bundle / "manifest.json").write_text(text)
    refused("manifest.json")


def test_a_byte_order_mark_is_none_of_its_text(bundle):
    before, path = manifest.read(bundle), bundle / "manifest.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert manifest.read(bundle) == before


def test_bytes_that_are_no_text(refused, bundle):
    (bundle / "manifest.json").write_bytes(b"\xff\xfe\xfd")
    refused("manifest.json", "not text in UTF-8")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "..\\outside", "C:outside", ""])
def test_a_path_that_leaves_the_bundle(refused, bundle, name):
    (bundle.parent / "outside").write_text("secret")
    edit(bundle, files=files(bundle) | {name: described(bundle.parent / "outside")})
    refused("leaves the bundle", "refused")


def test_a_stage_whose_path_leaves_the_bundle(refused, bundle):
    """Named under stages as under files, with the right sums: only the path itself is wrong."""
    outside = shutil.copy(bundle / "denoiser.onnx", bundle.parent / "d.onnx")
    shutil.copy(bundle / "denoiser.onnx.data", bundle.parent / "d.onnx.data")
    table = json.loads((bundle / "manifest.json").read_text())
    stage(table, "denoiser")["onnx"] = "../d.onnx"
    table["files"] |= {"../d.onnx": described(outside), "../d.onnx.data": described(outside.with_name("d.onnx.data"))}
    edit(bundle, **table)
    refused("leaves the bundle")


@pytest.mark.parametrize("inner", [True, False], ids=["to a file of the bundle", "to a file outside"])
def test_a_link(refused, bundle, inner):
    file = bundle / "denoiser.onnx.data"
    target = file.rename(bundle / "moved" if inner else bundle.parent / "moved")
    file.symlink_to(target)
    refused("denoiser.onnx.data", "link", "refused")


def test_a_linked_folder(refused, bundle):
    target = bundle.parent / "elsewhere"
    target.mkdir()
    file = shutil.copy(bundle / "reference.npz", target / "x")
    (bundle / "sub").symlink_to(target)
    edit(bundle, files=files(bundle) | {"sub/x": described(Path(file))})
    refused("sub/x", "link")


@pytest.mark.parametrize("location", ["../outside.data", "ABSOLUTE"])
def test_a_graph_whose_weights_are_outside(refused, bundle, location):
    """The ONNX file itself names a path; its sum in the manifest is right."""
    outside = Path(shutil.copy(bundle / "denoiser.onnx.data", bundle.parent / "outside.data"))
    path = bundle / OPENED
    model = onnx.load(path, load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = str(outside) if location == "ABSOLUTE" else location
    onnx.save(model, path)
    edit(bundle, files=files(bundle) | {OPENED: described(path)})
    refused(OPENED, commands=("sample", "verify", "bench"))


def test_a_graph_whose_weights_are_at_an_address(refused, bundle):
    addressed(bundle)
    refused("which is no file of its stage", commands=("sample", "verify", "bench"))


def test_a_graph_that_is_no_onnx(refused, bundle):
    (bundle / OPENED).write_bytes(b"not a graph\nat all")
    edit(bundle, files=files(bundle) | {OPENED: described(bundle / OPENED)})
    refused(OPENED, commands=("sample", "verify", "bench"))


def test_a_graph_of_other_inputs(refused, bundle):
    """A decoder where the conditioner should be: right sums, wrong network."""
    table = json.loads((bundle / "manifest.json").read_text())
    stage(table, "conditioner")["onnx"] = "decoder.onnx"
    edit(bundle, **table)
    refused("conditioner", "inputs", commands=("sample", "verify", "bench"))


def test_a_pickle_in_the_reference(refused, bundle):
    path = bundle / "reference.npz"
    arrays = dict(np.load(path)) | {"seeds": np.array([{"a": 1}], object)}
    np.savez(path, **arrays)
    edit(bundle, files=files(bundle) | {"reference.npz": described(path)})
    refused("reference.npz", commands=["verify"])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello"])
def test_a_reference_that_is_no_npz(refused, bundle, content):
    path = bundle / "reference.npz"
    path.write_bytes(content)
    edit(bundle, files=files(bundle) | {"reference.npz": described(path)})
    refused("reference.npz", commands=["verify"])


@pytest.mark.parametrize("name", ["variance", "condition.labels"])
def test_a_reference_without_an_array(refused, bundle, name):
    path = bundle / "reference.npz"
    arrays = dict(np.load(path))
    del arrays[name]
    np.savez(path, **arrays)
    edit(bundle, files=files(bundle) | {"reference.npz": described(path)})
    refused("reference.npz", name, commands=["verify"])


def test_a_reference_of_other_conditions(refused, bundle):
    path = bundle / "reference.npz"
    np.savez(path, **dict(np.load(path)) | {"condition.labels": np.array([1, 99])})
    edit(bundle, files=files(bundle) | {"reference.npz": described(path)})
    refused("reference.npz", "does not fit the manifest: its condition: labels", commands=["verify"])


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("timesteps", lambda array: array[:0], "it has 0 timesteps, expected 1 to 1024"),
        ("seeds", lambda array: array[:0], "it has 0 seeds, expected 1 to 64"),
        ("seeds", lambda array: array + 0.5, "seeds holds float64; expected integers"),
        ("guidance", lambda array: array[:1], "guidance has shape [1], expected [2]"),
        ("latents", lambda array: array[1:], "latents has shape"),
        ("latents", lambda array: array.astype("U"), "latents: <U32, expected numbers"),
        ("prediction", lambda array: array[:, :1], "prediction has shape"),
        ("conditional", lambda array: array[..., :1], "conditional has shape"),
        ("null", lambda array: array[:0], "null has shape"),
        ("variance", lambda array: array[:, :0], "variance has shape"),
        ("fingerprint", lambda array: array[:, :3], "fingerprint has shape [6, 3], expected [6, 4]"),
        ("images", lambda array: np.empty(0, np.uint8), "images has shape [0], expected [2, "),
        ("betas", lambda array: array[None], "betas has shape"),
        ("condition.labels", lambda array: array[:1], "condition.labels has shape [1], expected [2]"),
        ("null.labels", lambda array: array.repeat(2), "null.labels has shape [2], expected [1]"),
        ("null.labels", lambda array: None, "its null lacks labels"),
    ],
)  # fmt: skip
def test_a_reference_of_other_shapes(refused, bundle, name, change, words):
    path = bundle / "reference.npz"
    arrays = dict(np.load(path))
    arrays[name] = change(arrays[name])
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    edit(bundle, files=files(bundle) | {"reference.npz": described(path)})
    refused("reference.npz", words, commands=["verify"])


def test_a_reference_of_half_a_step(refused, bundle):
    """Heun's method evaluates the network twice a step, so an odd number is none of its runs."""
    path = bundle / "reference.npz"
    arrays = dict(np.load(path))
    steps = len(arrays["timesteps"]) - 1 + len(arrays["timesteps"]) % 2
    per_step = ("timesteps", "prediction", "conditional", "null", "variance")
    arrays |= {name: arrays[name][:steps] for name in per_step} | {"latents": arrays["latents"][: steps + 1]}
    np.savez(path, **arrays)
    process = {"kind": "flow", "sampler": {"solver": "heun"}}
    edit(bundle, process=process, files=files(bundle) | {"reference.npz": described(path)})
    refused(f"timesteps has {steps} numbers, expected 2 a step of heun", commands=["verify"])


def _places(value: Any, path: tuple = ()):
    """Every key and index of a manifest."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield *path, key
        if isinstance(inner, dict | list):
            yield from _places(inner, (*path, key))


def test_no_change_of_the_manifest_ends_in_a_traceback(bundle):
    """Each value replaced by each of a few odd ones, and each key taken out: read, or refused, but never a crash."""
    good = json.loads((bundle / "manifest.json").read_text())
    path, crashed = bundle / "manifest.json", []
    free = ("source", "built_with", "labels", "model", "parity")  # what stands inside these is for people
    for place in [place for place in _places(good) if len(place) == 1 or place[0] not in free]:
        for odd in (None, True, -1, 0, 1.5, 10**30, "", "x", [], {}, [None], "REMOVED"):
            table = copy.deepcopy(good)
            inner = table
            for key in place[:-1]:
                inner = inner[key]
            if odd == "REMOVED":
                del inner[place[-1]]
            else:
                inner[place[-1]] = odd
            path.write_text(json.dumps(table))
            try:
                summary(bundle, manifest.read(bundle))
            except BundleError as error:
                assert str(error).strip()
            except Exception as error:  # the very thing that must not happen: collected, to name all of them at once
                crashed.append(f"{place} = {odd!r}: {type(error).__name__}: {error}")
    assert not crashed, f"{len(crashed)} crashes:\n" + "\n".join(crashed[:400])


@pytest.mark.parametrize("command", ["sample", "verify"])
def test_odd_values_that_only_a_run_would_notice(bundle, capsys, tmp_path, monkeypatch, command):
    """Values of the right kind but not of this network, and of the wrong kind: any exit code, but no traceback."""
    monkeypatch.chdir(tmp_path)
    good = json.loads((bundle / "manifest.json").read_text())
    names = [entry["name"] for entry in good["stages"]]
    step, before = (("stages", names.index(name)) for name in ("denoiser", "conditioner"))
    places = [("ports", 0, "shape"), ("ports", 2, "size"), ("null", "labels"), ("labels",), ("guidance", "channels")]
    places += [(*step, key) for key in ("max_batch", "precision", "backend", "onnx", "engines", "gives", "reads")]
    places += [(*before, "gives", 0, "shape"), (*before, "max_batch"), (*before, "runs")]
    crashed = []
    for place in places:
        for odd in (None, True, -1, 1.5, 7, 10**30, "x", [], [1, 2, 3], ["a", "b", "c"]):
            table = copy.deepcopy(good)
            inner = table
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = odd
            edit(bundle, **table)
            try:
                assert main([command, str(bundle), *COMMANDS[command]]) in (0, 1, 2)
            except Exception as error:
                crashed.append(f"{place} = {odd!r}: {type(error).__name__}: {error}")
    capsys.readouterr()
    assert not crashed, f"{len(crashed)} crashes:\n" + "\n".join(crashed)

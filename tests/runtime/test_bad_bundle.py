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
from dit_runtime.cli import main, summary

COMMANDS = {
    "sample": ["--labels", "1", "-o", "x.npy", "--steps", "2"],
    "verify": [],
    "compile": ["--backend", "onnxruntime"],
    "bench": ["--steps", "2", "--rounds", "1"],
    "info": [],
}
OPENED = "denoiser.onnxruntime.onnx"  # the form that this backend runs
OPENING = ("sample", "verify", "compile", "bench")  # info opens no graph


def test_the_untouched_copy_is_not_refused(meta_copy, capsys, tmp_path, monkeypatch):
    """Each command runs as it is called below, so what the tests see is the damage."""
    monkeypatch.chdir(tmp_path)
    for command, arguments in COMMANDS.items():
        assert main([command, str(meta_copy), *arguments]) == 0, capsys.readouterr().err


@pytest.fixture
def refused(capsys, meta_copy, tmp_path, monkeypatch, listing):
    """Each command refuses the bundle in the same way, and leaves it as it is."""
    monkeypatch.chdir(tmp_path)

    def check(*said: str, commands=COMMANDS) -> None:
        before = listing(tmp_path)
        for command in commands:
            capsys.readouterr()
            code = main([command, str(meta_copy), *COMMANDS[command]])
            captured = capsys.readouterr()
            lines = captured.err.splitlines()
            assert code == 2, f"{command}: {captured.err}{captured.out}"
            assert captured.out == "" and len(lines) == 1, captured.err
            for words in ("dit-run: error: ", *said):
                assert words in lines[0], f"{command}: {words!r} is not in {lines[0]!r}"
        assert listing(tmp_path) == before

    return check


def edit(bundle: Path, **changes: Any) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def files(bundle: Path) -> dict:
    return json.loads((bundle / "manifest.json").read_text())["files"]


def described(path: Path) -> dict:
    return {"size": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("name", ["conditioner.onnx.data", "denoiser.onnx.data", OPENED])
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_a_flipped_byte(refused, meta_copy, name, where):
    content = bytearray((meta_copy / name).read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    (meta_copy / name).write_bytes(content)
    refused(name, "sha256", "rebuild", commands=OPENING)


def test_a_flipped_byte_in_the_reference(refused, meta_copy):
    content = bytearray((meta_copy / "reference.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (meta_copy / "reference.npz").write_bytes(content)
    refused("reference.npz", "sha256", commands=["verify"])


@pytest.mark.parametrize("name", ["conditioner.onnx", "denoiser.onnx.data", "reference.npz"])
def test_a_missing_file(refused, meta_copy, name):
    (meta_copy / name).unlink()
    refused(name, "missing", "rebuild")


@pytest.mark.parametrize("name", ["denoiser.onnx.data", "reference.npz"])
@pytest.mark.parametrize("change", ["shorter", "longer"])
def test_a_file_of_another_size(refused, meta_copy, name, change):
    content = (meta_copy / name).read_bytes()
    (meta_copy / name).write_bytes(content[:-1] if change == "shorter" else content + b"\0")
    refused(name, f"expected {len(content)}")


def test_no_manifest(refused, meta_copy):
    (meta_copy / "manifest.json").unlink()
    refused("manifest.json", "dit-export build")


@pytest.mark.parametrize(
    ("found", "said"),
    [(2, "upgrade"), (99, "upgrade"), (0, "rebuild"), ("1", "format"), (None, "format"), (1.5, "format")],
)
def test_another_format(refused, meta_copy, found, said):
    edit(meta_copy, format=found, something="that format 1 does not know")
    refused("manifest.json", said, "expected 1")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"a"', '{"format": 1}', "\ufeff{}", "\x00"])
def test_malformed_json(refused, meta_copy, text):
    (meta_copy / "manifest.json").write_text(text)
    refused("manifest.json")


def test_a_byte_order_mark_is_none_of_its_text(meta_copy):
    before, path = manifest.read(meta_copy), meta_copy / "manifest.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert manifest.read(meta_copy) == before


def test_bytes_that_are_no_text(refused, meta_copy):
    (meta_copy / "manifest.json").write_bytes(b"\xff\xfe\xfd")
    refused("manifest.json", "not JSON")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "..\\outside", "C:outside", ""])
def test_a_path_that_leaves_the_bundle(refused, meta_copy, name):
    (meta_copy.parent / "outside").write_text("secret")
    edit(meta_copy, files=files(meta_copy) | {name: described(meta_copy.parent / "outside")})
    refused("leaves the bundle", "refused")


def test_a_graph_whose_path_leaves_the_bundle(refused, meta_copy):
    """Named under graphs as under files, with the right sums: only the path itself is wrong."""
    outside = shutil.copy(meta_copy / "denoiser.onnx", meta_copy.parent / "d.onnx")
    shutil.copy(meta_copy / "denoiser.onnx.data", meta_copy.parent / "d.onnx.data")
    table = json.loads((meta_copy / "manifest.json").read_text())
    table["graphs"]["denoiser"]["onnx"] = "../d.onnx"
    table["files"] |= {"../d.onnx": described(outside), "../d.onnx.data": described(outside.with_name("d.onnx.data"))}
    edit(meta_copy, **table)
    refused("leaves the bundle")


@pytest.mark.parametrize("inner", [True, False], ids=["to a file of the bundle", "to a file outside"])
def test_a_link(refused, meta_copy, inner):
    file = meta_copy / "denoiser.onnx.data"
    target = file.rename(meta_copy / "moved" if inner else meta_copy.parent / "moved")
    file.symlink_to(target)
    refused("denoiser.onnx.data", "link", "refused")


def test_a_linked_folder(refused, meta_copy):
    target = meta_copy.parent / "elsewhere"
    target.mkdir()
    file = shutil.copy(meta_copy / "parity.json", target / "x")
    (meta_copy / "sub").symlink_to(target)
    edit(meta_copy, files=files(meta_copy) | {"sub/x": described(Path(file))})
    refused("sub/x", "link")


@pytest.mark.parametrize("location", ["../outside.data", "ABSOLUTE"])
def test_a_graph_whose_weights_are_outside(refused, meta_copy, location):
    """The ONNX file itself names a path; its sum in the manifest is right."""
    outside = Path(shutil.copy(meta_copy / "denoiser.onnx.data", meta_copy.parent / "outside.data"))
    path = meta_copy / OPENED
    model = onnx.load(path, load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = str(outside) if location == "ABSOLUTE" else location
    onnx.save(model, path)
    edit(meta_copy, files=files(meta_copy) | {OPENED: described(path)})
    refused(OPENED, commands=("sample", "verify", "bench"))


def test_a_graph_that_is_no_onnx(refused, meta_copy):
    (meta_copy / OPENED).write_bytes(b"not a graph\nat all")
    edit(meta_copy, files=files(meta_copy) | {OPENED: described(meta_copy / OPENED)})
    refused(OPENED, commands=("sample", "verify", "bench"))


def test_a_graph_of_other_inputs(refused, meta_copy):
    """A denoiser where the conditioner should be: right sums, wrong network."""
    table = json.loads((meta_copy / "manifest.json").read_text())
    table["graphs"]["conditioner"]["onnx"] = "denoiser.onnx"
    edit(meta_copy, **table)
    refused("conditioner", "inputs", commands=("sample", "verify", "bench"))


def test_a_pickle_in_the_reference(refused, meta_copy):
    path = meta_copy / "reference.npz"
    arrays = dict(np.load(path)) | {"labels": np.array([{"a": 1}], object)}
    np.savez(path, **arrays)
    edit(meta_copy, files=files(meta_copy) | {"reference.npz": described(path)})
    refused("reference.npz", commands=["verify"])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello"])
def test_a_reference_that_is_no_npz(refused, meta_copy, content):
    path = meta_copy / "reference.npz"
    path.write_bytes(content)
    edit(meta_copy, files=files(meta_copy) | {"reference.npz": described(path)})
    refused("reference.npz", commands=["verify"])


def test_a_reference_without_an_array(refused, meta_copy):
    path = meta_copy / "reference.npz"
    arrays = dict(np.load(path))
    del arrays["variance"]
    np.savez(path, **arrays)
    edit(meta_copy, files=files(meta_copy) | {"reference.npz": described(path)})
    refused("reference.npz", "variance", commands=["verify"])


def _places(value: Any, path: tuple = ()):
    """Every key and index of a manifest."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield *path, key
        if isinstance(inner, dict | list):
            yield from _places(inner, (*path, key))


def test_no_change_of_the_manifest_ends_in_a_traceback(meta_copy):
    """Each value replaced by each of a few odd ones, and each key taken out: read, or refused, but never a crash."""
    good = json.loads((meta_copy / "manifest.json").read_text())
    path, crashed = meta_copy / "manifest.json", []
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
                summary(meta_copy, manifest.read(meta_copy))
            except BundleError as error:
                assert str(error).strip()
            except Exception as error:  # the very thing that must not happen: collected, to name all of them at once
                crashed.append(f"{place} = {odd!r}: {type(error).__name__}: {error}")
    assert not crashed, f"{len(crashed)} crashes:\n" + "\n".join(crashed[:400])


@pytest.mark.parametrize("command", ["sample", "verify"])
def test_odd_values_that_only_a_run_would_notice(meta_copy, capsys, tmp_path, monkeypatch, command):
    """Values of the right kind but not of this network, and of the wrong kind: any exit code, but no traceback."""
    monkeypatch.chdir(tmp_path)
    good = json.loads((meta_copy / "manifest.json").read_text())
    denoiser = ("graphs", "denoiser")
    places = [("num_classes",), ("latent_shape",), ("labels",), ("unguided_up_to_one",)]
    places += [(*denoiser, key) for key in ("max_batch", "precision", "backend", "onnx", "engines", "outputs")]
    places += [("graphs", "conditioner", "outputs", 0, "shape"), ("graphs", "conditioner", "max_batch")]
    crashed = []
    for place in places:
        for odd in (None, True, -1, 1.5, 7, 10**30, "x", [], [1, 2, 3], ["a", "b", "c"]):
            table = copy.deepcopy(good)
            inner = table
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = odd
            edit(meta_copy, **table)
            try:
                assert main([command, str(meta_copy), *COMMANDS[command]]) in (0, 1, 2)
            except Exception as error:
                crashed.append(f"{place} = {odd!r}: {type(error).__name__}: {error}")
    capsys.readouterr()
    assert not crashed, f"{len(crashed)} crashes:\n" + "\n".join(crashed)

"""Signed bundles: Ed25519 against vectors that C++ is tested with too, keys, and what is refused."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from dit_export.bundle import signing
from dit_export.cli import main as dit_export
from dit_runtime import BundleError, Pipeline, UsageError
from dit_runtime.bundle import ed25519, manifest, signature
from dit_runtime.cli import main as dit_run
from dit_serve.models import Opening, open_bundle
from tests.tamper import edit

ROOT = Path(__file__).parents[2]
VECTORS = json.loads((ROOT / "runtime/cpp/tests/ed25519.json").read_text())


def unhex(vector: dict, *names: str) -> list[bytes]:
    return [bytes.fromhex(vector[name]) for name in names]


@pytest.fixture
def key(tmp_path) -> Path:
    signing.new_key(tmp_path / "key.pem")
    return tmp_path / "key.pem"


def public(key: Path) -> bytes:
    return signature.read_key(Path(f"{key}.pub"))


@pytest.mark.parametrize("vector", [pytest.param(vector, id=vector["name"]) for vector in VECTORS])
def test_vectors(vector) -> None:
    """RFC 8032's, openssl's at the lengths where SHA-512 pads, and the speccheck paper's: libsodium's column."""
    key, message, sign = unhex(vector, "key", "message", "signature")
    assert ed25519.verify(key, message, sign) == vector["valid"]
    assert not ed25519.verify(key[:-1], message, sign) and not ed25519.verify(key, message, sign + b"\0")
    if "secret" in vector:
        (secret,) = unhex(vector, "secret")
        assert signing.public_key(secret) == key and signing.sign(secret, message) == sign


def test_a_point_has_one_encoding() -> None:
    known = [y for y in range(19) if ed25519.decode(y.to_bytes(32, "little"))]
    assert len(known) > 5
    for y in range(19):
        for sign in (0, 1 << 255):
            assert ed25519.decode((ed25519.P + y | sign).to_bytes(32, "little")) is None
    for y in (1, ed25519.P - 1):  # x = 0
        assert (
            ed25519.decode(y.to_bytes(32, "little")) and ed25519.decode((y | 1 << 255).to_bytes(32, "little")) is None
        )


def test_keys_are_openssls(key, tmp_path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    own = subprocess.run(["openssl", "pkey", "-in", key, "-pubout"], check=True, capture_output=True, text=True).stdout
    assert own == Path(f"{key}.pub").read_text()
    for name in (key, Path(f"{key}.pub")):
        with pytest.raises(UsageError, match="a key is never replaced"):
            signing.new_key(name)
    other = tmp_path / "another.pem"
    other.symlink_to("nowhere")
    with pytest.raises(UsageError, match="a key is never replaced"):
        signing.new_key(other)
    assert not (tmp_path / "nowhere").exists()


def test_what_is_no_key(key, tmp_path) -> None:
    text, file = Path(f"{key}.pub").read_text(), tmp_path / "odd"
    file.write_text(text.replace("\n", "\r\n"))
    assert signature.read_key(file) == public(key)
    private = key.read_text()
    for odd in ("", text[:-30], text.replace("MCow", "MCox"), text.replace("=", ""), private, text * 2, " " + text):
        file.write_text(odd)
        with pytest.raises(UsageError, match="no Ed25519 key; expected -----BEGIN PUBLIC KEY-----"):
            signature.read_key(file)
    with pytest.raises(UsageError, match="expected -----BEGIN PRIVATE KEY-----"):
        signature.read_key(Path(f"{key}.pub"), "PRIVATE")
    with file.open("wb") as sparse:
        sparse.truncate(1 << 30)
    with pytest.raises(UsageError, match="more than 4096 bytes"):
        signature.read_key(file)


def test_a_bundle_that_is_signed(bundle, key) -> None:
    """Openssl makes the same file, by the commands of the documentation."""
    assert signing.sign_bundle(bundle, key) == public(key)
    Pipeline.load(bundle, threads=1, public_key=public(key)).close()
    line = (bundle / signature.NAME).read_bytes()
    (script,) = re.findall(r"```bash\n(hex\(\).*?)```", (ROOT / "docs/target.md").read_text(), re.DOTALL)
    bundle.rename(bundle.with_name("first-bundle")).joinpath(signature.NAME).unlink()
    subprocess.run(["sh", "-c", script], check=True, cwd=bundle.parent)
    bundle = bundle.with_name("first-bundle")
    assert (bundle / signature.NAME).read_bytes() == line
    weights = bundle / "denoiser.onnx.data"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(BundleError, match=r"denoiser.onnx.data does not have the sha256"):
        signing.sign_bundle(bundle, key)


def test_who_must_have_signed(bundle, key, tmp_path) -> None:
    """A refusal comes before any file but the manifest is looked at."""

    def refused(match: str, public_key: bytes = public(key), error: type[UsageError] = BundleError) -> None:
        with pytest.raises(UsageError, match=match) as raised:
            manifest.read(bundle, public_key=public_key)
        assert raised.type is error

    hidden = bundle / "denoiser.onnx"
    signing.sign_bundle(bundle, key)
    content, name = (bundle / signature.NAME).read_bytes(), bundle / signature.NAME
    hidden.rename(tmp_path / "hidden")
    refused("denoiser.onnx is missing")  # of a signature that is right
    for size in (0, 31, 33):
        refused(f"public_key has {size} bytes; expected 32", b"\1" * size, UsageError)
    refused("signed by the key [0-9a-f]{64}, expected 0303", b"\3" * 32)
    for odd in (b"", content[:-1], content[:100], content.upper(), b"\xef\xbb\xbf" + content[:-3], b"\xff" * 202):
        name.write_bytes(odd)
        refused("no signature; expected `ed25519 KEY SIGNATURE`")
    with name.open("wb") as sparse:
        sparse.truncate(1 << 30)
    refused("more than 202 bytes")
    name.rename(tmp_path / "aside")
    refused("not signed: there is no manifest.sig here")
    name.symlink_to(tmp_path / "aside")
    refused("'manifest.sig' is a link")
    name.unlink()
    os.mkfifo(name)
    refused("no file")
    name.unlink()
    name.write_bytes(content)
    edit(bundle, lambda table: table["model"].update(name="another"))
    refused("not the signature of this manifest.json")
    (tmp_path / "hidden").rename(hidden)
    assert manifest.read(bundle).model["name"] == "another"  # without a key nothing is asked


def test_a_manifest_that_is_written_again(bundle, key) -> None:
    """As `dit-run compile` does it, to no avail: the same content keeps its signature."""
    contract = manifest.read(bundle)
    manifest.write(bundle, contract)
    signing.sign_bundle(bundle, key)
    manifest.write(bundle, replace(contract, presets={}))
    with pytest.raises(BundleError, match="after tune or compile, sign the bundle again"):
        manifest.read(bundle, public_key=public(key))
    manifest.write(bundle, contract)
    manifest.read(bundle, public_key=public(key))


def test_the_commands(bundle, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)

    def said(program, *words: str, code: int = 0) -> str:
        assert program(words) == code, capsys.readouterr()
        output = capsys.readouterr()
        return output.err if code else output.out

    assert "signed     no\n" in said(dit_run, "info", "bundle")
    assert said(dit_export, "sign", "--new-key", "key.pem").splitlines()[1] == (
        "public key: key.pem.pub, which --public-key takes"
    )
    asked = ("--public-key", "key.pem.pub")
    assert "not signed" in said(dit_run, "sample", "bundle", "--labels", "1", *asked, code=2)
    key = public(Path("key.pem")).hex()
    assert said(dit_export, "sign", "bundle", "--key", "key.pem") == f"bundle: signed by {key}\n"
    assert f"signed     by the key {key}\n" in said(dit_run, "info", "bundle", *asked)
    assert json.loads(said(dit_run, "info", "bundle", "--json"))["signed_by"] == key
    drawn = ("--labels", "1", "--steps", "2", *asked)
    said(dit_run, "sample", "bundle", "-o", "x.png", *drawn)
    said(dit_run, "sample", "bundle", "--count", "2", "--shards", "shards", *drawn)
    assert json.loads(said(dit_run, "verify", "bundle", "--json", *asked))["passed"]
    opening = Opening(threads=1, places=1, verify=False, public_key=bytes.fromhex(key))
    open_bundle(bundle, opening).batcher.close()
    edit(bundle, lambda table: table["model"].update(name="another"))
    assert "signed     no: bundle/manifest.sig: not the signature of this" in said(dit_run, "info", "bundle")
    for words in (["info", "bundle"], ["verify", "bundle"], ["compile", "bundle"], ["bench", "bundle"]):
        assert "not the signature" in said(dit_run, *words, *asked, code=2)
    assert "not the signature" in said(
        dit_run, "sample", "bundle", "--count", "3", "--shards", "others", *drawn, code=2
    )
    with pytest.raises(BundleError, match="not the signature"):
        open_bundle(bundle, opening)
    assert "no file" in said(dit_run, "info", "bundle", "--public-key", "", code=2)
    for words in ([], ["bundle"], ["--key", "key.pem"], ["bundle", "--new-key", "b.pem"]):
        said(dit_export, "sign", *words, code=2)

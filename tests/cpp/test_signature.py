"""dit-generate and dit-server hold a bundle's signature to Python's verdict, with Python's words."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from dit_export.bundle import signing
from dit_runtime import UsageError
from dit_runtime.bundle import manifest, signature
from tests.tamper import edit


def test_the_same_verdict(tiny, build, dit_generate, tmp_path) -> None:
    folder, key = Path(shutil.copytree(tiny, tmp_path / "bundle")), tmp_path / "key.pem"
    file, public, crossed = folder / signature.NAME, Path(f"{key}.pub"), tmp_path / "crossed.pub"
    signing.new_key(key)
    signing.new_key(tmp_path / "other.pem")
    crossed.write_text(public.read_text().replace("\n", "\r\n"))
    words = ("--labels", "1", "--steps", "2", "-o", tmp_path / "x.npy", "--public-key")

    def refused(match: str, key_file: Path = public) -> None:
        with pytest.raises(UsageError, match=match) as own:
            manifest.read(folder, public_key=signature.read_key(key_file))
        done = dit_generate(folder, *words, key_file)
        assert (done.returncode, done.stderr) == (2, f"dit-generate: error: {own.value}\n")

    refused("not signed: there is no manifest.sig")
    signing.sign_bundle(folder, key)
    for name in (public, crossed):
        assert dit_generate(folder, *words, name).returncode == 0
    refused("signed by the key [0-9a-f]{64}, expected", tmp_path / "other.pem.pub")
    refused("no Ed25519 key", key)
    line = file.read_bytes()
    for odd in (b"", line[:-1], line.upper(), line.replace(b" ", b"\t")):
        file.write_bytes(odd)
        refused("no signature; expected")
    file.write_bytes(line)
    edit(folder, lambda table: table["model"].update(name="another"))
    refused("not the signature of this manifest.json")
    (folder / "denoiser.onnx").unlink()
    refused("not the signature of this manifest.json")
    assert dit_generate(folder, *words, "").returncode == 2
    server = [build / "programs/dit-server", folder, "--port", "0", "--public-key", public]
    done = subprocess.run(server, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "not the signature of this manifest.json" in done.stderr

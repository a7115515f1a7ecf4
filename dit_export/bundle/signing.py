"""Key pairs, and the signature of a bundle. What has the secret key is not in constant time: run it where you trust."""

from __future__ import annotations

import os
import secrets
from hashlib import sha512
from pathlib import Path

from dit_runtime.bundle import ed25519, manifest, signature
from dit_runtime.errors import UsageError
from dit_runtime.files import beside, write_file

SUFFIX = ".pub"  # of the public key's file


def new_key(file: Path) -> bytes:
    """Write a new secret key, for its owner's eyes alone, and its public key beside it; return the public key."""
    public_file = file.with_name(file.name + SUFFIX)
    for path in (file, public_file):
        if os.path.lexists(path):
            raise UsageError(f"{path}: is there already, and a key is never replaced; take another name")
    seed = secrets.token_bytes(ed25519.KEY)
    public = public_key(seed)
    with (
        beside(file) as partial,
        open(partial, "x", encoding="ascii", opener=lambda path, flags: os.open(path, flags, 0o600)) as secret,
    ):
        secret.write(signature.pem(seed, "PRIVATE"))
    write_file(public_file, signature.pem(public, "PUBLIC"))
    return public


def sign_bundle(folder: Path, key_file: Path) -> bytes:
    """Compare the sums of all files, then sign the manifest, which has them; return the public key."""
    seed = signature.read_key(key_file, "PRIVATE")
    content, contract = manifest.read_content(folder), manifest.read(folder)
    manifest.check_files(folder, contract, contract.files)
    key = public_key(seed)
    write_file(folder / signature.NAME, signature.line(key, sign(seed, content)), follow=False)
    manifest.read(folder, public_key=key)  # the manifest that was checked is the one that is signed
    return key


def public_key(seed: bytes) -> bytes:
    scalar, _ = _expand(seed)
    return ed25519.encode(ed25519.multiply(scalar, ed25519.BASE))


def sign(seed: bytes, message: bytes) -> bytes:
    """Return the signature of a message by a secret key, as RFC 8032 has it in 5.1.6."""
    scalar, prefix = _expand(seed)
    nonce = ed25519.hash_number(prefix, message)
    r, key = ed25519.encode(ed25519.multiply(nonce, ed25519.BASE)), public_key(seed)
    s = (nonce + ed25519.hash_number(r, key, message) * scalar) % ed25519.L
    return r + s.to_bytes(ed25519.KEY, "little")


def _expand(seed: bytes) -> tuple[int, bytes]:
    """Return the scalar and the prefix of a secret key."""
    digest = sha512(seed).digest()
    scalar = int.from_bytes(digest[: ed25519.KEY], "little")
    return scalar & (2**254 - 8) | 2**254, digest[ed25519.KEY :]

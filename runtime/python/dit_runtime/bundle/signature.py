"""A bundle's signature: manifest.sig, one line with an Ed25519 key and its signature of the bytes of manifest.json."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path

from dit_runtime.bundle import ed25519
from dit_runtime.errors import BundleError, UsageError
from dit_runtime.files import read_bytes, read_text

NAME = "manifest.sig"
LINE = re.compile(rb"ed25519 ([0-9a-f]{64}) ([0-9a-f]{128})\n")
LENGTH = 202  # of a line
PEM = re.compile(r"-----BEGIN (PUBLIC|PRIVATE) KEY-----([A-Za-z0-9+/]+=?)-----END \1 KEY-----")
PEM_BYTES = 4096  # of a file; a key has about 120
# A key's DER, as RFC 8410 has it, begins with this; the 32 bytes of the key follow.
DER = {
    "PUBLIC": bytes.fromhex("302a300506032b6570032100"),
    "PRIVATE": bytes.fromhex("302e020100300506032b657004220420"),
}


def line(key: bytes, signature: bytes) -> str:
    return f"ed25519 {key.hex()} {signature.hex()}\n"


def require_signed(folder: Path, content: bytes, key: bytes) -> None:
    """Refuse a bundle unless the owner of the public key has signed this content of its manifest."""
    if len(key) != ed25519.KEY:
        raise UsageError(f"public_key has {len(key)} bytes; expected {ed25519.KEY}")
    if (own := signer(folder, content)) != key:
        raise BundleError(f"{folder / NAME}: signed by the key {own.hex()}, expected {key.hex()}")


def describe(folder: Path, content: bytes) -> tuple[str, str]:
    """Return the key that signed, in hexadecimal, and the same in words; without one why there is none."""
    if not os.path.lexists(folder / NAME):
        return "", "no"
    try:
        key = signer(folder, content).hex()
    except BundleError as error:
        return "", f"no: {error}"
    return key, f"by the key {key}"


def signer(folder: Path, content: bytes) -> bytes:
    """Return the key that signed this content of a bundle's manifest; whose key that is, the bundle cannot prove."""
    path = folder / NAME
    if path.is_symlink():
        raise BundleError(f"{folder}: {NAME!r} is a link; refused")
    if not path.exists():
        raise BundleError(f"{folder}: not signed: there is no {NAME} here; expected one as `dit-export sign` writes it")
    try:
        match = LINE.fullmatch(read_bytes(path, LENGTH))
    except UsageError as error:
        raise BundleError(str(error)) from None
    if match is None:
        raise BundleError(f"{path}: no signature; expected `ed25519 KEY SIGNATURE`, as `dit-export sign` writes it")
    key, signature = (bytes.fromhex(digits.decode()) for digits in match.groups())
    if not ed25519.verify(key, content, signature):
        advice = "after tune or compile, sign the bundle again"
        raise BundleError(f"{path}: not the signature of this manifest.json: one of the two was changed; {advice}")
    return key


def read_key(path: Path, kind: str = "PUBLIC") -> bytes:
    """Return the 32 bytes of an Ed25519 key in PEM, as openssl writes it."""
    match = PEM.fullmatch(re.sub(r"[\t-\r]", "", read_text(path, PEM_BYTES)))
    try:
        der = base64.b64decode(match[2], validate=True) if match and match[1] == kind else b""
    except ValueError:
        der = b""
    if len(der) != len(DER[kind]) + ed25519.KEY or not der.startswith(DER[kind]):
        raise UsageError(f"{path}: no Ed25519 key; expected -----BEGIN {kind} KEY-----, as openssl writes it")
    return der[len(DER[kind]) :]


def pem(key: bytes, kind: str) -> str:
    """Return the file of a key."""
    text = base64.b64encode(DER[kind] + key).decode()
    return f"-----BEGIN {kind} KEY-----\n{text}\n-----END {kind} KEY-----\n"

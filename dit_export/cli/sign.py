"""`dit-export sign`: sign a bundle, or make the key to do it with."""

from __future__ import annotations

import argparse
from pathlib import Path

from dit_runtime.console import answer
from dit_runtime.errors import UsageError
from dit_runtime.options import Command, Parser


def add_options(parser: Parser) -> None:
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="folder with a manifest.json")
    group = parser.add_argument_group("key")
    key = group.add_mutually_exclusive_group(required=True)
    key.add_argument("--key", type=Path, metavar="FILE", help="the secret Ed25519 key: PEM, not encrypted")
    key.add_argument(
        "--new-key", type=Path, metavar="FILE", help="write a new secret key, and its public key, FILE.pub"
    )


def run(options: argparse.Namespace) -> int:
    from dit_export.bundle import signing

    if (options.bundle is None) == (options.key is not None):
        raise UsageError("expected BUNDLE --key FILE, or --new-key FILE alone")
    if options.new_key:
        key, public = signing.new_key(options.new_key), f"{options.new_key}{signing.SUFFIX}"
        table = {"key": key.hex(), "secret": str(options.new_key), "public": public}
        text = f"secret key: {options.new_key}\npublic key: {public}, which --public-key takes\nkey: {key.hex()}"
    else:
        key = signing.sign_bundle(options.bundle, options.key)
        table, text = {"key": key.hex(), "bundle": str(options.bundle)}, f"{options.bundle}: signed by {key.hex()}"
    answer(options, table, text, brief=key.hex())
    return 0


COMMAND = Command(
    "sign",
    "sign a bundle, or make a key pair for it",
    add_options,
    run,
    ("sign --new-key key.pem  # once", "sign BUNDLE --key key.pem"),
)

"""`dit-export sign`: sign a bundle, or make the key to do it with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dit_runtime.errors import UsageError


def add(commands: Any) -> None:
    parser = commands.add_parser("sign", help="sign a bundle with an Ed25519 key, or make a key pair")
    parser.add_argument("bundle", type=Path, nargs="?")
    key = parser.add_mutually_exclusive_group(required=True)
    key.add_argument("--key", type=Path, metavar="FILE", help="the secret key: PEM, not encrypted")
    key.add_argument("--new-key", type=Path, metavar="FILE", help="write a new secret key, and FILE.pub")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=run)


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
    print(json.dumps(table) if options.json else text)
    return 0

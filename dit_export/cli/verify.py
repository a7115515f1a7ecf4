"""`dit-export verify`: a bundle against PyTorch, a baseline or another bundle; `regress` is an alias."""

from __future__ import annotations

from typing import Any

from dit_export.verify import command


def add(commands: Any) -> None:
    verify = commands.add_parser("verify", help="a bundle against PyTorch, or within the limits of a baseline, for CI")
    verify.set_defaults(command=command.add_options(verify))
    regress = commands.add_parser("regress", help="verify against reference.npz, without the weights")
    regress.set_defaults(command=command.add_options(regress, weights=False))

"""The check that a server of images can serve a bundle."""

from __future__ import annotations

from pathlib import Path

from dit_runtime.bundle.records import LABELS, Manifest
from dit_runtime.errors import BundleError


def require_servable(folder: Path, contract: Manifest) -> None:
    """Refuse bundles whose requests a prompt cannot state, and those that draw no images."""
    if len(contract.require_end().gives[0].shape) != 4:
        raise BundleError(f"{folder}: this bundle draws videos, and servers serve images")
    beside = contract.ports_beside_prompts if contract.prompts else contract.conditions
    taken = {contract.guidance.port} | ({LABELS} if contract.classes else set())
    if others := [port.name for port in beside if port.name not in taken]:
        raise BundleError(f"{folder}: this bundle takes arrays ({', '.join(others)}), and a prompt does not give them")

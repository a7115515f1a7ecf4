"""Makes dit-export require dit-runtime of its own version: they share facts and the form of manifests."""

from __future__ import annotations

from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class SameVersion(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        metadata["dependencies"] = [f"dit-runtime=={metadata['version']}"]

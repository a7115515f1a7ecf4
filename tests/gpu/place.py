"""The place where a check runs, and why a step may not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit_export.bench.competitors import Job
from dit_runtime import backends
from dit_runtime.bundle import manifest

Row = dict[str, Any]  # of gpu.jsonl


class Skipped(Exception):
    """A step that cannot run here, with the reason."""


@dataclass(frozen=True)
class Place:
    """The folder of the unpacked packs, and the device on which the steps run."""

    work: Path
    dry: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def folder(self, name: str) -> Path:
        if not (self.work / name).is_dir():
            raise Skipped(f"{name} is not in the packs that were unpacked")
        return self.work / name

    def bundle(self, name: str) -> Path:
        folder = self.folder(name)
        step = manifest.read(folder).step
        if reason := backends.refusal(step.backend, step.precision, self.device):
            raise Skipped(reason)
        return folder

    def job(self, batch: int) -> Job:
        if not (self.work / "job.json").is_file():
            raise Skipped("job.json is not in the packs that were unpacked")
        return replace(Job.read(self.work), batch=batch, device=self.device)

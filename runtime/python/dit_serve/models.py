"""The bundles that are served by name, and how one is swapped for another."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dit_runtime import verify
from dit_runtime.bundle import manifest
from dit_runtime.bundle.records import Manifest
from dit_runtime.conditions.labels import class_number
from dit_runtime.errors import BundleError, EngineError, UsageError
from dit_runtime.picture_files import read_mask, read_picture
from dit_runtime.pipeline import Pipeline
from dit_runtime.request import Request
from dit_runtime.sampling.schedule import listed
from dit_runtime.serve import Batcher, Closed, Ticket
from dit_runtime.serve.servable import require_servable
from dit_serve.body import Body, Limits
from dit_serve.faults import Fault, refusal

log = logging.getLogger("dit_serve")


@dataclass(frozen=True)
class Opening:
    """The options with which bundles are opened."""

    threads: int | None = None
    provider: str | None = None
    places: int | None = None  # None: as many samples share a call as the measured times say
    variance: bool = False  # whether more than one may share a call where pictures depend on that
    verify: bool = True
    pins: Collection[str] = ()  # sha256 of the manifests that may be served; empty: of any
    public_key: bytes | None = None  # of who must have signed a bundle; None: nobody


@dataclass
class Served:
    """A bundle that is open."""

    batcher: Batcher
    sha256: str  # of its manifest, which has the sums of all other files
    opened: float = field(default_factory=time.time)

    @property
    def manifest(self) -> Manifest:
        return self.batcher.pipe.manifest


class Model:
    """A name that clients ask for, and the bundle that draws for it now."""

    def __init__(self, name: str, folder: Path, opening: Opening) -> None:
        self.name, self.folder, self._opening = name, folder, opening
        self.swaps: Counter[str] = Counter()  # by result
        self.refusal = ""  # why the last swap failed
        self._swapping = threading.Lock()
        self._old: list[Batcher] = []  # that finish what they have
        self.served = open_bundle(folder, opening)

    @property
    def batcher(self) -> Batcher:
        return self.served.batcher

    @property
    def manifest(self) -> Manifest:
        return self.served.manifest

    @property
    def sizes(self) -> dict[tuple[int, int], str]:
        """Return the bundle's name of each size by its width and height; the first is drawn where none is asked for."""
        shapes = ((size.require_end().gives[0].shape[-2:], size.size) for size in self.manifest.each_size)
        return {(int(width), int(height)): name for (height, width), name in shapes}

    def size(self, body: Body) -> tuple[int, int]:
        """Return the width and height that a body asks for."""
        if body.size in (None, "auto"):
            return next(iter(self.sizes))
        known = {f"{width}x{height}": (width, height) for width, height in self.sizes}
        if body.size not in known:
            raise Fault(400, f"size must be auto or {' or '.join(known)} for the model {self.name}", "size")
        return known[body.size]

    def steps(self, body: Body) -> int:
        """Return the steps that a body asks for, itself or by its preset."""
        preset = self.manifest.presets.get(body.preset or "", {})
        steps = body.num_inference_steps or preset.get("steps") or len(listed(preset.get("spacing")))
        return int(steps or self.manifest.process.sampler.steps)

    def check(self, body: Body, limits: Limits) -> None:
        """Raise Fault(400) where a body asks for more than a request may have."""
        width, height = self.size(body)
        if width * height * body.n > limits.pixels:
            raise Fault(400, f"n images have more than {limits.pixels} pixels in all", "n")
        if self.steps(body) > limits.steps:
            raise Fault(400, f"num_inference_steps must be at most {limits.steps}", "num_inference_steps")

    def swap(self) -> bool:
        """Serve the bundle that its folder holds now, if that is another one; return whether it is served.

        It is opened and verified beside the old one, which goes on drawing. Then requests go to the new one, and the
        old one finishes what it has. Where the new one is refused, the old one stays.
        """
        with self._swapping:
            try:
                if self.batcher.alive and manifest.sha256(self.folder / manifest.NAME) == self.served.sha256:
                    return True
                fresh = open_bundle(self.folder, self._opening, verified=True)
            except (UsageError, EngineError, OSError) as error:
                self.refusal = " ".join(str(error).split())
                self.swaps["refused"] += 1
                log.error("swap refused", extra={"fields": {"model": self.name, "reason": self.refusal}})
                return False
            old, self.served, self.refusal = self.served.batcher, fresh, ""
            self._old.append(old)
            self.swaps["swapped"] += 1
            log.info("swapped", extra={"fields": {"model": self.name, "sha256": fresh.sha256}})
        old.close()  # the next swap need not wait for it
        self._old.remove(old)
        return True

    def close(self) -> None:
        """Stop what is under way, old bundles' too."""
        for batcher in [*self._old, self.batcher]:
            batcher.close(drain=False)

    def submit(self, request: Request, **options: Any) -> Ticket:
        """Put a request in line, in the new bundle's where the old one closes at this moment."""
        while True:
            batcher = self.batcher
            try:
                return batcher.submit(request, **options)
            except Closed:
                if batcher is self.batcher:
                    raise

    def read(self, body: Body) -> Body:
        """Return an edit's body with what its pictures hold; raise a Fault where they cannot be read."""
        contract = self.manifest.at(self.sizes[self.size(body)] or None)
        if contract.start is None:
            raise Fault(501, f"the model {self.name} has no encoder of images, so it edits none")
        start: dict[str, Any] = {"strength": body.strength}
        for name, read in (("image", read_picture), ("mask", read_mask)):
            if name in body.files:
                try:
                    start[name] = read(body.files[name], *contract.picture_size, name)
                except UsageError as error:
                    raise refusal(error, name) from None
        return replace(body, files={}, start=start)

    def requests(self, body: Body) -> list[Request]:
        """Return a request for each image; raise Fault(400) where the bundle does not take what the body has."""
        contract = self.manifest
        fields: dict[str, Any] = {
            "steps": body.num_inference_steps,
            "guidance": body.guidance_scale,
            "solver": body.solver,
            "preset": body.preset,
            "size": self.sizes[self.size(body)] or None,
            **body.start,
        }
        if body.negative_prompt is not None and not contract.prompts:
            raise Fault(400, f"the model {self.name} takes no negative_prompt", "negative_prompt")
        if contract.prompts:
            fields |= {"prompt": body.prompt, "negative_prompt": body.negative_prompt}
        elif contract.classes:
            try:
                fields["labels"] = class_number(body.prompt.strip(), contract.labels, contract.classes)
            except UsageError as error:
                raise refusal(error, "prompt") from None
        return [Request(seed=seed, **fields) for seed in body.seeds]

    def describe(self) -> dict[str, Any]:
        """Return the model as `/v1/models` lists it: OpenAI's fields, then what the bundle takes."""
        contract = self.manifest
        sampler = contract.process.sampler
        return {
            "id": self.name,
            "object": "model",
            "created": int(self.served.opened),
            "owned_by": "dit-export",
            "sizes": [f"{width}x{height}" for width, height in self.sizes],
            "prompt": "words" if contract.prompts else "class" if contract.classes else "none",
            "labels": list(contract.labels),
            "classes": contract.classes,
            "num_inference_steps": sampler.steps,
            "guidance_scale": contract.guidance.default,
            "solver": sampler.solver,
            "presets": [*contract.presets],
            "edits": contract.start is not None,
            "batch_invariant": contract.batch_invariant,
            "batch": self.batcher.places,
            "sha256": self.served.sha256,
        }


def open_bundle(folder: Path, opening: Opening, verified: bool = False) -> Served:
    """Open, verify and measure a bundle; raise UsageError or EngineError where it cannot be served.

    The folder may be a link to the version that is to be served.
    """
    folder = folder.resolve()
    digest = manifest.sha256(folder / manifest.NAME) if (folder / manifest.NAME).is_file() else ""
    if opening.pins and digest not in opening.pins:
        raise BundleError(f"{folder}: its manifest has the sha256 {digest or 'of no file'}, which no --pin names")
    pipe = Pipeline.load(folder, threads=opening.threads, provider=opening.provider, public_key=opening.public_key)
    try:
        require_servable(folder, pipe.manifest)
        if manifest.sha256(folder / manifest.NAME) != digest:
            raise BundleError(f"{folder}: its manifest changed while it was opened; try again")
        if (opening.places or 1) > 1 and not (pipe.manifest.batch_invariant or opening.variance):
            raise UsageError(
                f"{folder}: --batch is {opening.places}, but pictures of this bundle depend on what shares their call; "
                "leave it out, or pass --allow-batch-variance too"
            )
        if opening.verify or verified:
            require_verified(pipe)
        return Served(Batcher(pipe, places=opening.places), digest)
    except BaseException:
        pipe.close()
        raise


def require_verified(pipe: Pipeline) -> None:
    """Replay PyTorch's reference on this device; refuse a bundle that does not draw the same."""
    failed = [figure for figure in verify.verify(pipe) if not figure.passed]
    if failed:
        first = failed[0]
        where = f" ({first.where})" if first.where else ""
        raise BundleError(
            f"{pipe.folder}: verification failed: {first.stage}: {first.metric} is {first.value:.4g}{where}"
        )


def open_models(named: Mapping[str, Path], opening: Opening, say: Callable[[str], object]) -> dict[str, Model]:
    """Open all bundles, or none."""
    models: dict[str, Model] = {}
    try:
        for name, folder in named.items():
            models[name] = Model(name, folder, opening)
            say(f"{name}: {folder}, {models[name].batcher.places} samples share a call")
    except BaseException:
        for model in models.values():
            model.batcher.close(drain=False)
        raise
    return models

"""Requests, and the checks of one that need no engine."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dit_runtime import pictures
from dit_runtime.bundle.records import LABELS, Manifest, Port
from dit_runtime.conditions.condition import Condition, Rows, as_array, fit, null_condition
from dit_runtime.conditions.labels import class_number
from dit_runtime.conditions.text import Tokenizers, Words
from dit_runtime.errors import UsageError
from dit_runtime.sampling.caches import SETTINGS, Cache, make_cache
from dit_runtime.sampling.denoiser import Array
from dit_runtime.sampling.guidance import Groups, Policy, make_policy, plan_guidance
from dit_runtime.sampling.noise import Draw, draw
from dit_runtime.sampling.schedule import Level, listed, make_schedule
from dit_runtime.sampling.solvers import EVALUATIONS, levels, solve
from dit_runtime.sampling.solvers.ddpm import lacks_variance
from dit_runtime.sampling.start import first_step

OUTPUTS = ("images", "latents")
SHORT = reprlib.Repr()  # of a request's fields
SHORT.maxstring = SHORT.maxother = 100


class Checked(NamedTuple):
    """A request's values as a run needs them."""

    samples: int
    condition: Rows  # (samples, …) by port, or token ids in the place of the ports that the prompt stage gives
    negative: Rows | None  # as condition, one row, or one a sample; None where nothing is guided
    weights: NDArray[np.float32]  # (samples,)
    solver: str
    steps: int
    spacing: str | None
    timesteps: Array  # one an evaluation of the network
    groups: tuple[Groups | None, ...]  # of each evaluation; None where the prediction is 0
    policy: Policy | None  # None: the network's own guidance
    cache: Cache | None
    draw: Draw
    latents: NDArray[Any] | None  # the request's own
    levels: tuple[Level, ...]  # one an evaluation
    first: int  # the steps that are left out, where the run starts from a picture
    image: NDArray[np.float32] | None  # (samples or 1, 3, H, W)
    mask: NDArray[np.float32] | None  # (samples or 1, 1, h, w) of the state: 1 where it is drawn anew, else 0


@dataclass(frozen=True, eq=False, repr=False)
class Request:
    """One picture for each label, prompt or row of the condition; the same for the same seed.

    `labels` fills the port "labels" with class names or numbers; `condition` has arrays by port, rows first.
    `negative` is what guidance leads away from, in one row or one for each sample; a port that has a constant of the
    bundle's for that may be left out. `prompt` and `negative_prompt` are words, for bundles with text encoders; token
    ids may stand in `condition` and `negative` instead, by their names in the manifest's `prompts`.
    """

    labels: str | int | Sequence[str | int] = ()
    condition: Condition | None = None
    negative: Condition | None = None
    prompt: Words | None = None
    negative_prompt: Words | None = None  # None: "", where the bundle takes prompts and `negative` has none
    steps: int | None = None  # None: the bundle's
    # One for all, or one a sample; None: the bundle's. Networks without guidance ignore it.
    guidance: float | Sequence[float] | None = None
    # Steps are guided between these fractions of the time's range: t of a noise process, σ of a flow. None: all steps.
    guidance_interval: Sequence[float] | None = None
    guidance_policy: str | None = None  # "NAME", or "NAME KEY=VALUE …"; None: the network's own guidance
    seed: int | Sequence[int] = 0  # one for all, or one a sample
    solver: str | None = None  # None: the bundle's
    eta: float = 0.0
    spacing: str | Sequence[float] | None = None  # a name, or the times themselves: "999, 640, 300"
    cache: str | None = None  # of outputs: taylorseer, or easycache, which decides for all samples of the run at once
    # Settings of the cache; None: those of facts.json.
    cache_interval: int | None = None  # taylorseer computes each step of so many
    max_order: int | None = None  # of taylorseer, 0 to 2
    disable_cache_before_step: int | None = None
    disable_cache_after_step: int | None = None  # below 0: from the end
    cache_threshold: float | None = None  # the greatest error that easycache lets grow
    latents: ArrayLike | None = None  # the state to start from
    # A picture to start from, or for the port that reads one; in the bundle's size: [H, W, 3] for all or one a sample;
    # uint8, or floats in [0, 1].
    image: ArrayLike | None = None
    strength: float | None = None  # the share of the steps that change the image; None: that of facts.json
    mask: ArrayLike | None = None  # [H, W] or one for each sample: white is drawn anew, black stays as in the image
    preset: str | None = None  # of the bundle: values for the fields above that the request leaves at their defaults
    size: str | int | None = None  # one of the bundle's: 512, or "512x768" for height x width; None: the pipeline's
    output: str = "images"  # uint8 [N, H, W, 3], videos [N, F, H, W, 3]; or "latents": the final state, float32

    def __repr__(self) -> str:
        """Return what the request states; of an array its shape and type."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        stated = [
            f"{name}={_shown(value)}"
            for name, value in values.items()
            if isinstance(value, np.ndarray) or value != getattr(Request, name)
        ]
        return f"Request({', '.join(stated)})"

    def check(self, manifest: Manifest, tokenizers: Tokenizers | None = None) -> Checked:
        """Validate everything against the manifest, and return the values that a run needs.

        Words need the tokenizers of an open bundle.
        """
        manifest = manifest.at(self.size)
        if self.preset is not None:
            return self.with_preset(manifest).check(manifest, tokenizers)
        if self.output not in OUTPUTS:
            raise UsageError(f"output {self.output!r} is not known; known: {', '.join(OUTPUTS)}")
        if self.output == "images":
            manifest.require_end()
        condition = self._condition(manifest, tokenizers)
        latents = None if self.latents is None else as_array(self.latents, "latents")
        image, mask = self._pictures(manifest)
        count = len(next(iter(condition.values()))) if condition else self._count(latents, image, mask)
        for name, own in (("image", image), ("mask", mask)):
            if own is not None and len(own) not in (1, count):
                raise UsageError(f"{name} has {len(own)} pictures; expected one, or one for each of {count} samples")
        weights = self._weights(manifest, count)
        if port := manifest.guidance.port:
            if port not in condition:
                condition[port] = weights
            elif self.guidance is not None:
                raise UsageError(f"got both guidance and a condition with {port}: pass one of them")
            if self.negative or self.negative_prompt is not None:
                raise UsageError(f"got a negative, but this bundle takes its guidance as {port}, and no negative")
        guided = is_guided(manifest, weights)
        _require_mixing(manifest, guidance_interval=self.guidance_interval, guidance_policy=self.guidance_policy)
        negative = None
        if guided or self.negative or self.negative_prompt is not None:
            negative = self._negative(manifest, tokenizers)
        if negative and (rows := len(next(iter(negative.values())))) not in (1, count):
            raise UsageError(f"negative has {rows} rows; expected one, or one for each of {count} samples")
        process, solver = manifest.process, self.solver or manifest.process.sampler.solver
        spacing = _spacing_words(self.spacing)
        steps = (len(listed(spacing)) or process.sampler.steps) if self.steps is None else self.steps
        make_schedule(process, solver, steps, spacing)
        first = 0 if image is None or manifest.picture else first_step(steps, self.strength)
        known = tuple(levels(process, solver, steps, spacing, first))
        timesteps = np.array([level.time for level in known])
        if solver == "ddpm" and process.sampler.variance.startswith("learned") and not manifest.learned_variance:
            raise lacks_variance(process.sampler.variance)
        stream = draw(self.seed, count)
        shape = (count, *manifest.state.shape)
        if latents is not None and (latents.shape != shape or not np.isfinite(latents).all()):
            raise UsageError(f"latents have shape {latents.shape}; expected {shape}, all finite")
        solve(process, solver, steps, np.empty(0), stream, eta=self.eta, spacing=spacing)
        evaluations, words = EVALUATIONS[solver], self.guidance_policy
        groups = plan_guidance(process, timesteps.tolist(), evaluations, guided, self.guidance_interval, words)
        settings = {key: value for key in SETTINGS if (value := getattr(self, key)) is not None}
        cache = make_cache(self.cache, settings, len(timesteps), evaluations)
        away = negative if {Groups.BOTH, Groups.APART}.intersection(groups) else None
        return Checked(
            count,
            condition,
            away,
            weights,
            solver,
            steps,
            spacing,
            timesteps,
            groups,
            make_policy(words),
            cache,
            stream,
            latents,
            known,
            first,
            image,
            mask,
        )

    def with_preset(self, manifest: Manifest) -> Request:
        """Return the request with the values of its preset; a field that it states itself stays.

        With it go the preset's fields that mean nothing beside it: settings of another cache, times of other steps.
        """
        values = dict({} if self.preset is None else manifest.preset(self.preset))
        if self._states("cache"):
            values = {name: value for name, value in values.items() if name not in SETTINGS}
        if self._states("steps") and listed(values.get("spacing")):
            del values["spacing"]
        if self._states("spacing") and listed(_spacing_words(self.spacing)):
            values.pop("steps", None)
        values = {name: value for name, value in values.items() if not self._states(name)}
        return replace(self, preset=None, **values)

    def _states(self, name: str) -> bool:
        value, default = getattr(self, name), getattr(Request, name)
        return value is not None if default is None else value != default

    def _condition(self, manifest: Manifest, tokenizers: Tokenizers | None) -> Rows:
        """Return the rows of all condition ports, but for the weight of guidance, which may be left out."""
        if not manifest.prompts and (self.prompt is not None or self.negative_prompt is not None):
            raise _takes_no_prompts(manifest)
        labels = [self.labels] if isinstance(self.labels, str | int | np.integer) else list(self.labels)
        condition = dict(self.condition or {})
        if labels and LABELS in condition:
            raise UsageError("got both labels and a condition with labels: pass one of them")
        if labels and not manifest.classes:
            names = ", ".join(port.name for port in manifest.conditions) or "no condition"
            raise UsageError(f"this bundle takes {names}, and no labels")
        if labels:
            condition[LABELS] = np.array([class_number(label, manifest.labels, manifest.classes) for label in labels])
        elif manifest.classes and LABELS not in condition:
            raise UsageError("no labels; pass at least one class name or number")
        if manifest.prompts and self.prompt is None and not _has_prompt(manifest, condition):
            raise UsageError("no prompt; pass at least one")
        condition, ports = _with_words(manifest, condition, self.prompt, tokenizers, negative=False)
        left_out = {manifest.guidance.port} - condition.keys()
        picture = manifest.picture.name if manifest.picture else ""
        if picture and self.image is not None:
            if picture in condition:
                raise UsageError(f"got both an image and a condition with {picture}: pass one of them")
            left_out.add(picture)
        elif picture and manifest.start is not None and picture not in condition:
            raise UsageError(f"no image for {picture}; pass one (dit-run: --image), or a condition with {picture}")
        return fit(condition, [port for port in ports if port.name not in left_out])

    def _negative(self, manifest: Manifest, tokenizers: Tokenizers | None) -> Rows:
        negative, words = dict(self.negative or {}), self.negative_prompt
        if words is None and manifest.prompts and not _has_prompt(manifest, negative):
            words = ""
        negative, ports = _with_words(manifest, negative, words, tokenizers, negative=True)
        return null_condition(ports, manifest.null, negative)

    def _pictures(self, manifest: Manifest) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
        """Return the image and the mask as the encoder and the state take them."""
        if self.image is None:
            for name in ("strength", "mask"):
                if getattr(self, name) is not None:
                    raise UsageError(f"got {name} without an image to start from")
            return None, None
        if manifest.picture is not None:
            for name in ("strength", "mask"):
                if getattr(self, name) is not None:
                    raise UsageError(
                        f"got {name}, but this bundle takes the image as {manifest.picture.name}: leave it out"
                    )
        elif self.latents is not None:
            raise UsageError("got both an image and latents to start from: pass one of them")
        height, width = manifest.picture_size
        image = pictures.as_pictures(self.image, height, width)
        return image, None if self.mask is None else pictures.as_mask(self.mask, height, width, manifest.state.shape)

    def _count(self, latents: NDArray[Any] | None, *pictures: NDArray[Any] | None) -> int:
        """Return the number of samples where no condition has rows; one picture is for all."""
        if latents is not None and latents.ndim:
            return max(1, len(latents))
        counts = [len(picture) for picture in pictures if picture is not None]
        return max(1, *counts, len(self.seed) if isinstance(self.seed, Sequence) else 1)

    def _weights(self, manifest: Manifest, count: int) -> NDArray[np.float32]:
        guidance = manifest.guidance.default if self.guidance is None else self.guidance
        try:
            with np.errstate(over="ignore"):  # too big for float32 is inf, and refused as that
                weights = np.asarray(guidance, np.float32)
        except (TypeError, ValueError, OverflowError):
            raise UsageError(f"guidance is {guidance!r}; expected one number, or one a sample") from None
        if weights.ndim > 1 or (weights.ndim == 1 and len(weights) != count):
            raise UsageError(f"guidance has shape {weights.shape}; expected one number or {count}, one a sample")
        if not np.isfinite(weights).all():
            raise UsageError(f"guidance is {guidance}; expected finite numbers")
        if manifest.guidance.unguided_up_to_one and not manifest.guidance.port:
            weights = np.maximum(weights, 1)  # as it would be alone: a sample does not depend on its batch
        return np.broadcast_to(weights, (count,)).copy()


def _spacing_words(spacing: str | Sequence[float] | None) -> str | None:
    """Return a spacing as the manifest's words; a list is the text of its numbers."""
    if spacing is None or isinstance(spacing, str):
        return spacing
    try:
        times = np.asarray(spacing, np.float64).tolist()
        return ", ".join(map(repr, times)) or "[]"
    except (TypeError, ValueError):
        raise UsageError(f"spacing is {spacing!r}; expected a name, or falling times") from None


def _takes_no_prompts(manifest: Manifest) -> UsageError:
    names = ", ".join(port.name for port in manifest.conditions) or "no condition"
    way = "pass labels (dit-run: --labels)" if manifest.classes else "pass arrays (dit-run: --condition)"
    return UsageError(f"this bundle takes {names}, and no prompts, for it has no text encoders; {way}")


def _has_prompt(manifest: Manifest, condition: Condition) -> bool:
    """Return whether arrays stand for a prompt: its ids, or what the prompt stage would give."""
    assert manifest.prompt is not None
    names = {spec.name for spec in (*manifest.prompt.reads, *manifest.prompt.gives)}
    return bool(names & condition.keys())


def _with_words(
    manifest: Manifest,
    condition: dict[str, Any],
    words: Words | None,
    tokenizers: Tokenizers | None,
    negative: bool,
) -> tuple[dict[str, Any], tuple[Port, ...]]:
    """Return the condition with the ids of the words, and the ports that it must fill."""
    what = "negative prompt" if negative else "prompt"
    if words is not None:
        if _has_prompt(manifest, condition):
            raise UsageError(f"got both a {what} and arrays in its place: pass one of them")
        if tokenizers is None:
            raise UsageError(f"a {what} needs an open bundle's tokenizers; pass token ids")
        condition = condition | tokenizers(words, negative)
    ids = manifest.prompt_ports
    if any(port.name in condition for port in ids):
        return condition, (*ids, *manifest.ports_beside_prompts)
    return condition, manifest.conditions


def is_guided(manifest: Manifest, weights: NDArray[np.float32]) -> bool:
    """Return whether the negative's rows are needed: not where they cannot change the result."""
    return manifest.mixes_guidance and bool((weights != 1).any())


def _require_mixing(manifest: Manifest, **fields: Any) -> None:
    """Refuse policies where the step stage has no two predictions to mix."""
    for name, value in fields.items():
        if value is not None and not manifest.mixes_guidance:
            port = manifest.guidance.port
            why = f"takes its guidance as {port}" if port else "has no guidance"
            raise UsageError(f"{name} is {value!r}, but this bundle {why}; leave it out")


def _shown(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"<{value.dtype} {[*value.shape]}>"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {_shown(inner)}" for name, inner in value.items()) + "}"
    text: str = SHORT.repr(value)
    return text

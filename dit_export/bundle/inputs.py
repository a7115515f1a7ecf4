"""The inputs of a build: read from a user's files, and refused before any work where they contradict each other."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from dit_export.checkpoints import Loaded
from dit_export.precision import prompts
from dit_export.precision.calibrate import Calibration
from dit_export.precision.captions import embed
from dit_export.precision.prompts import Prompts
from dit_export.recipe import PRECISIONS, QUANTIZED_ONLY, Recipe, latent_size
from dit_export.verify import features
from dit_runtime import backends
from dit_runtime.bundle.records import size_name
from dit_runtime.errors import UsageError
from dit_runtime.progress import Progress


class Inputs(NamedTuple):
    """The calibration or the prompts that int8 and fp8 take their ranges from."""

    calibration: Calibration | None = None
    prompts: Prompts | None = None


NO_INPUTS = Inputs()


def require_consistent(recipe: Recipe) -> None:
    if recipe.precision not in PRECISIONS:
        raise UsageError(f"precision {recipe.precision!r} is not known; known: {', '.join(PRECISIONS)}")
    if recipe.max_batch < 1:
        raise UsageError(f"max-batch {recipe.max_batch}; expected at least 1")
    if recipe.encoder and recipe.latents_only:
        raise UsageError("got both --encoder and --latents-only, which builds no part of the VAE: pass one of them")
    if recipe.tile is not None and recipe.latents_only:
        raise UsageError("got both --tile and --latents-only, which builds no part of the VAE: pass one of them")
    if recipe.caption_tokens is not None and recipe.caption_tokens < 1:
        raise UsageError(f"caption-tokens {recipe.caption_tokens}; expected at least 1")
    for size in recipe.sizes:
        if size is not None:
            latent_size(size)
    if len({size_name(str(size)) for size in recipe.sizes}) < len(recipe.sizes) or not recipe.sizes:
        raise UsageError(f"resolution {recipe.resolution}; expected one or more, each once")
    for name in () if recipe.precision in backends.QUANTIZED else QUANTIZED_ONLY:
        if value := getattr(recipe, name):
            option = name.replace("_", "-")
            raise UsageError(f"{option} {value} is for int8 and fp8; this build is {recipe.precision}")
    if recipe.calibration and recipe.conditions:
        both = f"a calibration ({recipe.calibration}) and conditions to calibrate with ({recipe.conditions})"
        raise UsageError(f"got both {both}: pass one of them")


def read_inputs(recipe: Recipe, loaded: Loaded) -> Inputs:
    """Refuse a recipe that the loaded parts contradict; read a user's calibration or conditions."""
    _require_one_negative(loaded)
    _require_judge(recipe, loaded)
    _require_pictures(recipe, loaded)
    calibration = Calibration.load(Path(recipe.calibration).expanduser()) if recipe.calibration else None
    own = prompts.read(Path(recipe.conditions).expanduser(), loaded.network) if recipe.conditions else None
    return Inputs(calibration, own)


def with_prompts(inputs: Inputs, recipe: Recipe, loaded: Loaded, progress: Progress) -> Inputs:
    """Take captions of ours, or the recorded prompts, where int8 or fp8 has nothing of a user's to calibrate with."""
    if inputs != NO_INPUTS or recipe.precision not in backends.QUANTIZED:
        return inputs
    if loaded.text is not None:
        with progress.stage("calibration: captions of ours through the text encoders"):
            return Inputs(prompts=embed(loaded.network, loaded.text))
    if recorded := loaded.examples.get("conditions"):
        away = loaded.examples.get("negative", {})
        return Inputs(prompts=prompts.make_prompts(loaded.network, recorded, away, "the recorded runs"))
    return inputs


def _require_one_negative(loaded: Loaded) -> None:
    """Refuse constants for ports that the text encoders fill: a negative prompt stands in their place."""
    both = [name for name in loaded.network.null if loaded.text is not None and name in loaded.text.gives]
    if both:
        raise UsageError(f"null has a constant for {both[0]}, which the text encoders give: leave it out of null")


def _require_judge(recipe: Recipe, loaded: Loaded) -> None:
    """Refuse a judge that does not open, or has nothing to look at."""
    if recipe.judge is None:
        return
    if loaded.vae is None:
        raise UsageError(f"judge {recipe.judge} looks at pictures, and there is no decoder")
    path = Path(recipe.judge).expanduser()
    judge, real = features.OnnxJudge(path), path.with_suffix(".npz")
    if real.exists():
        features.read_real(real, judge)


def _require_pictures(recipe: Recipe, loaded: Loaded) -> None:
    """Refuse an encoder where no picture becomes the state."""
    if recipe.encoder and (loaded.vae is None or len(loaded.network.state.shape) != 3):
        state = f"a state of shape {[*loaded.network.state.shape]}"
        why = state if loaded.vae is not None else "no VAE"
        raise UsageError(f"encoder: this network has {why}, and an encoder makes [channels, height, width] of pictures")

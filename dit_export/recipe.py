"""Describe what to build: a Recipe is a TOML file in engines/ or the flags of `build`."""

from __future__ import annotations

import json
import shlex
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dit_runtime import backends
from dit_runtime.backends import Tuning
from dit_runtime.errors import UsageError, nearest
from dit_runtime.facts import FACTS

PRECISIONS = tuple(FACTS["tolerances"])
QUANTIZED_ONLY = ("keep_float", "calibration", "conditions", "strict")  # fields of a recipe
PIXELS = 8  # image pixels along a cell of the latents, where neither a network nor a VAE states another number


def latent_size(resolution: int | str, pixels: int = PIXELS) -> tuple[int, int]:
    """Return height and width of the latents for images of 256 or "512x256", `pixels` along a cell."""
    numbers = str(resolution).split("x")
    if len(numbers) > 2 or not all(n.isdecimal() and int(n) and int(n) % pixels == 0 for n in numbers):
        raise UsageError(
            f"resolution {resolution}; expected a multiple of {pixels}, such as 256 or 512, "
            "or two as height x width: 512x256"
        )
    return int(numbers[0]) // pixels, int(numbers[-1]) // pixels


def resolution_name(size: tuple[int, int], pixels: int = PIXELS) -> int | str:
    """Return a latent size as people write the image's: 256, or "512x256" for height x width."""
    height, width = (pixels * side for side in size)
    return height if height == width else f"{height}x{width}"


@dataclass(frozen=True)
class Recipe(Tuning):
    """Everything a build needs to know; a TOML file in engines/ and the flags of `build` both give one."""

    model: str | None = None
    conditioning: str | None = None
    # A side in pixels, or "512x256" for height x width; a list: the sizes of one bundle, its default first.
    resolution: Any = None
    frames: int | None = None  # of a video
    precision: str = "fp32"
    backend: str = "auto"
    checkpoint: str | None = None
    pipeline: str | None = None  # a folder that diffusers saved, whatever the class of its transformer
    vae: str | None = None
    labels: str | None = None
    heads: int | None = None
    caption_tokens: int | None = None  # of a prompt embedding; None: as many as the checkpoint's pipeline makes
    embedded_guidance: float | None = None  # a constant for the network's own; requests guide by two predictions
    prediction: str | None = None  # where neither a scheduler nor a key tells; the weights alone do not
    calibration: str | None = None
    conditions: str | None = None  # to calibrate with: an .npz with arrays by port name, and `negative.NAME`
    keep_float: list[str] | None = None  # in int8: "blocks.3.mlp.fc2", "blocks.0", or "fc2" in every block
    strict: bool = False  # keep no other layer of an int8 or fp8 denoiser in float, whatever the gates say
    judge: str | None = None  # an ONNX network that looks at pictures; FILE.npz beside it: mu and sigma of real ones
    presets: str | None = None  # a JSON file, as `dit-export tune --presets` writes it
    synthetic: int | None = None
    latents_only: bool = False
    encoder: bool = False  # for requests that bring pictures
    tile: int | None = None  # pixels along a tile of the VAE, where pictures are larger
    without_text_encoders: bool = False  # conditions are prompt embeddings
    max_batch: int = 8
    output: str | None = None

    @classmethod
    def from_toml(cls, path: Path) -> Recipe:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: not a TOML recipe: {error}") from None
        known = [field.name for field in fields(cls)]
        kinds = {field.name: str(field.type).removesuffix(" | None") for field in fields(cls)}
        kinds = {name: "list" if kind in ("list[str]", "tuple[str, ...]") else kind for name, kind in kinds.items()}
        kinds |= {"resolution": "int | str | list", "embedded_guidance": "int | float"}
        names = [key.replace("-", "_") for key in table]
        for key, name in zip(table, names, strict=True):
            if name not in known:
                raise UsageError(f"{path}: unknown key {key!r}{nearest(name, known)}; known: {', '.join(known)}")
            if type(table[key]).__name__ not in kinds[name].split(" | "):
                raise UsageError(f"{path}: {key} is {table[key]!r}, expected {kinds[name]}")
            if kinds[name] == "list" and not all(isinstance(entry, str) for entry in table[key]):
                raise UsageError(f"{path}: {key} is {table[key]!r}, expected strings")
        return cls(**dict(zip(names, table.values(), strict=True)))

    @property
    def sizes(self) -> list[int | str | None]:
        """Return the resolution of each size of the bundle."""
        return list(self.resolution) if isinstance(self.resolution, list | tuple) else [self.resolution]

    @property
    def tuning(self) -> Tuning:
        return Tuning(**{field.name: getattr(self, field.name) for field in fields(Tuning)})

    def to_toml(self) -> str:
        """Return the values that differ from the defaults, as TOML that `from_toml` reads."""
        values, default = asdict(self), asdict(Recipe())
        return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in values.items() if v != default[k])

    @property
    def names_weights(self) -> bool:
        """Return whether the recipe alone builds the bundle, without a network of the caller's."""
        return bool(self.model or self.checkpoint or self.pipeline)

    def command(self, **changes: Any) -> str:
        """Return the command that builds this recipe with these changes."""
        recipe, default = replace(self, **changes), Recipe()
        words = ["dit-export", "build", *([recipe.model] if recipe.model else [])]
        for name, value in vars(recipe).items():
            if name == "model" or value == getattr(default, name):
                continue
            words.append("-o" if name == "output" else f"--{name.replace('_', '-')}")
            if name == "resolution" and isinstance(value, list | tuple):
                words.append(",".join(map(str, value)))
            elif value is not True:
                words += map(str, value) if isinstance(value, list | tuple) else [str(value)]
        return shlex.join(words)


def wider(backend: str, *failed: str) -> list[dict[str, Any]]:
    """Return the changes of a recipe to each float precision of a backend, but those that `failed`."""
    names = [name for name in backends.backend(backend).PRECISIONS if name not in (*backends.QUANTIZED, *failed)]
    return [dict.fromkeys(QUANTIZED_ONLY) | {"strict": False, "precision": name} for name in names]

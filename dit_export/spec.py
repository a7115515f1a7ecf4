"""What is built: ModelSpec (the network), Recipe (what to make of it), and the one table of sizes."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from dit_runtime.errors import UsageError, nearest
from dit_runtime.manifest import TensorSpec

CONDITIONINGS = ("adaln-zero",)
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8")


@dataclass(frozen=True)
class ModelSpec:
    """A DiT's shape and the dialect its weights speak; code branches on these fields, never on a name."""

    depth: int
    hidden: int
    heads: int
    patch: int
    latent_size: int = 32
    channels: int = 4
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    learned_variance: bool = True
    conditioning: str = "adaln-zero"
    # Dialect (Meta's values are the defaults; the readers set the others).
    frequency_shift: int = 0  # frequency i is 10000^(-i / (half - shift))
    norm2_eps: float = 1e-6  # of the LayerNorm before the MLP; every other one has 1e-6
    embedders: int = 1  # 1: shared by all blocks; depth: one a block (models trained with diffusers)
    guided_channels: int = 3  # leading channels that guidance moves
    unguided_up_to_one: bool = False  # guidance <= 1 (not only == 1) runs without the null rows

    def __post_init__(self) -> None:
        if self.heads < 1 or self.hidden % self.heads:
            raise UsageError(f"hidden size {self.hidden} does not divide into {self.heads} heads")
        if self.hidden % 4:
            raise UsageError(f"hidden size {self.hidden} is not a multiple of 4, as the position table needs")
        if self.latent_size % self.patch:
            raise UsageError(f"latents of side {self.latent_size} do not divide into patches of {self.patch}")
        if self.conditioning not in CONDITIONINGS:
            raise UsageError(f"conditioning {self.conditioning!r} is not known; known: {', '.join(CONDITIONINGS)}")
        if self.embedders not in (1, self.depth):
            raise UsageError(f"{self.embedders} embedders for {self.depth} blocks: expected 1 or one a block")

    @property
    def tokens(self) -> int:
        return (self.latent_size // self.patch) ** 2

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learned_variance else 1)

    @property
    def resolution(self) -> int:
        return 8 * self.latent_size

    @property
    def null_label(self) -> int:
        return self.num_classes

    @property
    def num_vectors(self) -> int:
        """K: conditioning vectors a step; six a block (shift, scale, gate twice), two for the final layer."""
        return 6 * self.depth + 2

    @property
    def gains(self) -> int:
        """How many of the K vectors are `1 + scale`."""
        return 2 * self.depth + 1


class Signature(NamedTuple):
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def signatures(spec: ModelSpec) -> dict[str, Signature]:
    """Inputs and outputs of the three graphs, once: ONNX axes, profiles and runtime checks all come from here."""
    size = (spec.channels, spec.latent_size, spec.latent_size)
    vectors = (spec.num_vectors, spec.hidden)
    latents = TensorSpec("latents", "float32", ("batch", *size))
    prediction = TensorSpec("prediction", "float32", ("batch", *size))
    variance = TensorSpec("variance", "float32", ("batch", *size))
    return {
        "conditioner": Signature(
            (TensorSpec("timesteps", "float32", ("pairs",)), TensorSpec("labels", "int64", ("pairs",))),
            (TensorSpec("conditioning", "float32", ("pairs", *vectors)),),
        ),
        "denoiser": Signature(
            (
                latents,
                TensorSpec("conditioning", "float32", ("groups", "batch", *vectors)),
                TensorSpec("guidance", "float32", ("batch",)),
            ),
            (prediction, variance) if spec.learned_variance else (prediction,),
        ),
        "decoder": Signature(
            (latents,), (TensorSpec("images", "float32", ("batch", 3, spec.resolution, spec.resolution)),)
        ),
    }


SIZES = {  # depth, hidden, heads
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
MODELS = {
    f"{size}/{patch}": ModelSpec(depth, hidden, heads, patch)
    for size, (depth, hidden, heads) in SIZES.items()
    for patch in (2, 4, 8)
}


def model(name: str) -> ModelSpec:
    """The table's entry, or an error that names the nearest."""
    if name not in MODELS:
        raise UsageError(f"model {name!r} is not known{nearest(name, MODELS)}; known: {', '.join(MODELS)}")
    return MODELS[name]


def table_name(spec: ModelSpec) -> str:
    """The table's name for a network of this shape ("XL/2"), or its depth, width and patch."""
    shape = (spec.depth, spec.hidden, spec.heads)
    size = next((name for name, row in SIZES.items() if row == shape), f"{spec.depth}x{spec.hidden}")
    return f"{size}/{spec.patch}"


@dataclass(frozen=True)
class Recipe:
    """Everything a build needs to know; a TOML file in engines/ and the flags of `build` both give one."""

    model: str | None = None
    resolution: int | None = None
    precision: str = "fp32"
    backend: str = "auto"
    checkpoint: str | None = None
    vae: str | None = None
    labels: str | None = None
    heads: int | None = None
    prediction: str | None = None  # where neither a scheduler nor a key tells; the weights alone do not
    calibration: str | None = None
    keep_float: list[str] | None = None  # of an int8 denoiser: "block 3 fc2", "block 0", or "fc2" in every block
    synthetic: int | None = None
    latents_only: bool = False
    max_batch: int = 8
    output: str | None = None

    @classmethod
    def from_toml(cls, path: Path) -> Recipe:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: not a TOML recipe: {error}") from None
        known = [field.name for field in fields(cls)]
        kinds = {field.name: str(field.type).removesuffix(" | None").removesuffix("[str]") for field in fields(cls)}
        names = [key.replace("-", "_") for key in table]
        for key, name in zip(table, names, strict=True):
            if name not in known:
                raise UsageError(f"{path}: unknown key {key!r}{nearest(name, known)}; known: {', '.join(known)}")
            if type(table[key]).__name__ != kinds[name]:
                raise UsageError(f"{path}: {key} is {table[key]!r}, expected {kinds[name]}")
            if kinds[name] == "list" and not all(isinstance(entry, str) for entry in table[key]):
                raise UsageError(f"{path}: {key} is {table[key]!r}, expected strings")
        return cls(**dict(zip(names, table.values(), strict=True)))

    def to_toml(self) -> str:
        """What differs from the defaults, as `from_toml` reads it."""
        given, default = asdict(self), asdict(Recipe())
        return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in given.items() if v != default[k])

"""What is built: ModelSpec (the network), Recipe (what to make of it), and the one table of sizes."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from dit_runtime.backends import Tuning
from dit_runtime.bundle.manifest import TensorSpec
from dit_runtime.captions import EXAMPLES
from dit_runtime.errors import UsageError, nearest


class Conditioning(NamedTuple):
    """By which ways the timestep and the label, or the caption, reach a network's tokens."""

    modulation: int = 0  # adaLN's vectors a block: shift and scale twice, 6 with gates; 0: norms with their own gains
    appended: bool = False  # as two tokens beside the patches
    crossed: bool = False  # as what a cross-attention in each block reads
    shared: bool = False  # one projection modulates all blocks, each with a table of its own added
    captioned: bool = False  # the cross-attention reads a caption's embeddings, and there are no classes


CONDITIONINGS = {
    "adaln-zero": Conditioning(modulation=6),
    "adaln": Conditioning(modulation=4),
    "in-context": Conditioning(appended=True),
    "cross-attention": Conditioning(crossed=True),
    "adaln-single": Conditioning(modulation=6, crossed=True, shared=True, captioned=True),
}
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8")


@dataclass(frozen=True)
class ModelSpec:
    """A DiT's shape and the dialect its weights speak; code branches on these fields, never on a name."""

    depth: int
    hidden: int
    heads: int
    patch: int
    latent_size: int = 32  # a side of the latents; their height where the width is another
    latent_width: int = 0  # 0: square
    channels: int = 4
    num_classes: int = 1000  # of a captioned network: the example captions that it is verified with
    caption_tokens: int = 120
    caption_channels: int = 4096
    mlp_ratio: float = 4.0
    learned_variance: bool = True
    conditioning: str = "adaln-zero"
    # Dialect (Meta's values are the defaults; the readers set the others).
    frequency_shift: int = 0  # frequency i is 10000^(-i / (half - shift))
    norm2_eps: float = 1e-6  # of the LayerNorm before the MLP; every other one has 1e-6
    position_span: float = 0.0  # what positions run over along a side, whatever its length; 0: its number of patches
    embedders: int = 1  # 1: shared by all blocks; depth: one a block (models trained with diffusers)
    guided_channels: int = 3  # leading channels that guidance moves
    unguided_up_to_one: bool = False  # guidance <= 1 (not only == 1) runs without the null rows

    def __post_init__(self) -> None:
        if self.heads < 1 or self.hidden % self.heads:
            raise UsageError(f"hidden size {self.hidden} does not divide into {self.heads} heads")
        if self.hidden % 4:
            raise UsageError(f"hidden size {self.hidden} is not a multiple of 4, as the position table needs")
        for side in self.latent_shape[1:]:
            if side % self.patch:
                raise UsageError(f"latents of side {side} do not divide into patches of {self.patch}")
        if self.conditioning not in CONDITIONINGS:
            near = nearest(self.conditioning, CONDITIONINGS)
            raise UsageError(
                f"conditioning {self.conditioning!r} is not known{near}; known: {', '.join(CONDITIONINGS)}"
            )
        if self.embedders not in (1, self.depth):
            raise UsageError(f"{self.embedders} embedders for {self.depth} blocks: expected 1 or one a block")

    @property
    def by(self) -> Conditioning:
        return CONDITIONINGS[self.conditioning]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.latent_size, self.latent_width or self.latent_size

    @property
    def grid(self) -> tuple[int, int]:
        """Patches: rows and columns."""
        _, height, width = self.latent_shape
        return height // self.patch, width // self.patch

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def out_channels(self) -> int:
        return self.channels * (2 if self.learned_variance else 1)

    @property
    def resolution(self) -> int | str:
        """As people write it: 256, or 512x256 for height x width."""
        _, height, width = self.latent_shape
        return 8 * height if height == width else f"{8 * height}x{8 * width}"

    @property
    def null_label(self) -> int:
        return self.num_classes

    @property
    def modulations(self) -> int:
        """adaLN's vectors: of each block, and two for the final layer."""
        return self.by.modulation * self.depth + 2 if self.by.modulation else 0

    @property
    def num_vectors(self) -> int:
        """K: conditioning vectors a step: adaLN's; the two tokens; the keys and values of two tokens for each block."""
        keys_and_values = 4 * self.depth if self.by.crossed and not self.by.captioned else 0
        return self.modulations + 2 * self.by.appended + keys_and_values

    @property
    def context_vectors(self) -> int:
        """M: what depends on the caption alone and is computed once an image: its keys and values for each block."""
        return 2 * self.depth * self.caption_tokens if self.by.captioned else 0

    @property
    def gains(self) -> int:
        """How many of the K vectors are `1 + scale`."""
        return 2 * self.depth + 1 if self.by.modulation else 0


class Signature(NamedTuple):
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def signatures(spec: ModelSpec) -> dict[str, Signature]:
    """Inputs and outputs of the graphs, once: ONNX axes, profiles and runtime checks all come from here."""
    vectors = (spec.num_vectors, spec.hidden)
    tokens, of_context = (spec.caption_tokens,), (spec.context_vectors, spec.hidden)

    def floats(name: str, *shape: int | str) -> TensorSpec:
        return TensorSpec(name, "float32", shape)

    def states(*names: str) -> tuple[TensorSpec, ...]:
        return tuple(floats(name, "batch", *spec.latent_shape) for name in names)

    _, height, width = spec.latent_shape
    (latents,) = states("latents")
    outputs = ("prediction", "variance") if spec.learned_variance else ("prediction",)
    pairs = [floats("timesteps", "pairs")]
    given = [floats("conditioning", "groups", "batch", *vectors)]
    found = {}
    if spec.by.captioned:
        captions = (floats("captions", "captions", *tokens, spec.caption_channels), floats("mask", "captions", *tokens))
        context = (floats("context", "captions", *of_context), floats("context_mask", "captions", *tokens))
        found["context"] = Signature(captions, context)
        given += [replace(tensor, shape=("groups", "batch", *tensor.shape[1:])) for tensor in context]
    else:
        pairs.append(TensorSpec("labels", "int64", ("pairs",)))
    return {
        "conditioner": Signature(tuple(pairs), (floats("conditioning", "pairs", *vectors),)),
        **found,
        "denoiser": Signature(
            (latents, *given, floats("guidance", "batch")),
            states(*outputs),
        ),
        "update": Signature(
            (*states("latents", "prediction", "previous"), floats("coefficients", 2, 3)), states("kept", "next")
        ),
        "decoder": Signature((latents,), (floats("images", "batch", 3, 8 * height, 8 * width),)),
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


def sides(resolution: int | str) -> tuple[int, int]:
    """Height and width of the latents for pictures of 256 or "512x256" pixels."""
    numbers = str(resolution).split("x")
    if len(numbers) > 2 or not all(number.isdecimal() and int(number) and int(number) % 8 == 0 for number in numbers):
        raise UsageError(
            f"resolution {resolution}; expected a multiple of 8, such as 256 or 512, or two as height x width: 512x256"
        )
    return int(numbers[0]) // 8, int(numbers[-1]) // 8


def sized(spec: ModelSpec, resolution: int | str | None) -> ModelSpec:
    """The same network for pictures of another size."""
    if resolution is None:
        return spec
    height, width = sides(resolution)
    return replace(spec, latent_size=height, latent_width=0 if width == height else width)


def conditioned(spec: ModelSpec, conditioning: str) -> ModelSpec:
    """The same network, conditioned in another way; with captions it has no classes but some examples of them."""
    spec = replace(spec, conditioning=conditioning)
    return replace(spec, num_classes=EXAMPLES) if spec.by.captioned else spec


def table_name(spec: ModelSpec) -> str:
    """The table's name for a network of this shape ("XL/2"), or its depth, width and patch."""
    shape = (spec.depth, spec.hidden, spec.heads)
    size = next((name for name, row in SIZES.items() if row == shape), f"{spec.depth}x{spec.hidden}")
    return f"{size}/{spec.patch}"


@dataclass(frozen=True)
class Recipe(Tuning):
    """Everything a build needs to know; a TOML file in engines/ and the flags of `build` both give one."""

    model: str | None = None
    conditioning: str | None = None
    resolution: int | str | None = None  # a side in pixels, or "512x256" for height x width
    precision: str = "fp32"
    backend: str = "auto"
    checkpoint: str | None = None
    vae: str | None = None
    labels: str | None = None
    heads: int | None = None
    prediction: str | None = None  # where neither a scheduler nor a key tells; the weights alone do not
    calibration: str | None = None
    captions: str | None = None  # to calibrate with: an .npy or .npz of what a text encoder made of some texts
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
        kinds = {field.name: str(field.type).removesuffix(" | None") for field in fields(cls)}
        kinds = {name: "list" if kind in ("list[str]", "tuple[str, ...]") else kind for name, kind in kinds.items()}
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
    def tuning(self) -> Tuning:
        return Tuning(**{field.name: getattr(self, field.name) for field in fields(Tuning)})

    def to_toml(self) -> str:
        """What differs from the defaults, as `from_toml` reads it."""
        given, default = asdict(self), asdict(Recipe())
        return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in given.items() if v != default[k])

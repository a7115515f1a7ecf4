"""ModelSpec, the shape of the paper's DiT, and the one table of its sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from dit_export.recipe import latent_size, resolution_name
from dit_runtime.errors import UsageError, nearest


class Conditioning(NamedTuple):
    """State how the timestep and the label reach a network's tokens."""

    modulation: int = 0  # adaLN's vectors a block: shift and scale twice, 6 with gates; 0: norms with their own gains
    appended: bool = False  # as two tokens beside the patches
    crossed: bool = False  # as what a cross-attention in each block reads


CONDITIONINGS = {
    "adaln-zero": Conditioning(modulation=6),
    "adaln": Conditioning(modulation=4),
    "in-context": Conditioning(appended=True),
    "cross-attention": Conditioning(crossed=True),
}


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
    num_classes: int = 1000  # 0: the network takes no labels
    low_channels: int = 0  # of a low-resolution picture's latents, concatenated to the state's; 0: it takes none
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
        if not self.num_classes and not self.low_channels:
            raise UsageError("no classes and no low-resolution picture: expected a condition")
        if not self.num_classes and not self.scheme.modulation:
            raise UsageError(f"conditioning {self.conditioning} without classes; expected adaln-zero or adaln")
        if self.embedders not in (1, self.depth):
            raise UsageError(f"{self.embedders} embedders for {self.depth} blocks: expected 1 or one a block")

    @property
    def scheme(self) -> Conditioning:
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
        """Return it as people write it: 256, or 512x256 for height x width."""
        return resolution_name(self.latent_shape[1:])

    @property
    def null_label(self) -> int:
        return self.num_classes

    @property
    def modulations(self) -> int:
        """adaLN's vectors: of each block, and two for the final layer."""
        return self.scheme.modulation * self.depth + 2 if self.scheme.modulation else 0

    @property
    def num_vectors(self) -> int:
        """K: conditioning vectors a step: adaLN's; the two tokens; the keys and values of two tokens for each block."""
        keys_and_values = 4 * self.depth if self.scheme.crossed else 0
        return self.modulations + 2 * self.scheme.appended + keys_and_values

    @property
    def gains(self) -> int:
        """Return how many of the K vectors are `1 + scale`."""
        return 2 * self.depth + 1 if self.scheme.modulation else 0


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
    """Return the table's entry, or raise an error that names the nearest."""
    if name not in MODELS:
        raise UsageError(f"model {name!r} is not known{nearest(name, MODELS)}; known: {', '.join(MODELS)}")
    return MODELS[name]


def at_resolution(spec: ModelSpec, resolution: int | str | None) -> ModelSpec:
    """Return the same network for images of another size."""
    if resolution is None:
        return spec
    height, width = latent_size(resolution)
    return replace(spec, latent_size=height, latent_width=0 if width == height else width)


def with_conditioning(spec: ModelSpec, conditioning: str) -> ModelSpec:
    """Return the same network with another conditioning."""
    return replace(spec, conditioning=conditioning)


def table_name(spec: ModelSpec) -> str:
    """Return the table's name for a network of this shape ("XL/2"), or its depth, width and patch."""
    shape = (spec.depth, spec.hidden, spec.heads)
    size = next((name for name, row in SIZES.items() if row == shape), f"{spec.depth}x{spec.hidden}")
    return f"{size}/{spec.patch}"


def expected_counts(spec: ModelSpec) -> dict[str, int]:
    """Return how often each pass must fire in a DiT of this spec, in fp32 and with nothing left in float."""
    crossed, appended = spec.scheme.crossed, spec.scheme.appended
    layers = (6 if crossed else 4) * spec.depth  # qkv, proj, fc1, fc2; a cross-attention's q and proj
    attentions = (2 if crossed else 1) * spec.depth
    return {
        "hoist": spec.modulations + appended + 2 * spec.depth * crossed + bool(spec.low_channels),  # tokens, K and V
        "pack": spec.num_vectors,
        "pack_context": 0,
        "fold_gains": spec.gains,
        # The residual stream, and what a branch makes of it before it is mixed; or the latents, before the picture.
        "share_rows": 1 if appended or spec.low_channels else 2,
        "guide": 1,
        "quantize": layers,
        "quantize_attention": spec.depth,
        "integer_products": 0,
        "plain_attention": attentions,
        "split_qkv": spec.depth,
        "group_norm": 0,
        "masked_attention": 0,
        "depth_to_space": 0,
        "cast_to_half": layers + attentions + 2,  # the patches and the last linear as well
    }

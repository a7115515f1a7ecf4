"""Networks drawn by a seed: sizes, heads, depths, conditionings, and channels that int8 finds hard."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from dit_export.checkpoints import Loaded
from dit_export.checkpoints.diffusers import read_process
from dit_export.checkpoints.synthetic import synthetic_dit, synthetic_vae
from dit_export.networks.dit import Block, DiT, dit_network
from dit_export.networks.spec import CONDITIONINGS, ModelSpec

VAE: dict[str, Any] = {
    "block_out_channels": (16, 16, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
HOT = (30.0, 1000.0)  # magnitude of a hot channel, where the others of its layer are around 1
WIDTHS = (96, 120, 128, 144, 160, 192, 216, 256, 288)


def draw(seed: int) -> Loaded:
    """Return the network of a seed; about half of them have hot channels before fc2, in one block or more."""
    random = np.random.default_rng(seed)
    hidden = int(random.choice(WIDTHS))
    heads = int(random.choice([count for count in range(2, 9) if hidden % count == 0 and hidden // count >= 16]))
    patch, side = ((1, 8), (2, 8), (2, 16), (4, 16))[random.integers(4)]
    prediction = "velocity" if random.random() < 0.25 else None
    process = read_process(None, learned_variance=prediction is None, prediction=prediction)
    spec = ModelSpec(
        depth=int(random.integers(2, 6)),
        hidden=hidden,
        heads=heads,
        patch=patch,
        latent_size=side,
        num_classes=10,
        mlp_ratio=float(random.choice([2.0, 4.0])),
        learned_variance=prediction is None,
        conditioning=str(random.choice([*CONDITIONINGS])),
    )
    model = synthetic_dit(spec, seed, process.span)
    if random.random() < 0.5:
        for index in random.choice(spec.depth, random.integers(1, spec.depth + 1), replace=False):
            heat(model, int(index), float(np.exp(random.uniform(*np.log(HOT)))), random)
    network = dit_network(model, process.prediction)
    vae = None if seed % 10 else synthetic_vae(seed, VAE)  # most of a small build's time
    return Loaded(network, vae, (), process, {"kind": "synthetic", "seed": seed})


@torch.no_grad()
def heat(model: DiT, index: int, magnitude: float, random: np.random.Generator) -> None:
    """Make two of a block's hidden channels large and constant, and take their constant share out of fc2's bias.

    Trained transformers have such channels; between GELU and fc2 no smoothing can be folded.
    """
    mlp = cast(Block, model.blocks[index]).mlp
    channels = torch.from_numpy(random.choice(mlp.fc1.out_features, 2, replace=False))
    mlp.fc1.weight[channels] *= 0.1
    mlp.fc1.bias[channels] = magnitude
    share = F.gelu(mlp.fc1.bias[channels], approximate="tanh")  # (2,)
    mlp.fc2.bias -= mlp.fc2.weight[:, channels] @ share

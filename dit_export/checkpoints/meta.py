"""Files of weights alone (.pt, .bin, .safetensors), with Meta's names or diffusers'; their shapes give the network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dit_export.checkpoints import keys
from dit_export.checkpoints.files import read_weights
from dit_export.networks.dit import DiT, position_table
from dit_export.networks.spec import CONDITIONINGS, SIZES, ModelSpec, at_resolution
from dit_export.recipe import Recipe
from dit_runtime.errors import UsageError


def read_file(path: Path, recipe: Recipe) -> DiT:
    where = str(path)
    state = read_weights([path])
    table = keys.dialect(state, where)
    if table is keys.DIFFUSERS and (path.parent / "config.json").is_file():
        raise UsageError(f"{where}: its config.json lies beside it and counts: pass the folder {path.parent}")
    depth = keys.depth_of(state)
    names = keys.expand(table, depth)

    def shape(ours: str, rank: int) -> list[int]:
        theirs = names.get(ours, [f"block 0's {ours}"])[0]
        if theirs not in state or state[theirs].ndim != rank or not state[theirs].numel():
            got = list(state[theirs].shape) if theirs in state else "nothing"
            raise UsageError(f"{where}: {theirs} tells the network's shape: got {got}, expected {rank} dimensions")
        return list(state[theirs].shape)

    hidden, channels, patch, _ = shape("patches.weight", 4)
    outputs = shape("final.linear.weight", 2)[0]
    if outputs not in (channels * patch**2, 2 * channels * patch**2):
        raise UsageError(
            f"{where}: the final layer has {outputs} outputs, expected {channels * patch**2} (patch² x channels), "
            "or twice as many with a learned variance"
        )
    spec = ModelSpec(
        depth=depth,
        hidden=hidden,
        heads=recipe.heads or table_heads(depth, hidden, where),
        patch=patch,
        latent_size=patch,  # until it is known
        channels=channels,
        num_classes=shape("embedders.0.label.weight", 2)[0] - 1,
        mlp_ratio=shape("blocks.0.mlp.fc1.weight", 2)[0] / hidden,
        learned_variance=outputs == 2 * channels * patch**2,
        conditioning=conditioning_of(state, names, hidden, where),
    )
    positions = names.get("positions", [""])[0]
    if positions in state:
        trained = replace(spec, latent_size=patch * math.isqrt(shape("positions", 3)[1]))
        spec = at_resolution(trained, recipe.resolution)
        if spec != trained:
            _require_formula(state.pop(positions), trained, spec, where)
    elif recipe.resolution:
        spec = at_resolution(spec, recipe.resolution)
    else:
        raise UsageError(f"{where}: has no position table, so its resolution is unknown: pass --resolution")
    if table is keys.DIFFUSERS:  # its fixed choices, and its default norm_eps, as there is no config.json
        spec = replace(spec, frequency_shift=1, norm2_eps=1e-5, guided_channels=channels, unguided_up_to_one=True)
    return keys.read(state, table, spec, where)


def conditioning_of(state: Mapping[str, Tensor], names: Mapping[str, list[str]], hidden: int, where: str) -> str:
    """Tell the conditioning by what a block holds: adaLN's vectors, or a cross-attention, or neither."""

    def rows(ours: str) -> int:
        (theirs,) = names.get(ours, [""])
        return state[theirs].shape[0] if theirs in state else 0

    vectors, crossed = rows("blocks.0.modulation.weight") / hidden, rows("blocks.0.cross.q.weight") > 0
    for name, scheme in CONDITIONINGS.items():
        if (scheme.modulation, scheme.crossed) == (vectors, crossed):
            return name
    raise UsageError(
        f"{where}: a block has {vectors:g} vectors of adaLN{' and a cross-attention' * crossed}; known: 4, 6"
    )


def _require_formula(table: Tensor, trained: ModelSpec, spec: ModelSpec, where: str) -> None:
    """Another size needs other positions, and only a formula gives them."""
    formula = position_table(trained.hidden, trained.grid)
    if table.shape != formula.shape or not torch.allclose(table.float(), formula, rtol=0, atol=1e-3):
        raise UsageError(
            f"{where}: the weights' resolution is {trained.resolution}, expected {spec.resolution} as the recipe says, "
            "and their position table is not the sin-cos formula's, so there is none for another size"
        )


def table_heads(depth: int, hidden: int, where: str) -> int:
    for row in SIZES.values():
        if row[:2] == (depth, hidden):
            return row[2]
    raise UsageError(
        f"{where}: {depth} blocks of width {hidden} are none of the table's ({', '.join(SIZES)}), "
        "and the weights do not tell the number of heads: pass --heads"
    )

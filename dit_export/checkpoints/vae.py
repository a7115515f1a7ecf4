"""The VAE whose decoder turns latents into images: any class in CODECS, from a folder of diffusers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dit_export.checkpoints.diffusers import build_module, read_config
from dit_export.checkpoints.files import check, find_weights, read_weights
from dit_export.networks.codec import CODECS, make_decoder
from dit_export.recipe import PIXELS
from dit_runtime.errors import UsageError

# Attention layers in files from before diffusers 0.16, as Stable Diffusion's VAEs on the hub still are.
OLDER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
COUNTER = "num_batches_tracked"  # of a batch norm: a whole number that no decoder reads


def read_vae(folder: Path, channels: int, pixels: int = PIXELS) -> tuple[Any, list[Path]]:
    """Read a VAE and return its files; refuse other latents than those of `channels` and of `pixels` along a cell.

    `folder` is the VAE's own, or a pipeline's with vae/ in it.
    """
    if (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    where = folder / "config.json"
    if not where.is_file():
        raise UsageError(f"{folder}: holds neither config.json nor vae/config.json: pass --vae, or --latents-only")
    config = read_config(folder, *CODECS)
    name = config["_class_name"]
    for field, values in CODECS[name].supported.items():
        if config[field] not in values:
            raise UsageError(f"{where}: {field} is {config[field]!r}, expected {' or '.join(map(repr, values))}")
    vae = build_module(name, config, str(where))
    decoder = make_decoder(vae)
    for what, got, wanted in (("channels", decoder.channels, channels), ("pixels a cell", decoder.pixels, pixels)):
        if got != wanted:
            raise UsageError(f"{where}: its latents have {got} {what}, expected {wanted} as in the network's state")

    files = find_weights(folder)
    older = re.compile(rf"(?<=\.attentions\.0\.)({'|'.join(OLDER_NAMES)})(?=\.)")
    state = {
        older.sub(lambda match: OLDER_NAMES[match[1]], name): tensor
        for name, tensor in read_weights(files).items()
        if not name.endswith(COUNTER)
    }
    expected = {key: tuple(value.shape) for key, value in vae.state_dict().items() if not key.endswith(COUNTER)}
    check(state, expected, str(folder))
    vae.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True, strict=False)
    return vae.eval().requires_grad_(False), files

"""Z-Image from a whole pipeline of diffusers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_export.networks.families import family_network
from dit_runtime.errors import UsageError
from tests.families.test_lumina2 import with_lengths
from tests.networks import tiny

TOKENS = 64


def theirs(transformer: torch.nn.Module, values: dict[str, Tensor]) -> Tensor:
    """Return dx/dσ as the pipeline makes it of the transformer's own forward, with a list of pictures and prompts."""
    lengths = values["mask"].sum(1).long().tolist()
    captions = [rows[:length] for rows, length in zip(values["captions"], lengths, strict=True)]
    pictures = list(values["latents"][:, :, None])
    return -torch.stack(transformer(pictures, 1 - values["timesteps"], captions).sample)[:, :, 0]


@pytest.mark.parametrize("size", [(8, 12), (16, 8)])  # 24 image tokens, which are filled up, and 32
@pytest.mark.parametrize("lengths", [[64, 64, 64, 64], [1, 31, 32, 33], [40, 40, 40, 40]])
def test_a_wrapper_is_diffusers(size, lengths) -> None:
    """Prompts of all lengths in one batch, though diffusers' own forward cuts each to its length."""
    transformer = tiny.z_image()
    network = family_network(transformer, size, TOKENS)
    values = with_lengths(tiny.inputs(network, 4), lengths)
    got, expected = tiny.run(network, values), theirs(transformer, values)
    assert max(tiny.distance(*rows) for rows in zip(got, expected, strict=True)) <= 2e-6
    others = tiny.inputs(network, 4, seed=1)
    for port in network.ports:
        changed = tiny.run(network, values | {port.name: others[port.name]})
        assert tiny.distance(changed, expected) > 0.01, port.name


def test_neighbours_change_nothing() -> None:
    network = family_network(tiny.z_image(), (8, 12), TOKENS)
    values = with_lengths(tiny.inputs(network, 3), [4, 64, 33])
    together = tiny.run(network, values)
    for row in range(3):
        alone = tiny.run(network, {name: value[row : row + 1] for name, value in values.items()})
        assert tiny.distance(together[row : row + 1], alone) <= 1e-6
    beyond = values["captions"] + 9 * (1 - values["mask"])[..., None]  # what a prompt does not have
    assert tiny.distance(tiny.run(network, values | {"captions": beyond}), together) <= 1e-6


def test_what_is_refused() -> None:
    family_network(tiny.z_image(), (8, 12), 576)
    with pytest.raises(UsageError, match="captions of 40 tokens; expected a multiple of 32"):
        family_network(tiny.z_image(), (8, 12), 40)
    with pytest.raises(UsageError, match="captions of 608 tokens; the position table has room for 598"):
        family_network(tiny.z_image(), (8, 12), 608)
    with pytest.raises(UsageError, match="siglip_feat_dim is 8, expected None"):
        family_network(tiny.z_image(siglip_feat_dim=8), (8, 12), TOKENS)

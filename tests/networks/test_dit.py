"""The DiT's module itself: what moves with it, and what a checkpoint holds of it."""

from __future__ import annotations

import torch

from dit_export.checkpoints.synthetic import synthetic_dit
from dit_export.networks.dit import DiT, timestep_frequencies
from dit_export.networks.spec import ModelSpec

SPEC = ModelSpec(depth=1, hidden=64, heads=2, patch=2, latent_size=8, num_classes=10)


def test_frequencies_move_with_the_network_and_are_no_weights() -> None:
    """A tensor that stays on the CPU is copied to a GPU in every forward, and no CUDA graph may do that."""
    with torch.device("meta"):
        model = DiT(SPEC)
    (embedder,) = model.embedders
    torch.testing.assert_close(embedder.frequencies, timestep_frequencies(SPEC.frequency_shift), rtol=0, atol=0)
    assert not any("frequencies" in name for name in model.state_dict())
    assert model.to("meta").embedders[0].frequencies.device.type == "meta"


def test_random_weights_have_the_frequencies() -> None:
    """Memory that was only reserved would be the frequencies of another network in each process."""
    (embedder,) = synthetic_dit(SPEC, seed=0).embedders
    torch.testing.assert_close(embedder.frequencies, timestep_frequencies(SPEC.frequency_shift), rtol=0, atol=0)

"""A frozen weight of guidance: the network is the one that reads this weight, and mixes two predictions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from dit_export.networks import Network
from dit_export.networks.families import family_network
from dit_export.networks.frozen import freeze_guidance
from dit_runtime.errors import UsageError
from tests.networks import tiny
from tests.networks.test_captured import capture
from tests.networks.toy import ToyPipeline

NETWORKS: dict[str, Callable[[], Network]] = {
    "flux": lambda: family_network(tiny.flux(), (4, 6), tiny.TOKENS),
    "flux2": lambda: family_network(tiny.flux2(guidance_embeds=True), (4, 6), tiny.TOKENS),
    "sana": lambda: family_network(tiny.sana(guidance_embeds=True), (4, 4), tiny.TOKENS),
    "captured": lambda: capture(ToyPipeline(guidance="embedded"))[1],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_constant_is_read(name: str) -> None:
    network, weight = NETWORKS[name](), 3.5
    values = tiny.inputs(network, 2)
    own, other = (values | {network.guidance_port: torch.full((2,), number)} for number in (weight, 1.5))
    expected, another = tiny.run(network, own), tiny.run(network, other)
    frozen = freeze_guidance(network, weight)
    values.pop(network.guidance_port)
    assert torch.equal(tiny.run(frozen, values), expected)
    assert tiny.distance(another, expected) > 1e-4
    assert frozen.ports == tuple(port for port in network.ports if port.name != network.guidance_port)
    assert frozen.mixes_guidance and frozen.guidance == 1 and frozen.counts.get("guide", 1) == 1
    torch.export.export(frozen.module, (), values, strict=False)  # the port is no argument that a trace lacks


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match=r"embedded-guidance 3\.5, but the network takes no weight of guidance"):
        freeze_guidance(family_network(tiny.sd3(), tokens=tiny.TOKENS), 3.5)
    with pytest.raises(UsageError, match="embedded-guidance nan; expected a finite number"):
        freeze_guidance(NETWORKS["flux"](), math.nan)

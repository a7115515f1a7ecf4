"""Freeze the weight of guidance that a network takes as an input, so that guidance mixes two of its predictions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dit_export.networks import Network
from dit_runtime.errors import UsageError


def freeze_guidance(network: Network, weight: float) -> Network:
    """Give the network's port of guidance a constant; requests then guide as they guide a network without that port.

    diffusers calls this true guidance: `true_cfg_scale` beside a `guidance_scale` that the network reads. The module is
    changed.
    """
    name = network.guidance_port
    if not name:
        raise UsageError(f"embedded-guidance {weight:g}, but the network takes no weight of guidance: leave it out")
    if not math.isfinite(weight):
        raise UsageError(f"embedded-guidance {weight:g}; expected a finite number")

    def fill(_: nn.Module, rows: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return rows, {**inputs, name: torch.full_like(inputs[network.time.name], weight)}

    network.module.register_forward_pre_hook(fill, with_kwargs=True)
    counts = {key: 1 if key == "guide" else count for key, count in network.counts.items()}
    ports = tuple(port for port in network.ports if port.name != name)
    return replace(network, ports=ports, guidance_port="", guidance=1.0, counts=counts)

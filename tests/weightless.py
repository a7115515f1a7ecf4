"""Networks of any size, traced and fused without their weights: these take neither memory nor disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_graphsurgeon as gs
import onnx_ir as ir
import torch
from torch import nn

from dit_export.graph import onnxfile, trace
from dit_export.networks import Network
from dit_export.networks.streaming import stream


def without_weights(network: Network) -> Network:
    """Replace the parameters by fakes, and let each be one number: equal linears of equal inputs would become one."""
    parameters = dict(network.module.named_parameters())
    weights = {name: torch.tensor(float(n)).expand(value.shape) for n, (name, value) in enumerate(parameters.items())}
    stream(network.module, weights)
    return replace(network, weights=weights)


def plain_graph(network: Network, folder: Path) -> gs.Graph:
    """Trace as a build does, with large weights that are all the same part of a sparse file."""
    traced = trace.trace_network(network).model
    largest = 0
    for value in traced.graph.initializers.values():
        tensor = value.const_value
        if tensor.dtype == ir.DataType.FLOAT and tensor.nbytes >= onnxfile.INLINE_BYTES:
            largest = max(largest, tensor.nbytes)
            value.const_value = ir.ExternalTensor(
                "zeros", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name, base_dir=folder
            )
    with (folder / "zeros").open("wb") as zeros:
        zeros.truncate(largest)
    ir.save(traced, folder / "network.onnx")
    return onnxfile.load(folder / "network.onnx")


def on_meta(module: type[nn.Module], *arguments: object) -> nn.Module:
    """Make a module whose parameters nothing has written yet."""
    with torch.device("meta"):
        made = module(*arguments).eval().requires_grad_(False)
    return made.to_empty(device="cpu")

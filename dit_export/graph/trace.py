"""PyTorch modules to ONNX files, through torch.export, with named inputs and outputs and a free batch."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.fx import GraphModule

from dit_export.graph.references import refer
from dit_export.graph.repairs import REPAIRS, split_boolean_wheres
from dit_export.networks import Network, rules
from dit_export.networks.encoding import Encoder
from dit_export.networks.text import PromptEncoder
from dit_runtime.bundle.manifest import Port

OPSET = 23  # the first with Attention, so that a backend's passes choose its form
NONE: Mapping[str, Tensor] = {}


def export(
    module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], weights: Mapping[str, Tensor] = NONE
) -> torch.onnx.ONNXProgram:
    """Trace a module to ONNX, axis 0 of inputs and outputs free; `save(…, external_data=True)` has no 2 GB limit.

    `weights` are the values of parameters that are fake; they are read when the graph is saved.
    """
    if fakes := detect_fake_mode(list(module.parameters())):
        inputs = {name: fakes.from_tensor(value) for name, value in inputs.items()}
    # A named Dim wants a range, and diffusers' upsampling branches at 64 rows; several inputs have as many rows each.
    rows: Any = torch.export.Dim.DYNAMIC if len(inputs) == 1 else torch.export.Dim("rows")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        shapes = {name: {0: rows} for name in inputs}
        program = torch.export.export(module, (), dict(inputs), dynamic_shapes=shapes, strict=False)
        if (repaired_module := repaired(program)) is not None:
            program = torch.export.export(repaired_module, (), dict(inputs), dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program,
            kwargs=dict(inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
            optimize=False,
        )
        assert exported is not None
        refer(exported.model.graph, weights)
        exported.optimize()
    split_boolean_wheres(exported.model.graph)
    return exported


def repaired(program: torch.export.ExportedProgram) -> GraphModule | None:
    """Return the program as a module with every repair applied; None where there is nothing to repair."""
    module = program.run_decompositions({}).module()
    assert isinstance(module, GraphModule)
    if not sum([repair(module) for repair in REPAIRS]):
        return None
    module.recompile()
    return module


def trace_network(network: Network) -> torch.onnx.ONNXProgram:
    """Trace the plain graph: inputs named as the ports, output `prediction` (with the variance)."""
    return export(network.module, examples(network.ports), ["prediction"], network.weights)


def trace_rule(network: Network) -> torch.onnx.ONNXProgram:
    """Trace how the network's predictions are mixed: (conditional, negative, weight) -> guided."""
    channels, *rest = network.state.shape
    shape = (2, network.guided_channels or channels, *rest)
    inputs = {"conditional": torch.zeros(shape), "negative": torch.zeros(shape)}
    return export(rules.rule(network), inputs | {"weight": torch.zeros(2, 1, *[1] * len(rest))}, ["guided"])


def examples(ports: Sequence[Port], rows: int = 2) -> dict[str, Tensor]:
    """Return values that every network takes: masks of ones, everything else zero."""
    return {
        port.name: torch.full((rows, *port.shape), int(bool(port.masks)), dtype=getattr(torch, port.dtype))
        for port in ports
    }


def export_prompt(text: PromptEncoder) -> torch.onnx.ONNXProgram:
    """Trace text encoders: ids and masks to condition ports."""
    inputs = {
        name: torch.full((2, prompt.tokens), value, dtype=torch.int64)
        for prompt in text.prompts
        for name, value in ((prompt.ids, 0), (prompt.mask, 1))
        if name
    }
    return export(text.module, inputs, text.gives, text.weights)


def export_encoder(encoder: Encoder, shape: Sequence[int]) -> torch.onnx.ONNXProgram:
    """Trace an encoder of images of this shape, (3, H, W)."""
    return export(encoder, {"images": torch.zeros(2, *shape)}, encoder.gives)


def export_decoder(decoder: nn.Module, state: Port) -> torch.onnx.ONNXProgram:
    """Trace a decoder of `latents`; its graph's input is named after the state."""
    program = export(decoder, {"latents": torch.zeros(2, *state.shape)}, ["images"])
    program.model.graph.inputs[0].name = state.name
    return program

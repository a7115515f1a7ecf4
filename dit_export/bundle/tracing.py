"""Trace the parts of a bundle: the network, its decoder and its text encoders."""

from __future__ import annotations

from pathlib import Path

from dit_export.checkpoints import Loaded
from dit_export.graph import DECODER, ENCODER, NETWORK, PROMPT, RULE, trace
from dit_export.graph.oracle import Oracle
from dit_export.networks.codec import Decoder
from dit_export.networks.encoding import Encoder
from dit_runtime.progress import Progress


def trace_graphs(
    folder: Path, loaded: Loaded, decoder: Decoder | None, progress: Progress, encoder: Encoder | None = None
) -> Oracle:
    """Write the plain exports of the network and its neighbours; return PyTorch's values of the network's tensors."""
    folder.mkdir()
    with progress.stage("trace: network to ONNX"):
        program = trace.trace_network(loaded.network)
        program.save(folder / NETWORK, external_data=True)
    if loaded.network.mixes_guidance:
        trace.trace_rule(loaded.network).save(folder / RULE)
    if decoder is not None:
        with progress.stage("trace: decoder to ONNX"):
            trace.export_decoder(decoder, loaded.network.state).save(folder / DECODER, external_data=True)
    if encoder is not None and decoder is not None:
        with progress.stage("trace: encoder to ONNX"):
            shape = 3, *(decoder.pixels * side for side in loaded.network.state.shape[1:])
            trace.export_encoder(encoder, shape).save(folder / ENCODER, external_data=True)
    if loaded.text is not None:
        with progress.stage("trace: text encoders to ONNX"):
            trace.export_prompt(loaded.text).save(folder / PROMPT, external_data=True)
    assert program.exported_program is not None
    return Oracle(program.exported_program, loaded.network.weights)

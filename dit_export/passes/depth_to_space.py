"""DepthToSpace as a transposition, for backends that have no kernel of it in every type:

(B, b b C, H, W) → (B, b, b, C, H, W) → (B, C, H, b, W, b) → (B, C, b H, b W)
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from dit_export.graph.onnxfile import layer


def depth_to_space(graph: gs.Graph) -> int:
    """Rewrite every DepthToSpace of known size whose blocks are the outer part of the channels; return how many."""
    matches = [node for node in graph.nodes if node.op == "DepthToSpace" and _is_static(node)]
    for node in matches:
        (x,), (out,) = node.inputs, node.outputs
        node.outputs.clear()
        block, (_, channels, height, width) = node.attrs["blocksize"], out.shape
        parts = np.array([0, block, block, channels, height // block, width // block])
        split = layer(graph, "Reshape", [x, parts], f"{out.name}_blocks")
        turned = layer(graph, "Transpose", [split], f"{out.name}_turned", perm=[0, 3, 4, 1, 5, 2])
        layer(graph, "Reshape", [turned, np.array([0, channels, height, width])], out)
    graph.cleanup().toposort()
    return len(matches)


def _is_static(node: gs.Node) -> bool:
    shape = node.outputs[0].shape
    known = shape is not None and len(shape) == 4 and all(isinstance(size, int) for size in shape[1:])
    return known and node.attrs.get("mode", "DCR") == "DCR"

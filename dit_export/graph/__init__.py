"""ONNX graphs: traced from PyTorch, read, written and described."""

# Files of the plain exports.
NETWORK, RULE, PROMPT = "network.onnx", "rule.onnx", "prompt.onnx"
ENCODER, DECODER = "encoder.onnx", "decoder.onnx"

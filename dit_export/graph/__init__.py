"""ONNX graphs: traced from PyTorch, read, written and described."""

# Files of the plain exports.
NETWORK, RULE, DECODER, PROMPT = "network.onnx", "rule.onnx", "decoder.onnx", "prompt.onnx"

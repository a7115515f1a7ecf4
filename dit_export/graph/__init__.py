"""ONNX graphs: traced from PyTorch, read, written and described."""

NETWORK, RULE, DECODER = "network.onnx", "rule.onnx", "decoder.onnx"  # files of the plain exports

"""ONNX graphs: traced from PyTorch, read, written and described."""

NETWORK, DECODER = "network.onnx", "decoder.onnx"  # files of the plain exports

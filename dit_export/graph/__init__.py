"""ONNX graphs: traced from PyTorch, read, written and described."""

NETWORK, DECODER, PROMPT = "network.onnx", "decoder.onnx", "prompt.onnx"  # files of the plain exports

"""ONNX graphs: traced from PyTorch, read, written and described."""

"""The toolchain: PyTorch Diffusion Transformer -> ONNX -> fused graphs -> verified bundle."""

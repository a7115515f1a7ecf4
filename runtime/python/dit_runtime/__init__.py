"""Samples from a bundle with NumPy and one engine; no PyTorch."""

"""Parity against PyTorch: the reference it leaves in the bundle, and the proof that the checks can fail."""

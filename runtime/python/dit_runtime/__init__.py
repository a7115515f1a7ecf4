"""Samples from a bundle with NumPy and one engine; no PyTorch."""

from dit_runtime.captions import Captions
from dit_runtime.errors import BundleError, UsageError
from dit_runtime.pipeline import EngineError, Pipeline, Stopped

__all__ = ["BundleError", "Captions", "EngineError", "Pipeline", "Stopped", "UsageError"]

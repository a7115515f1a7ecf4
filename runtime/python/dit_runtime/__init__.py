"""Samples from a bundle with NumPy and one engine; no PyTorch."""

from dit_runtime.errors import BundleError, EngineError, Stopped, UsageError
from dit_runtime.facts import VERSION
from dit_runtime.images import show
from dit_runtime.pipeline import Pipeline
from dit_runtime.request import Request
from dit_runtime.run import Run

__all__ = ["BundleError", "EngineError", "Pipeline", "Request", "Run", "Stopped", "UsageError", "show"]

__version__ = VERSION

"""The options of the search that `dit-export quantize` asks for: a budget, and what int8 makes no faster."""

from __future__ import annotations

from typing import NamedTuple

from dit_runtime import backends
from dit_runtime.errors import UsageError
from dit_runtime.verify import Figure


class Budget(NamedTuple):
    """The distance that the worst sample of a run may end from fp32's."""

    metric: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        metric, _, number = text.partition("=")
        try:
            limit = float(number)
        except ValueError:
            limit = 0.0
        if metric not in ("PSNR", "latent-rel-l2") or not limit > 0:
            raise UsageError(f"budget {text!r}; expected PSNR=DECIBELS or latent-rel-l2=ERROR, such as PSNR=35")
        return cls(metric, limit)

    def figure(self, value: float) -> Figure:
        return Figure("budget", self.metric, value, self.limit, at_least=self.metric == "PSNR")

    def __str__(self) -> str:
        return f"{self.metric}={self.limit:g}"


class SearchOptions(NamedTuple):
    """Options of the search that `dit-export quantize` asks for."""

    budget: Budget | None = None
    tune: bool = False

    def check(self, backend: str, has_decoder: bool) -> None:
        if self.budget is not None and self.budget.metric == "PSNR" and not has_decoder:
            raise UsageError(f"budget {self.budget} needs pictures, and there is no decoder; expected latent-rel-l2=…")
        if self.tune and backend not in backends.CPU:
            raise UsageError(f"--tune cannot time {backend} where it is built; expected {' or '.join(backends.CPU)}")

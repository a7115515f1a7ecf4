"""Pictures of a run that is under way: what the network predicts of the end, decoded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime import images
from dit_runtime.pipeline import Pipeline
from dit_runtime.request import Checked
from dit_runtime.sampling.denoiser import estimate
from dit_runtime.sampling.schedule import Level


def plan(checked: Checked, count: int) -> Mapping[int, Level]:
    """Return the level of each evaluation after which one of `count` previews is drawn."""
    known = checked.levels
    return {evaluation: known[evaluation - 1] for evaluation in spread(count, len(known))}


def spread(count: int, evaluations: int) -> Collection[int]:
    """Return after which evaluations `count` previews are drawn, evenly, none after the last."""
    return {evaluations * (number + 1) // (count + 1) for number in range(count)} - {0, evaluations}


def pictures(pipe: Pipeline, level: Level, state: NDArray[np.float64], prediction: NDArray[Any]) -> images.Pictures:
    """Return the decoded x₀ that follows from a prediction at this level."""
    x0 = estimate(pipe.manifest.process.prediction, state, prediction, None, level).x0
    return images.to_uint8(pipe.engines.decode(x0))

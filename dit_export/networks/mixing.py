"""The guidance of a captured transformer: the weight that it reads, and the rule that mixes its predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dit_export.networks import rules
from dit_export.networks.captured import CLOSE, Captured, Group, distance
from dit_export.networks.diffusers import Recording
from dit_runtime.errors import UsageError


def weight_factor(captured: Captured) -> float:
    """Return what the transformer reads of a weight of guidance of 1."""
    name, runs = captured.sorted.weight, captured.runs
    if not name:
        return 1.0
    at_one, other = (float(captured.own(run).inputs[name].unique()) for run in (runs.unguided, runs.first))
    if not math.isclose(other, at_one * runs.weight, rel_tol=CLOSE):
        what = f"{name} is {at_one:g} at a weight of guidance of 1 and {other:g} at {runs.weight:g}"
        raise UsageError(f"unknown guidance: {what}; expected a multiple of it")
    return at_one


def weight_of(captured: Captured, run: Recording) -> float:
    """Return the weight of guidance of a recorded run."""
    return 1.0 if run is captured.runs.unguided else captured.runs.weight


def mix(captured: Captured, rule: nn.Module, predictions: Sequence[Tensor], run: Recording) -> Tensor:
    """Mix a step's predictions by a rule of guidance; return a single one unchanged."""
    if len(predictions) == 1:
        return predictions[0]
    own, away = predictions[captured.conditional], predictions[1 - captured.conditional]
    weight = torch.full((len(own), *[1] * (own.ndim - 1)), weight_of(captured, run))
    mixed: Tensor = rule(own, away, weight)
    return mixed


def find_rule(captured: Captured, predict: Callable[[Group], Tensor]) -> nn.Module:
    """Return the rule by which the first step's predictions are mixed."""
    first, shape = captured.runs.first, captured.shape[1:]
    predictions = [predict(group) for group in captured.groups(first.steps[0])]
    mixed = captured.drawn(first.steps[0].prediction)
    patches = [(side,) * len(shape) for side in (1, 2) if not any(size % side for size in shape)]
    for rule in (rules.Linear(), *(rules.Renormalized(*patch) for patch in patches)):
        if distance(mix(captured, rule, predictions, first), mixed) <= CLOSE:
            return rule
    raise UsageError(
        f"unknown guidance: what the scheduler takes at a weight of {captured.runs.weight:g} is neither the linear nor "
        "the renormalized mixture of both predictions"
    )

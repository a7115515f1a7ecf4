"""A bundle of made-up weights with outlier channels, and what its layers see."""

from __future__ import annotations

from pathlib import Path

import pytest
from dit_export.bundle.write import trace_graphs, unverified

from dit_export.checkpoints import Loaded
from dit_export.checkpoints.scheduler import read_scheduler_config
from dit_export.checkpoints.synthetic import synthetic_dit
from dit_export.networks.spec import ModelSpec
from dit_export.precision.calibrate import Calibration, Plan, calibrate
from dit_export.recipe import Recipe
from dit_runtime.progress import Progress
from tests.once import once

SPEC = ModelSpec(depth=3, hidden=96, heads=3, patch=2, latent_size=8, num_classes=10)
PLAN = Plan(pictures=16, steps=4)


def unverified_bundle(folder: Path, spec: ModelSpec) -> Path:
    loaded = Loaded(spec, synthetic_dit(spec, 0), None, (), read_scheduler_config(None), {"kind": "synthetic"})
    trace_graphs(folder / "traced", loaded, None, Progress())
    unverified(folder / "bundle", folder / "traced", loaded, Recipe(backend="onnxruntime", max_batch=4), Progress())
    return folder / "bundle"


@pytest.fixture(scope="session")
@once
def bundle(tmp_path_factory, one_thread) -> Path:
    """Made-up weights with outlier channels, as large trained models have them."""
    with one_thread():
        return unverified_bundle(tmp_path_factory.mktemp("int8"), SPEC)


@pytest.fixture(scope="session")
@once
def calibration(bundle, tmp_path_factory) -> Calibration:
    return calibrate(bundle, PLAN, lambda done, total: None)

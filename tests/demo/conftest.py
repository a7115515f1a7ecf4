"""The shipped demo's bundle in fp32, built once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_export.bundle.build import build
from dit_export.demo import run, store
from dit_export.recipe import Recipe
from dit_runtime.progress import Progress
from tests.once import once


@pytest.fixture(scope="session")
@once
def demo_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo-fp32") / "bundle"
    recipe = Recipe(checkpoint=str(store.MODEL), max_batch=run.BATCH, backend="onnxruntime", output=str(folder))
    built = build(recipe, Progress())
    assert built.passed and built.sensitive
    return built.folder

"""The portable form of a stage that is built for another backend, to run where no GPU is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from dit_export.graph import onnxfile
from dit_export.passes.attention import masked_attention
from dit_runtime.backends import PORTABLE_BACKEND
from dit_runtime.bundle.records import BEFORE_LOOP, Stage


@contextmanager
def portable(folder: Path, stage: Stage) -> Iterator[Stage]:
    """Yield the stage in a form for ONNX Runtime's CPU. A graph made for it is removed from the folder at the end."""
    form = replace(stage, backend=PORTABLE_BACKEND, engines={})
    opened = stage.runs in (*BEFORE_LOOP, "end")  # a search opens no other stage as it is
    graph = onnxfile.load(folder / stage.onnx) if opened else None
    if graph is None or not masked_attention(graph):
        yield form
        return
    with onnxfile.temporary(graph, folder / f"{stage.name}.portable.onnx") as files:
        yield replace(form, engines={PORTABLE_BACKEND: tuple(file.name for file in files)})

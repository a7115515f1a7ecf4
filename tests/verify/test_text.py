"""The prompt stage beside PyTorch's encoders, on the hand-made bundle and a module of the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from dit_export.networks.text import PromptEncoder
from dit_export.verify import text
from dit_runtime import Pipeline
from dit_runtime.verify import Figure


class Encoders(nn.Module):
    def __init__(self, tables: dict[str, Tensor]) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, ids: Tensor, ids_mask: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.tables["table"][ids], ids_mask.float(), self.tables["table_2"][ids_2].mean(1)


@pytest.fixture
def check(handmade) -> Callable[..., list[Figure]]:
    """Return the figures of `prompt_parity`; `change` may change what the engine gives."""
    bundle = handmade("prompted")
    graph = onnx.load(bundle / "text.onnx").graph
    tables = {weight.name: torch.from_numpy(numpy_helper.to_array(weight).copy()) for weight in graph.initializer}

    def figures(change: Callable[[dict[str, Any]], None] = lambda rows: None) -> list[Figure]:
        with Pipeline.load(bundle, threads=1) as pipe:
            encoder = PromptEncoder(Encoders(tables), pipe.manifest.prompts, ("captions", "mask", "pooled"), {})
            run = pipe.engines.run

            def changed(stage, inputs):
                rows = dict(run(stage, inputs))
                change(rows)
                return rows

            pipe.engines.run = changed
            return list(text.prompt_parity(pipe, encoder))

    return figures


def test_each_port_is_asked_for_another_prompt(check) -> None:
    """Two of the prompts fill all 5 tokens, and the empty one does not."""
    figures = check()
    assert all(figure.passed for figure in figures)
    names = [figure.metric for figure in figures if figure.at_least]
    assert names == [f"{port} of another prompt, rel-L2" for port in ("captions", "mask", "pooled")]


def test_a_mask_that_is_always_full(check, monkeypatch) -> None:
    """A right build passes: no prompt is shorter than its captions."""
    monkeypatch.setattr(text, "TEXTS", tuple(f"{words} red blue no hat" for words in ("cat", "dog", "a")))
    figures = check()
    assert all(figure.passed for figure in figures)
    assert [figure.metric.split()[0] for figure in figures if figure.at_least] == ["captions", "pooled"]


@pytest.mark.parametrize("port", ["captions", "mask", "pooled"])
def test_what_reads_no_prompt_is_seen(check, port) -> None:
    def deaf(rows: dict[str, Any]) -> None:
        rows[port] = np.ones_like(rows[port])

    failed = [figure.metric for figure in check(deaf) if not figure.passed and figure.at_least]
    assert failed == [f"{port} of another prompt, rel-L2"]

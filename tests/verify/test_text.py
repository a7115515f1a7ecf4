"""The prompt stage beside PyTorch's encoders, on the hand-made bundle and a module of the same function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from dit_export.bundle.inputs import NO_INPUTS, with_prompts
from dit_export.checkpoints import Loaded
from dit_export.networks import Network, fixtures
from dit_export.networks.text import PromptEncoder
from dit_export.precision.captions import CAPTIONS, embed
from dit_export.recipe import Recipe
from dit_export.verify import text
from dit_runtime import Pipeline
from dit_runtime.bundle import manifest
from dit_runtime.progress import Progress
from dit_runtime.sampling.process import Process
from dit_runtime.verify import Figure


class Encoders(nn.Module):
    def __init__(self, tables: dict[str, Tensor]) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, ids: Tensor, ids_mask: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.tables["table"][ids], ids_mask.float(), self.tables["table_2"][ids_2].mean(1)


def encoders(bundle: Path) -> PromptEncoder:
    """Return the same in PyTorch as the bundle's stage."""
    graph = onnx.load(bundle / "text.onnx").graph
    tables = {weight.name: torch.from_numpy(numpy_helper.to_array(weight).copy()) for weight in graph.initializer}
    prompts = manifest.read(bundle).prompts
    files = {prompt.tokenizer: (bundle / prompt.tokenizer).read_text() for prompt in prompts}
    return PromptEncoder(Encoders(tables), prompts, ("captions", "mask", "pooled"), files)


@pytest.fixture
def check(handmade) -> Callable[..., list[Figure]]:
    """Return the figures of `prompt_parity`; `change` may change what the engine gives."""
    bundle = handmade("prompted")

    def figures(change: Callable[[dict[str, Any]], None] = lambda rows: None) -> list[Figure]:
        with Pipeline.load(bundle, threads=1) as pipe:
            run = pipe.engines.run

            def changed(stage, inputs):
                rows = dict(run(stage, inputs))
                change(rows)
                return rows

            pipe.engines.run = changed
            return list(text.prompt_parity(pipe, encoders(bundle)))

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


def test_captions_of_ours_calibrate(handmade) -> None:
    """As the bundle itself encodes them; the port that no encoder gives has the fixtures' values."""
    bundle = handmade("prompted")
    contract, encoder = manifest.read(bundle), encoders(bundle)
    network = Network(nn.Identity(), contract.ports, null={"rate": 0.0})
    own = embed(network, encoder)
    with Pipeline.load(bundle, threads=1) as pipe:
        ids, none = pipe.engines.tokenizers(CAPTIONS, whole=False), pipe.engines.tokenizers("", negative=True)
        expected, away = (pipe.engines.encode(rows | {"rate": np.zeros(len(rows["ids"]))}) for rows in (ids, none))
    for name in ("captions", "mask", "pooled"):
        np.testing.assert_allclose(own.condition[name], expected[name], atol=1e-6)
        np.testing.assert_allclose(own.negative[name], away[name], atol=1e-6)
    np.testing.assert_array_equal(own.condition["rate"], fixtures.conditions(network, len(CAPTIONS))["rate"])
    assert own.negative["rate"].tolist() == [0.0]
    loaded = Loaded(network, None, (), Process(), {}, encoder)
    (captions,) = [port.shape for port in network.conditions if port.name == "captions"]
    for precision, count in (("int8", len(CAPTIONS)), ("fp8", len(CAPTIONS)), ("bf16", None)):
        taken = with_prompts(NO_INPUTS, Recipe(precision=precision), loaded, Progress()).prompts
        assert (taken and taken.condition["captions"].shape) == (count and (count, *captions))

"""Bundles of random weights with outlier channels, as large trained models have them, and what their layers see."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from dit_export.bundle.assemble import Assembly
from dit_export.bundle.inputs import Inputs
from dit_export.bundle.tracing import trace_graphs
from dit_export.checkpoints import Loaded
from dit_export.checkpoints.diffusers import read_process
from dit_export.checkpoints.synthetic import synthetic_dit
from dit_export.graph import onnxfile
from dit_export.networks import Network, fixtures
from dit_export.networks.dit import dit_network
from dit_export.networks.families import family_network
from dit_export.networks.spec import ModelSpec
from dit_export.passes.attention import plain_attention
from dit_export.precision.calibrate import Calibration
from dit_export.precision.measure import Plan, measure
from dit_export.precision.prompts import Prompts
from dit_export.precision.search import Search
from dit_export.recipe import Recipe
from dit_runtime import backends
from dit_runtime.backends import Options
from dit_runtime.bundle import manifest
from dit_runtime.conditions.condition import Rows
from dit_runtime.pipeline import Pipeline
from dit_runtime.progress import Progress
from tests.networks import tiny

SPEC = ModelSpec(depth=3, hidden=96, heads=3, patch=2, latent_size=8, num_classes=10)
PLAN = Plan(pictures=16, steps=4)
TOKENS, CHANNELS = 20, 16  # of the prompts of the network with a cross-attention
STRETCH = (8.0, 14.0, 20.0)  # by how much its outlier channels stand out


class Scratch(NamedTuple):
    """A bundle that nothing has verified, in fp32, and its network."""

    folder: Path
    network: Network
    fused: dict[str, gs.Graph]

    def graphs(self) -> dict[str, gs.Graph]:
        """Copy the graphs before the loop, then the denoiser."""
        return {name: graph.copy() for name, graph in self.fused.items() if name != "update"}

    def calibrate(self, plan: Plan, prompts: Prompts | None = None) -> Calibration:
        measured = measure(
            self.folder, self.graphs(), self.network, plan, prompts, layers=True, half=False, on_step=lambda *_: None
        )
        assert measured.calibration is not None and not measured.peaks
        return measured.calibration

    def rows(self) -> Rows:
        """Return a condition and the null one."""
        own, null = fixtures.conditions(self.network, 2), fixtures.null(self.network)
        return {name: np.concatenate([own[name][1:], null[name]]) for name in own}

    def open(self, graphs: Mapping[str, gs.Graph], folder: Path, backend: str, precision: str = "fp32") -> Pipeline:
        """Open graphs in the place of the bundle's; the denoiser on `backend`, in `precision`."""
        contract, engines = manifest.read(self.folder), {}
        for name, graph in graphs.items():
            form = graph.copy()
            if backend == "onnxruntime" or name != contract.step.name:
                plain_attention(form)  # as builds do: it refuses a mask with one row for all queries
            files = [folder / file for file in onnxfile.save(form, folder / f"{name}.onnx")]
            if name == contract.step.name:
                engines[name] = backends.backend(backend).open(files, Options(threads=1, precision=precision))
            else:
                engines[name] = backends.backend("onnxruntime").open(files, Options(threads=1))
        return Pipeline(self.folder, contract, engines)


def scratch(folder: Path, network: Network, prediction: str | None = None) -> Scratch:
    process = read_process(None, network.learned_variance, prediction)
    loaded = Loaded(network, None, (), process, {"kind": "synthetic"})
    recipe, traced = Recipe(backend="onnxruntime", max_batch=4), folder.with_name("traced")
    trace_graphs(traced, loaded, None, Progress())
    folder.mkdir()
    assembly = Assembly(folder, traced, loaded, None, recipe, "onnxruntime", Progress())
    contract = assembly.run()
    manifest.write(folder, replace(contract, files=manifest.describe_files(folder)))
    return Scratch(folder, network, assembly.graphs)


@contextmanager
def open_search(folder: Path, bundle: Scratch, calibration: Calibration, backend: str) -> Iterator[Search]:
    """Open the search of an int8 bundle of the same network; `backend` is the one that it says to be for."""
    folder.mkdir()
    built_for = backend if backend in backends.CPU else "onnxruntime"
    process = read_process(None, bundle.network.learned_variance)
    loaded = Loaded(bundle.network, None, (), process, {"kind": "synthetic"})
    recipe = Recipe(precision="int8", backend=built_for, max_batch=4)
    traced, inputs = bundle.folder.with_name("traced"), Inputs(calibration)
    assembly = Assembly(folder, traced, loaded, None, recipe, built_for, Progress(io.StringIO()), inputs=inputs)
    contract = assembly.run()
    stages = (
        replace(stage, backend=backend, engines={}) if backend != built_for else stage for stage in contract.stages
    )
    smoothed = assembly.once_more().smoothed
    assert smoothed is not None
    own = replace(contract, stages=tuple(stages))
    with Search(folder, own, smoothed, bundle.network, lambda done, total: None) as search:
        yield search


def outlying_pixart() -> torch.nn.Module:
    """Return a PixArt in which three channels stand out where layers read it."""
    transformer = tiny.pixart(caption_channels=CHANNELS)
    width = transformer.inner_dim
    channels, s = torch.tensor([5, 23, 61]), torch.tensor(STRETCH)
    shared = transformer.adaln_single.linear
    for row in (0, 1, 3, 4):  # shift and scale of both branches
        shared.weight[row * width + channels] *= s[:, None]
        shared.bias[row * width + channels] *= s
    for row in (2, 5):  # gates: a branch adds less than it reads, as in a trained network
        shared.weight[row * width : (row + 1) * width] *= 0.3
        shared.bias[row * width : (row + 1) * width] *= 0.3
    for block in transformer.transformer_blocks:
        block.scale_shift_table[[2, 5]] *= 0.3
        block.attn2.to_q.weight *= 0.2  # it reads the residual stream as it is, and attends to more than one token
        table = block.scale_shift_table
        for shift, scale in ((0, 1), (3, 4)):
            table[shift, channels] *= s
            table[scale, channels] = s * (1 + table[scale, channels]) - 1
        for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.ff.net[0].proj):
            linear.weight[:, channels] /= s
        for attention in (block.attn1, block.attn2):
            attention.to_v.weight[channels] *= s[:, None]
            attention.to_v.bias[channels] *= s
            attention.to_out[0].weight[:, channels] /= s
    return transformer


@pytest.fixture(scope="session")
def bundle(tmp_path_factory, one_thread) -> Scratch:
    """A class-conditional DiT."""
    with one_thread():
        return scratch(tmp_path_factory.mktemp("int8") / "bundle", dit_network(synthetic_dit(SPEC, 0)))


@pytest.fixture(scope="session")
def captioned(tmp_path_factory, one_thread) -> Scratch:
    """A PixArt, whose q, k and v are layers of their own, with prompts of up to 20 tokens x 16."""
    with one_thread():
        network = family_network(outlying_pixart(), (8, 8), TOKENS)
        return scratch(tmp_path_factory.mktemp("captioned") / "bundle", network)


@pytest.fixture(scope="session")
def calibration(bundle) -> Calibration:
    return bundle.calibrate(PLAN)


@pytest.fixture(scope="session")
def captioned_calibration(captioned) -> Calibration:
    return captioned.calibrate(PLAN)

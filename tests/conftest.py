"""Checkpoints with random but sensitive weights, and the bundles that `dit-export build` makes of them, once a session.

Nothing here uses the exporter but its command line: the checkpoints are written from public facts (diffusers' own
classes, the names of Meta's keys), so that the tests which compare with them are independent judges.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.once import is_shared, made_once, once

# The default tests load nothing: what would ask a registry or a hub fails instead, in child processes too.
os.environ |= {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker a core

HIDDEN, HEADS, PATCH, CHANNELS, LATENT = 64, 4, 2, 4, 8
DIFFUSERS_DEPTH, META_DEPTH, META_CLASSES = 3, 2, 12
NAMES = [f"thing {number}, item {number}" for number in range(1000)]
NAMES[207] = "golden retriever"
NAMES[360] = "otter, river dog"
MODULATION = 0.04  # of adaLN's linears: another label moves the prediction, and guidance 4 does not blow it up
STREAM = 0.02  # size of Meta's residual stream: so small that LayerNorm's eps can be seen
META_NAMES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay", "koi", "lynx"]


# Files and tests that build, compile or train by themselves, or get a bundle by its fixture's name.
BUILDS = (
    "bench/test_conditionings.py",
    "cpp/",
    "demo/",
    "families/",
    "gpu/test_check.py::test_a_dry_run",
    "networks/test_trace.py",
    "passes/test_sizes.py",
    "precision/",
    "runtime/test_loops.py::test_both_loops_draw_the_same",
    "tensorrt/test_compile.py",
    "tensorrt/test_conditionings.py",
    "tensorrt/test_int8.py",
    "test_against_diffusers.py",
    "test_against_sit.py",
    "test_build.py",
    "test_conditionings.py",
    "test_custom_network.py",
    "test_examples.py",
    "test_pixart.py",
    "test_precisions.py",
    "test_readme.py",
    "verify/test_networks.py",
    "verify/test_report.py::test_a_browser_shows_it",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that build: those that use shared bundles, and those above."""
    for item in items:
        if is_shared(item) or item.nodeid.removeprefix("tests/").startswith(BUILDS):
            item.add_marker(pytest.mark.builds)


class Built(NamedTuple):
    checkpoint: Path
    bundle: Path


@pytest.fixture(scope="session")
def one_thread():
    """Runs PyTorch on one thread: for models this small a second gains nothing, and on a busy machine both spin."""
    import torch

    @contextmanager
    def limited():
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)

    return limited


@pytest.fixture(scope="session")
@once
def own_embedders(tmp_path_factory, one_thread) -> Built:
    """A DiTPipeline with DDIM whose blocks each have their own timestep and label embedders, and its bundle."""
    from diffusers import DDIMScheduler

    folder = tmp_path_factory.mktemp("own-embedders")
    save_pipeline(folder / "checkpoint", DDIMScheduler(clip_sample=False, timestep_spacing="leading"), shared=False)
    with one_thread():
        return build(folder)


@pytest.fixture(scope="session")
@once
def shared_embedders(tmp_path_factory, one_thread) -> Built:
    """A DiTPipeline with DPM-Solver++ and class names, whose blocks hold copies of one embedder, and its bundle."""
    from diffusers import DPMSolverMultistepScheduler

    folder = tmp_path_factory.mktemp("shared-embedders")
    save_pipeline(folder / "checkpoint", DPMSolverMultistepScheduler(), shared=True)
    # As in facebook/DiT-XL-2-256: the pipeline's own save_pretrained does not keep the names.
    index = folder / "checkpoint" / "model_index.json"
    table = json.loads(index.read_text()) | {"id2label": {str(number): name for number, name in enumerate(NAMES)}}
    index.write_text(json.dumps(table))
    with one_thread():
        return build(folder)


@pytest.fixture(scope="session")
def narrow(shared_embedders, tmp_path_factory, one_thread) -> Callable[[str, str], Path]:
    """The bundle of the shared embedders' checkpoint in a precision, for a backend; each is built once."""

    def make(precision: str, backend: str) -> Path:
        built = tmp_path_factory.mktemp("narrow") / f"{precision}-{backend}"
        options = ["--precision", precision, "--backend", backend, "--max-batch", "2", "-o", str(built)]
        with one_thread():
            build(shared_embedders.checkpoint.parent, "checkpoint", *options)
        return built

    return lambda *which: made_once(tmp_path_factory, f"narrow {which}", lambda: make(*which))


@pytest.fixture(scope="session")
@once
def meta(tmp_path_factory, one_thread) -> Built:
    """A training checkpoint as Meta's code writes it, of a size in no table, and its bundle without a decoder."""
    import torch

    folder = tmp_path_factory.mktemp("meta")
    noise = {"x_embedder.proj.weight": torch.zeros(1)}  # `ema` must win over what stands under `model`
    torch.save({"ema": meta_state(), "model": noise}, folder / "checkpoint.pt")
    (folder / "labels.txt").write_text("\n".join(META_NAMES))
    options = ["--heads", str(HEADS), "--latents-only", "--labels", str(folder / "labels.txt"), "--max-batch", "4"]
    with one_thread():
        return build(folder, "checkpoint.pt", *options)


@pytest.fixture(scope="session")
@once
def velocity(tmp_path_factory, one_thread) -> Built:
    """SiT's: the same names and shapes, a velocity of t in [0, 1], and as many channels again that nobody reads."""
    import torch

    folder = tmp_path_factory.mktemp("velocity")
    state = meta_state()
    state["t_embedder.mlp.0.weight"][:, 128:] *= 10  # the sines of so small a t are small
    torch.save({"ema": state}, folder / "checkpoint.pt")
    options = ["--heads", str(HEADS), "--latents-only", "--prediction", "velocity", "--max-batch", "4"]
    with one_thread():
        return build(folder, "checkpoint.pt", *options)


@pytest.fixture(scope="session")
@once
def pixart(tmp_path_factory, one_thread) -> Built:
    """PixArt-alpha without its text encoder, and its bundle for captions of up to 120 tokens x 32."""
    from tests.pixart import build as build_pixart
    from tests.pixart import save

    folder = tmp_path_factory.mktemp("pixart")
    built = Built(folder / "checkpoint", folder / "bundle")
    with one_thread():
        save(built.checkpoint)
        assert build_pixart(*built) == 0
    return built


@pytest.fixture(scope="session")
def handmade(tmp_path_factory) -> Callable[[str], Path]:
    """Bundles of hand-made graphs, by kind (make_bundle.py): no toolchain, and no time to draw; each is made once."""
    from tests.handmade import module

    folder = tmp_path_factory.mktemp("handmade")

    @functools.cache
    def bundle(kind: str) -> Path:
        module("make_bundle").make(folder / kind, kind)
        return folder / kind

    return bundle


@pytest.fixture(scope="session")
def captioned(handmade) -> Path:
    """The one that draws by captions of up to 5 tokens x 3."""
    return handmade("captioned")


@pytest.fixture
def meta_copy(meta, tmp_path) -> Path:
    """The small bundle, to be damaged."""
    return Path(shutil.copytree(meta.bundle, tmp_path / "bundle"))


@pytest.fixture
def listing() -> Callable[[Path], list[tuple[str, int, int]]]:
    """Name, size and time of all that is in a folder: equal before and after where nothing was written."""

    def listed(folder: Path) -> list[tuple[str, int, int]]:
        paths = sorted(folder.rglob("*"))
        return [(str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths]

    return listed


def build(folder: Path, checkpoint: str = "checkpoint", *options: str) -> Built:
    from dit_export.cli import main

    built = Built(folder / checkpoint, folder / "bundle")
    command = ["build", "--checkpoint", str(built.checkpoint), "--backend", "onnxruntime", "-o", str(built.bundle)]
    assert main([*command, *options]) == 0
    return built


def save_pipeline(folder: Path, scheduler, shared: bool) -> None:
    import torch
    from diffusers import DiTPipeline, DiTTransformer2DModel

    from tests.pixart import small_vae

    torch.manual_seed(1 + shared)
    transformer = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HIDDEN // HEADS,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=DIFFUSERS_DEPTH,
        sample_size=LATENT,
        patch_size=PATCH,
        num_embeds_ada_norm=1000,  # DiTPipeline has the null label 1000 in its code
        norm_eps=1e-5 if shared else 0.5,  # diffusers' default, and one that a reader who ignores it would show
    )
    basis = _basis()
    with torch.no_grad():
        transformer.pos_embed.proj.weight.copy_(4 * basis.reshape(HIDDEN, CHANNELS, PATCH, PATCH))
        for block in transformer.transformer_blocks:
            block.norm1.emb.class_embedder.embedding_table.weight.normal_()
            block.norm1.linear.weight.normal_(std=MODULATION)
            block.norm1.linear.bias.normal_(std=0.3)
            if shared:
                block.norm1.emb.load_state_dict(transformer.transformer_blocks[0].norm1.emb.state_dict())
        transformer.proj_out_1.weight.normal_(std=0.3 * MODULATION)
        transformer.proj_out_2.weight.copy_(_readout(basis))
    vae = small_vae(sample_size=8 * LATENT)
    DiTPipeline(transformer, vae, scheduler).save_pretrained(folder)


def meta_state(seed: int = 5) -> dict:
    """Random weights under the names of facebookresearch/DiT; the latents come back in the prediction."""
    import torch

    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=random) * std

    def linear(name: str, rows: int, columns: int, std: float | None = None) -> dict[str, torch.Tensor]:
        std = 1 / math.sqrt(columns) if std is None else std
        return {f"{name}.weight": normal(rows, columns, std=std), f"{name}.bias": normal(rows, std=0.2)}

    basis = _basis()
    state = {
        # Not the fixed sin-cos table: a reader that ignores the file's own one would be seen.
        "pos_embed": normal(1, (LATENT // PATCH) ** 2, HIDDEN, std=0.5 * STREAM),
        "x_embedder.proj.weight": 4 * STREAM * basis.reshape(HIDDEN, CHANNELS, PATCH, PATCH),
        "x_embedder.proj.bias": normal(HIDDEN, std=0.2 * STREAM),
        "y_embedder.embedding_table.weight": normal(META_CLASSES + 1, HIDDEN, std=1.0),
        **linear("t_embedder.mlp.0", HIDDEN, 256),
        **linear("t_embedder.mlp.2", HIDDEN, HIDDEN),
        **linear("final_layer.adaLN_modulation.1", 2 * HIDDEN, HIDDEN, std=0.3 * MODULATION),
        "final_layer.linear.weight": _readout(basis),
        "final_layer.linear.bias": normal(PATCH * PATCH * 2 * CHANNELS, std=0.1),
    }
    for n in range(META_DEPTH):
        state |= linear(f"blocks.{n}.adaLN_modulation.1", 6 * HIDDEN, HIDDEN, std=MODULATION)
        state |= linear(f"blocks.{n}.attn.qkv", 3 * HIDDEN, HIDDEN)
        state |= linear(f"blocks.{n}.attn.proj", HIDDEN, HIDDEN)
        state |= linear(f"blocks.{n}.mlp.fc1", 4 * HIDDEN, HIDDEN)
        state |= linear(f"blocks.{n}.mlp.fc2", HIDDEN, 4 * HIDDEN)
        for name in ("attn.proj", "mlp.fc2"):
            state[f"blocks.{n}.{name}.weight"] *= STREAM
            state[f"blocks.{n}.{name}.bias"] *= STREAM
    return state


def _basis():
    """Orthonormal columns: a patch's 16 numbers each get a direction of the hidden space."""
    import torch

    random = torch.Generator().manual_seed(3)
    return torch.linalg.qr(torch.randn(HIDDEN, CHANNELS * PATCH**2, generator=random))[0].contiguous()


def _readout(basis):
    """Rows (p, q, C): the first half reads the latents back (so sampling stays bounded), the variance is random."""
    import torch

    latents = basis.reshape(HIDDEN, CHANNELS, PATCH, PATCH).permute(2, 3, 1, 0)  # (p, q, C, D)
    random = torch.Generator().manual_seed(4)
    variance = torch.randn(latents.shape, generator=random) / math.sqrt(HIDDEN)
    return torch.cat([0.8 * latents, 0.5 * variance], dim=2).reshape(-1, HIDDEN)

"""A network that the package has never seen, declared here alone: built, verified and sampled as any other.

It has a state of three dimensions that is no picture, a condition `style` that modulates the tokens together with the
timestep, and a condition `notes` of another width that enters by a cross-attention, with a mask.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_export.bundle.build import build
from dit_export.checkpoints import Loaded
from dit_export.cli import main
from dit_export.networks import Network
from dit_export.networks.text import PromptEncoder
from dit_export.recipe import Recipe
from dit_runtime import Pipeline, UsageError
from dit_runtime import cli as runtime
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Port
from dit_runtime.progress import Progress
from dit_runtime.sampling.process import Process

CHANNELS, FRAMES, BANDS = 3, 4, 6  # of the state
WIDTH, HEADS, DEPTH = 48, 4, 2
STYLE, NOTES, NOTE = 10, 7, 20  # a style has 10 numbers; there are up to 7 notes of 20 numbers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.query, self.key_value, self.out = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(NOTE, 2 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, condition: Tensor, notes: Tensor, bias: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(condition))[:, None].chunk(3, dim=-1)
        x = x + gate * self.proj(attend(*self.qkv(self.norm(x) * (1 + scale) + shift).chunk(3, dim=-1)))
        x = x + self.out(attend(self.query(x), *self.key_value(notes).chunk(2, dim=-1), bias))
        return x + self.mlp(self.norm(x))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
    if bias is not None:
        bias = bias[:, None, None, :].expand(-1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


class Spectrogram(nn.Module):
    """A denoiser of spectrograms: a token is a frame with all its bands."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Linear(CHANNELS * BANDS, WIDTH), nn.Linear(WIDTH, CHANNELS * BANDS)
        self.time, self.style = nn.Linear(32, WIDTH), nn.Linear(STYLE, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.register_buffer("frequencies", torch.exp(-math.log(1e4) * torch.arange(16) / 16))

    def forward(self, sound: Tensor, t: Tensor, style: Tensor, notes: Tensor, heard: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        condition = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.style(style)
        x = self.tokens(sound.permute(0, 2, 1, 3).flatten(2))  # (N, frames, D)
        for block in self.blocks:
            x = block(x, condition, notes, (heard - 1) * 1e4)
        return self.head(x).unflatten(2, (CHANNELS, BANDS)).permute(0, 2, 1, 3)


def network() -> Network:
    torch.manual_seed(0)
    return Network(
        Spectrogram().eval().requires_grad_(False),
        ports=(
            Port("sound", "state", "float32", (CHANNELS, FRAMES, BANDS)),
            Port("t", "time", "float32", ()),
            Port("style", "condition", "float32", (STYLE,)),
            Port("notes", "condition", "float32", (NOTES, NOTE)),
            Port("heard", "condition", "float32", (NOTES,), masks="notes"),
        ),
        model={"name": "spectrogram"},
    )


def condition(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    heard = (np.arange(NOTES) < np.array([[NOTES], [3], [5]][:count])).astype(np.float32)
    style, notes = random.normal(size=(count, STYLE)), random.normal(size=(count, NOTES, NOTE))
    return {"style": style.astype(np.float32), "notes": notes.astype(np.float32), "heard": heard}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, one_thread) -> Path:
    folder = tmp_path_factory.mktemp("custom") / "bundle"
    with one_thread():
        loaded = Loaded(network(), None, (), Process(), {"kind": "python"})
        built = build(Recipe(backend="onnxruntime", output=str(folder)), Progress(), loaded=loaded)
    assert built.passed and built.sensitive
    return folder


def expected(count: int, steps: int, guidance: float, seed: int) -> np.ndarray:
    """DDIM by hand, in PyTorch."""
    model, own, null = network().module, condition(count), condition(1, seed=9)
    tensors = {name: torch.from_numpy(rows) for name, rows in own.items()}
    nulls = {name: torch.from_numpy(np.repeat(rows, count, axis=0)) for name, rows in null.items()}
    levels = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    x = torch.randn(count, CHANNELS, FRAMES, BANDS, generator=torch.Generator().manual_seed(seed)).double()
    times = list(range(0, 1000, 1000 // steps))[::-1]
    for t, after in zip(times, [*times[1:], None], strict=True):
        with torch.no_grad():
            first, last = (
                model(x.float(), torch.full((count,), float(t)), **rows).double() for rows in (tensors, nulls)
            )
        epsilon = last + guidance * (first - last)
        level, next_level = levels[t], levels[after] if after is not None else torch.tensor(1.0, dtype=torch.float64)
        clean = (x - (1 - level).sqrt() * epsilon) / level.sqrt()
        x = next_level.sqrt() * clean + (1 - next_level).sqrt() * epsilon
    return x.numpy()


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def test_its_stages_follow_from_dependence(bundle) -> None:
    contract = manifest.read(bundle)
    runs = {stage.runs: stage for stage in contract.stages}
    assert runs.keys() == {"condition", "time+condition", "step", "update"}
    (vectors,) = runs["time+condition"].gives
    assert vectors.shape == ("rows", 3 * DEPTH, WIDTH)  # a shift, a gain and a gate a block
    assert {spec.name for spec in runs["condition"].reads} <= {"style", "notes", "heard"}


def test_the_gate_without_its_weights(bundle, capsys) -> None:
    assert main(["verify", str(bundle)]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "a program's own network" in line and f"run `dit-export regress {bundle}`" in line
    assert main(["regress", str(bundle), "--threads", "1"]) == 0


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_it_samples_as_pytorch(bundle, backend, tmp_path, monkeypatch) -> None:
    wanted = expected(3, 10, 2.5, 4)
    folder = bundle if backend == "onnxruntime" else compiled(bundle, tmp_path, backend)
    with Pipeline.load(folder, threads=1) as pipe:
        options = {"steps": 10, "guidance": 2.5, "seed": 4, "output": "latents"}
        got = pipe.sample(condition=condition(3), negative=condition(1, seed=9), **options)
        assert error(got, wanted) <= 1e-4  # fp32 sums in another order, ten steps long
        other = pipe.sample(condition=condition(3, seed=1), negative=condition(1, seed=9), **options)
    assert error(other, wanted) > 1e-2


def compiled(bundle: Path, tmp_path: Path, backend: str) -> Path:
    import shutil

    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    assert runtime.main(["compile", str(folder), "--backend", backend, "--threads", "1"]) == 0
    return folder


def test_a_constant_in_the_place_of_a_negative_prompt(tmp_path) -> None:
    text = PromptEncoder(nn.Identity(), (), ("style",), {})
    guided = replace(network(), null={"style": 0.0})
    loaded = Loaded(guided, None, (), Process(), {"kind": "python"}, text)
    with pytest.raises(UsageError, match="null has a constant for style, which the text encoders give"):
        build(Recipe(backend="onnxruntime", output=str(tmp_path / "x")), Progress(), loaded=loaded)

"""Latents of a Meta-style .pt against a reference written here from the paper's equations and Meta's key names."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from dit_export.cli import main
from dit_runtime import Pipeline

# Two fp32 programs, each summing in its own order, over ten steps: measured 4e-7 to 4e-6, the rest is room for other
# CPUs' kernels. The issue asks for 1e-4; the least wrong detail below (erf for tanh in GELU) is worth 4e-4.
LATENTS_RTOL = 3e-5
DEPTH, HIDDEN, HEADS, PATCH, CHANNELS, LATENT, CLASSES = 2, 64, 4, 2, 4, 8, 12  # what the fixture `meta` has made
LABELS = [3, 7, 11]


class Detail:
    """The details of the forward pass that are easy to get wrong; Meta's values."""

    frequencies = 128
    eps = 1e-6
    gelu = "tanh"
    null = CLASSES
    guided = 3


def forward(w: dict, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, detail: type = Detail) -> torch.Tensor:
    """DiT with adaLN-Zero, and the variance's channels."""

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def modulated(value: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(value, (HIDDEN,), eps=detail.eps) * (1 + scale[:, None]) + shift[:, None]

    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / detail.frequencies)
    embedded = torch.cat([angles.cos(), angles.sin()], dim=1)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", embedded)))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][labels])
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=PATCH)
    h = h.flatten(2).transpose(1, 2) + w["pos_embed"]
    for n in range(DEPTH):
        block = f"blocks.{n}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{block}.adaLN_modulation.1", c).chunk(6, dim=1)
        q, k, v = linear(f"{block}.attn.qkv", modulated(h, shift1, scale1)).chunk(3, dim=2)
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
        attention = torch.softmax(q @ k.mT / math.sqrt(HIDDEN // HEADS), dim=-1) @ v
        h = h + gate1[:, None] * linear(f"{block}.attn.proj", attention.transpose(1, 2).flatten(2))
        mlp = F.gelu(linear(f"{block}.mlp.fc1", modulated(h, shift2, scale2)), approximate=detail.gelu)
        h = h + gate2[:, None] * linear(f"{block}.mlp.fc2", mlp)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    out = linear("final_layer.linear", modulated(h, shift, scale))
    side = LATENT // PATCH
    out = out.reshape(len(x), side, side, PATCH, PATCH, 2 * CHANNELS)
    return torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), 2 * CHANNELS, LATENT, LATENT)


def prediction(w: dict, x: torch.Tensor, t: float, labels: torch.Tensor, detail: type = Detail) -> torch.Tensor:
    return forward(w, x, torch.tensor([float(t)]), labels, detail)[:, :CHANNELS]


@torch.no_grad()
def ddim(w: dict, labels: list[int], guidance: float, seed: int, steps: int, detail: type = Detail) -> np.ndarray:
    """Meta's ddim10: timesteps 900, 800 … 0, no clipping, guidance on three channels."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    shape = (len(labels), CHANNELS, LATENT, LATENT)
    x = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
    y, null = torch.tensor(labels), torch.full((len(labels),), detail.null)
    for t in range(1000 - 1000 // steps, -1, -1000 // steps):
        own = prediction(w, x, t, y, detail)
        other = prediction(w, x, t, null, detail)
        guided = other + guidance * (own - other)
        eps = torch.cat([guided[:, : detail.guided], own[:, detail.guided :]], dim=1)
        now, after = alpha_bar[t], alpha_bar[t - 1000 // steps] if t >= 1000 // steps else 1.0
        x0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
        x = math.sqrt(after) * x0 + math.sqrt(1 - after) * eps
    return x.numpy()


@pytest.fixture(scope="module")
def weights(meta) -> dict[str, torch.Tensor]:
    return torch.load(meta.checkpoint, weights_only=True)["ema"]


@pytest.fixture(scope="module")
def bundle(meta, one_thread):
    with one_thread(), Pipeline.load(meta.bundle, threads=1) as pipe:
        yield pipe


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("labels", [LABELS[:1], LABELS])
def test_latents_after_ten_ddim_steps(bundle, weights, guidance, labels):
    expected = ddim(weights, labels, guidance, seed=42, steps=10)
    got = bundle.sample(labels, steps=10, guidance=guidance, seed=42, output="latents")
    assert got.shape == expected.shape and 0.1 < expected.std() < 10  # neither died nor exploded
    assert distance(got, expected) < LATENTS_RTOL


def test_guidance_below_one_is_guidance(bundle, weights):
    """In Meta's dialect only exactly 1 goes without the null label; diffusers' would drop it here."""
    expected = ddim(weights, LABELS, 0.5, seed=1, steps=10)
    got = bundle.sample(LABELS, steps=10, guidance=0.5, seed=1, output="latents")
    assert distance(got, expected) < LATENTS_RTOL


@pytest.mark.parametrize(
    "wrong",
    [{"frequencies": 127}, {"eps": 1e-5}, {"gelu": "none"}, {"null": 0}, {"guided": CHANNELS}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_detail_would_be_seen(bundle, weights, wrong):
    """The weights are sensitive enough that each detail matters ten times the tolerance."""
    expected = ddim(weights, LABELS, 4.0, seed=42, steps=10, detail=type("Wrong", (Detail,), wrong))
    got = bundle.sample(LABELS, steps=10, guidance=4.0, seed=42, output="latents")
    assert distance(got, expected) > 10 * LATENTS_RTOL


def test_another_label_is_another_latent(bundle, weights):
    expected = ddim(weights, LABELS, 4.0, seed=42, steps=10)
    for other in ([4, 7, 11], [3, 8, 11], [3, 7, 10]):
        got = bundle.sample(other, steps=10, guidance=4.0, seed=42, output="latents")
        changed = [distance(*pair) for pair in zip(got, expected, strict=True)]
        assert [error > 0.1 for error in changed] == [a != b for a, b in zip(other, LABELS, strict=True)]


def test_latents_only_leaves_the_decoder_out(meta, bundle, capsys):
    assert not list(meta.bundle.glob("decoder*"))
    assert main(["inspect", str(meta.bundle)]) == 0
    assert "decoder" not in capsys.readouterr().out.lower().replace("no decoder", "")
    with pytest.raises(Exception, match="no decoder"):
        bundle.sample([0], steps=1)


def test_heads_must_be_told_for_a_size_in_no_table(meta, tmp_path, capsys):
    target = tmp_path / "bundle"
    assert main(["build", "--checkpoint", str(meta.checkpoint), "--latents-only", "-o", str(target)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "--heads" in line and not list(tmp_path.iterdir())


def test_the_denoiser_holds_no_weight_of_the_conditioning(meta):
    """Hoisting moved the embedders and every adaLN linear out: none of their shapes, either way round, is left."""
    weights = onnx.load(meta.bundle / "denoiser.onnx", load_external_data=False).graph.initializer
    shapes = {tuple(sorted(weight.dims)) for weight in weights}
    assert shapes & {(HIDDEN, 3 * HIDDEN)}  # qkv is there
    assert not shapes & {(HIDDEN, 6 * HIDDEN), (HIDDEN, 2 * HIDDEN), (CLASSES + 1, HIDDEN)}

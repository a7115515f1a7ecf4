"""Bare weight files: Meta's keys against a forward written from the paper's facts, and what is refused."""

import argparse
import json
import math
import os

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dit_export.spec import Recipe
from dit_export.weights import files, keys, load
from dit_runtime.errors import UsageError

DEPTH, D, HEADS, P, SIDE, CLASSES = 2, 64, 4, 2, 8, 10
T = (SIDE // P) ** 2


def meta_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under which every input and every tensor is heard."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"x_embedder.proj": (D, 4, P, P), "t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D)}
    for n in range(DEPTH):
        shapes |= {f"blocks.{n}.attn.qkv": (3 * D, D), f"blocks.{n}.attn.proj": (D, D)}
        shapes |= {f"blocks.{n}.mlp.fc1": (4 * D, D), f"blocks.{n}.mlp.fc2": (D, 4 * D)}
        shapes |= {f"blocks.{n}.adaLN_modulation.1": (6 * D, D)}
    shapes |= {"final_layer.linear": (P * P * 8, D), "final_layer.adaLN_modulation.1": (2 * D, D)}
    state = {"pos_embed": torch.randn(1, T, D, generator=random)}  # not the sin-cos table: a trained one must count
    state["y_embedder.embedding_table.weight"] = torch.randn(CLASSES + 1, D, generator=random)
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=random) / math.sqrt(math.prod(shape[1:]))
        state[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=random)
    return state


def reference(w, x, t, y):
    """DiT's forward, straight from its description."""

    def linear(v, name):
        return F.linear(v, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    x = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=P).flatten(2).mT + w["pos_embed"]
    angles = t[:, None] * 10000 ** (-torch.arange(128) / 128)
    c = linear(F.silu(linear(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y])
    for n in range(DEPTH):
        b1, s1, g1, b2, s2, g2 = linear(c, f"blocks.{n}.adaLN_modulation.1")[:, None].chunk(6, -1)
        q, k, v = linear(norm(x) * (1 + s1) + b1, f"blocks.{n}.attn.qkv").view(-1, T, 3, HEADS, D // HEADS).unbind(2)
        scores = torch.einsum("nihd,njhd->nhij", q, k) / math.sqrt(D // HEADS)
        mixed = torch.einsum("nhij,njhd->nihd", scores.softmax(-1), v).flatten(2)
        x = x + g1 * linear(mixed, f"blocks.{n}.attn.proj")
        inner = F.gelu(linear(norm(x) * (1 + s2) + b2, f"blocks.{n}.mlp.fc1"), approximate="tanh")
        x = x + g2 * linear(inner, f"blocks.{n}.mlp.fc2")
    shift, scale = linear(c, "final_layer.adaLN_modulation.1")[:, None].chunk(2, -1)
    x = linear(norm(x) * (1 + scale) + shift, "final_layer.linear").view(-1, SIDE // P, SIDE // P, P, P, 8)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, 8, SIDE, SIDE)


def inputs():
    x = torch.randn(3, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.0, 517.5, 999.0]), torch.tensor([3, CLASSES, 0])


def distance(got, expected) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def bare(path, **fields):
    return load(Recipe(checkpoint=str(path), latents_only=True, heads=HEADS, **fields))


def saved(content, path):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def test_forward_is_metas(tmp_path):
    state = meta_state()
    loaded = bare(saved(state, tmp_path / "dit.pt"))
    spec = loaded.spec
    assert (spec.depth, spec.hidden, spec.heads, spec.patch, spec.latent_size) == (DEPTH, D, HEADS, P, SIDE)
    assert (spec.num_classes, spec.learned_variance, spec.frequency_shift, spec.guided_channels) == (
        CLASSES,
        True,
        0,
        3,
    )
    expected = reference(state, *inputs())
    # Two orders of float32 sums over two blocks; angles up to 999 keep 6e-5 of absolute error.
    assert distance(loaded.model(*inputs()), expected) < 2e-5
    for name in state:  # each tensor is heard, or the line above proves little
        moved = state | {name: state[name] * 1.05}
        assert distance(reference(moved, *inputs()), expected) > 2e-4, name
    assert not loaded.model.training and not any(weight.requires_grad for weight in loaded.model.parameters())
    assert loaded.source["sha256"].keys() == {"dit.pt"} and json.dumps(loaded.source)


@pytest.mark.parametrize("wrap", ["plain", "model", "ema"])
@pytest.mark.parametrize("zipped", [True, False])
def test_containers(tmp_path, wrap, zipped):
    """ema before model; the zip and the older format of torch.save; beside what Meta's training script saves."""
    state, other = meta_state(), meta_state(7)
    content = {"plain": state, "model": {"model": state}, "ema": {"model": other, "ema": state}}[wrap]
    if wrap != "plain":
        content |= {"args": argparse.Namespace(lr=1e-4), "opt": {"step": 3}}
    torch.save(content, tmp_path / "dit.pt", _use_new_zipfile_serialization=zipped)
    model = bare(tmp_path / "dit.pt").model
    assert torch.equal(model.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])


def test_half_precision_safetensors(tmp_path):
    state = {name: tensor.half() for name, tensor in meta_state().items()}
    model = bare(saved(state, tmp_path / "dit.safetensors")).model
    assert all(weight.dtype == torch.float32 for weight in model.state_dict().values())
    assert torch.equal(model.positions, state["pos_embed"].float())


def test_write_is_the_reverse_of_read(tmp_path):
    state = meta_state()
    written = keys.write(bare(saved(dict(state), tmp_path / "dit.pt")).model, keys.META)
    assert written.keys() == state.keys() and all(torch.equal(written[name], state[name]) for name in state)


def test_a_velocity_is_the_first_half_of_the_channels(tmp_path):
    """SiT's checkpoints: the rows of the other half are gone, the rest is the same network."""
    path = saved(meta_state(), tmp_path / "sit.pt")
    whole, loaded = bare(path), bare(path, prediction="velocity")
    assert whole.spec.learned_variance and not loaded.spec.learned_variance
    assert loaded.model.final.linear.weight.shape == (P * P * 4, D)
    # The same sums; a narrower product may take them in another order.
    assert distance(loaded.model(*inputs()), whole.model(*inputs())[:, :4]) < 1e-6
    assert distance(loaded.model(*inputs()), whole.model(*inputs())[:, 4:]) > 0.1
    diffusion = loaded.diffusion
    assert (diffusion.prediction, diffusion.sampler.solver, diffusion.span) == ("velocity", "euler", 1)
    assert (whole.diffusion.prediction, whole.diffusion.span) == ("epsilon", 1000)
    with pytest.raises(UsageError, match="prediction is 'speed'; expected one of epsilon, v_prediction, sample, velo"):
        bare(path, prediction="speed")


def test_without_a_position_table(tmp_path):
    state = meta_state()
    del state["pos_embed"]
    path = saved(state, tmp_path / "dit.pt")
    with pytest.raises(UsageError, match="pass --resolution"):
        bare(path)
    assert bare(path, resolution=64).spec.latent_size == SIDE


def test_heads_are_asked_for(tmp_path):
    path = saved(meta_state(), tmp_path / "dit.pt")
    with pytest.raises(UsageError, match="pass --heads"):
        load(Recipe(checkpoint=str(path), latents_only=True))


@pytest.mark.parametrize(("field", "value"), [("model", "S/2"), ("resolution", 256)])
def test_recipe_and_checkpoint_disagree(tmp_path, field, value):
    path = saved(meta_state(), tmp_path / "dit.pt")
    with pytest.raises(UsageError, match=f"{field} is .*, expected {value}"):
        bare(path, **{field: value})


def test_vae_is_asked_for(tmp_path):
    path = saved(meta_state(), tmp_path / "dit.pt")
    with pytest.raises(UsageError, match=r"--vae .* --latents-only"):
        load(Recipe(checkpoint=str(path), heads=HEADS))


def test_keys_that_do_not_fit(tmp_path):
    state = meta_state()
    state["blocks.1.mlp.fc1.weight"] = torch.zeros(5, D)
    del state["final_layer.linear.bias"]
    state |= {f"extra.{n}": torch.zeros(1) for n in range(12)}
    with pytest.raises(UsageError) as error:
        bare(saved(state, tmp_path / "dit.pt"))
    message = str(error.value)
    assert "final_layer.linear.bias is missing" in message and message.count("extra.") == files.LISTED - 1
    assert message.endswith("and 4 more") and "\n" not in message
    for n in range(12):
        del state[f"extra.{n}"]
    with pytest.raises(UsageError, match=r"blocks.1.mlp.fc1.weight is \[5, 64\], expected \[256, 64\]"):
        bare(saved(state, tmp_path / "dit.pt"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(tmp_path, value):
    state = meta_state()
    state["blocks.0.attn.proj.bias"][5] = value
    with pytest.raises(UsageError, match=r"blocks.0.attn.proj.bias holds NaN or infinite"):
        bare(saved(state, tmp_path / "dit.pt"))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_truncated(tmp_path, suffix, kept):
    path = saved(meta_state(), tmp_path / f"dit{suffix}")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(UsageError, match=f"dit{suffix}: damaged, or not a") as error:
        bare(path)
    assert "\n" not in str(error.value)


class Trap:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_code_is_refused_and_does_not_run(tmp_path):
    marker = tmp_path / "ran"
    path = saved(meta_state() | {"extra": Trap(str(marker))}, tmp_path / "dit.pt")
    with pytest.raises(UsageError, match=r"asks for posix.mkdir, which is code"):
        bare(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the trap works


def test_not_a_dit(tmp_path):
    with pytest.raises(UsageError, match=r"neither x_embedder.* it holds conv.weight"):
        bare(saved({"conv.weight": torch.zeros(1)}, tmp_path / "dit.pt"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"checkpoint": "someone/dit"}, r"someone/dit could not be fetched \(no route\): pass --checkpoint PATH"),
        ({"model": "XL/2"}, "facebook/DiT-XL-2-256 could not be fetched"),
        ({"model": "XL/2", "resolution": 512}, "facebook/DiT-XL-2-512 could not be fetched"),
        ({"model": "S/2"}, "no public weights exist for S/2 .* --checkpoint .* --synthetic"),
        ({"checkpoint": "some/where/dit.pt"}, "no such file or folder"),
        ({"checkpoint": "x.pt", "synthetic": 0}, "both a checkpoint"),
        ({}, "pass a model, --checkpoint"),
    ],
)
def test_nothing_to_load(monkeypatch, fields, said):
    def unreachable(*_, **__):
        raise OSError("no route\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UsageError, match=said) as error:
        load(Recipe(**fields))
    assert "\n" not in str(error.value)


NAMES = [f"thing {n}, item" for n in range(CLASSES)]
SHUFFLED = {str(n): NAMES[n] for n in reversed(range(CLASSES))}


@pytest.mark.parametrize("text", ["\n".join(NAMES) + "\n", json.dumps(NAMES), json.dumps(SHUFFLED)])
def test_labels(tmp_path, text):
    path = saved(meta_state(), tmp_path / "dit.pt")
    (tmp_path / "names").write_text(text)
    assert bare(path, labels=str(tmp_path / "names")).labels == tuple(NAMES)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n".join(NAMES[1:]), "got 9 names, expected 10"),
        (json.dumps([*NAMES, "more"]), "got 11 names, expected 10"),
        (json.dumps({str(n + 1): name for n, name in enumerate(NAMES)}), "class 0 has the name None"),
        ("[1, 2", "cannot be read as JSON"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, text, said):
    path = saved(meta_state(), tmp_path / "dit.pt")
    (tmp_path / "names").write_text(text)
    with pytest.raises(UsageError, match=said):
        bare(path, labels=str(tmp_path / "names"))

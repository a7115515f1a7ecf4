"""Bare weight files: Meta's keys against a forward written from the paper's facts, containers, sizes and labels."""

import argparse
import json

import pytest
import torch
from safetensors.torch import save_file

from dit_export.checkpoints import keys, load
from dit_export.recipe import Recipe
from dit_runtime.errors import UsageError
from tests.conftest import meta_state
from tests.test_against_meta import CHANNELS, CLASSES, DEPTH, HEADS, HIDDEN, LATENT, PATCH, forward


def inputs():
    x = torch.randn(3, CHANNELS, LATENT, LATENT, generator=torch.Generator().manual_seed(1))
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
    spec = loaded.network.module.spec
    assert (spec.depth, spec.hidden, spec.heads, spec.patch, spec.latent_size) == (DEPTH, HIDDEN, HEADS, PATCH, LATENT)
    assert (spec.num_classes, spec.learned_variance, spec.frequency_shift, spec.guided_channels) == (
        CLASSES,
        True,
        0,
        3,
    )
    expected = forward(state, *inputs())
    # Two orders of float32 sums over two blocks; angles up to 999 keep 6e-5 of absolute error.
    assert distance(loaded.network.module(*inputs()), expected) < 2e-5
    for name in state:  # each tensor is heard, or the line above proves little
        moved = state | {name: state[name] * 1.05}
        assert distance(forward(moved, *inputs()), expected) > 2e-4, name
    assert not loaded.network.module.training and not any(
        weight.requires_grad for weight in loaded.network.module.parameters()
    )
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
    model = bare(tmp_path / "dit.pt").network.module
    assert torch.equal(model.blocks[1].attn.qkv.weight, state["blocks.1.attn.qkv.weight"])


def test_half_precision_safetensors(tmp_path):
    state = {name: tensor.half() for name, tensor in meta_state().items()}
    model = bare(saved(state, tmp_path / "dit.safetensors")).network.module
    assert all(weight.dtype == torch.float32 for weight in model.state_dict().values())
    assert torch.equal(model.positions, state["pos_embed"].float())


def test_write_is_the_reverse_of_read(tmp_path):
    state = meta_state()
    written = keys.write(bare(saved(dict(state), tmp_path / "dit.pt")).network.module, keys.META)
    assert written.keys() == state.keys() and all(torch.equal(written[name], state[name]) for name in state)


def test_a_velocity_is_the_first_half_of_the_channels(tmp_path):
    """SiT's checkpoints: the rows of the other half are gone; σ = 1 - t, and dx/dσ = -dx/dt."""
    path = saved(meta_state(), tmp_path / "sit.pt")
    whole, loaded = bare(path), bare(path, prediction="velocity")
    assert whole.network.learned_variance and not loaded.network.learned_variance
    assert loaded.network.module.dit.final.linear.weight.shape == (PATCH * PATCH * CHANNELS, HIDDEN)
    x, _, labels = inputs()
    sigmas = torch.tensor([0.1, 0.5, 1.0])
    expected = -whole.network.module(x, 1 - sigmas, labels)
    # The same sums; a narrower product may take them in another order.
    assert distance(loaded.network.module(x, sigmas, labels), expected[:, :CHANNELS]) < 1e-6
    assert distance(loaded.network.module(x, sigmas, labels), expected[:, CHANNELS:]) > 0.1
    process = loaded.process
    assert (process.prediction, process.sampler.solver, process.span) == ("velocity", "euler", 1)
    assert (whole.process.prediction, whole.process.span) == ("epsilon", 1000)
    with pytest.raises(UsageError, match="prediction is 'speed'; expected one of epsilon, v_prediction, sample, velo"):
        bare(path, prediction="speed")


def test_without_a_position_table(tmp_path):
    state = meta_state()
    del state["pos_embed"]
    path = saved(state, tmp_path / "dit.pt")
    with pytest.raises(UsageError, match="pass --resolution"):
        bare(path)
    assert bare(path, resolution=64).network.state.shape == (CHANNELS, LATENT, LATENT)


@pytest.mark.parametrize(("field", "value"), [("model", "S/2"), ("resolution", 256)])
def test_recipe_and_checkpoint_disagree(tmp_path, field, value):
    path = saved(meta_state(), tmp_path / "dit.pt")
    with pytest.raises(UsageError, match=f"{field} is .*, expected {value}"):
        bare(path, **{field: value})


def test_not_a_dit(tmp_path):
    with pytest.raises(UsageError, match=r"neither x_embedder.* it holds conv.weight"):
        bare(saved({"conv.weight": torch.zeros(1)}, tmp_path / "dit.pt"))


NAMES = [f"thing {n}, item" for n in range(CLASSES)]
SHUFFLED = {str(n): NAMES[n] for n in reversed(range(CLASSES))}


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("text", ["\n".join(NAMES) + "\n", json.dumps(NAMES), json.dumps(SHUFFLED)])
def test_labels(tmp_path, text, mark):
    path = saved(meta_state(), tmp_path / "dit.pt")
    (tmp_path / "names").write_text(mark + text)
    assert bare(path, labels=str(tmp_path / "names")).labels == tuple(NAMES)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n".join(NAMES[1:]), "got 11 names, expected 12"),
        (json.dumps([*NAMES, "more"]), "got 13 names, expected 12"),
        (json.dumps({str(n + 1): name for n, name in enumerate(NAMES)}), "class 0 has the name None"),
        ("[1, 2", "not JSON"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, text, said):
    path = saved(meta_state(), tmp_path / "dit.pt")
    (tmp_path / "names").write_text(text)
    with pytest.raises(UsageError, match=said):
        bare(path, labels=str(tmp_path / "names"))

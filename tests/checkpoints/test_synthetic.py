"""Made-up weights must behave: hear every input, stay bounded while sampling, and be hard to quantize naively."""

from dataclasses import replace

import pytest
import torch

from dit_export.checkpoints import load, synthetic
from dit_export.networks.spec import MODELS
from dit_export.recipe import Recipe
from dit_runtime.sampling.solvers import solve


@pytest.fixture(autouse=True, scope="module")
def limited(one_thread):
    with one_thread():
        yield


@pytest.fixture(scope="module")
def small():
    return load(Recipe(model="S/8", synthetic=0, latents_only=True))


def latents(spec, count=1):
    shape = (count, spec.channels, spec.latent_size, spec.latent_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def distance(got, expected) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("name", "resolution"), [("S/8", 256), ("S/2", 256), ("B/4", 256), ("S/4", 512)])
def test_every_input_is_heard(name, resolution):
    spec = replace(MODELS[name], latent_size=resolution // 8)
    model = synthetic.synthetic_dit(spec, seed=1)
    x = latents(spec).expand(4, -1, -1, -1)
    for t in (0.0, 400.0, 940.0):
        out = model(x, torch.tensor([t, t, t + 50, t]), torch.tensor([3, 700, 3, spec.null_label]))
        prediction, variance = out[:, : spec.channels], out[:, spec.channels :]
        here, label, later, null = prediction
        assert distance(label, here) > 0.1 and distance(null, here) > 0.1 and distance(later, here) > 0.05
        assert 0.8 < prediction.std() < 1.6 and 0.2 < variance.std() < 0.7 and variance.abs().max() < 3


def test_every_input_of_a_velocity_is_heard():
    """Its t runs from 0 to 1, where the sines and cosines of t hardly move."""
    spec = replace(MODELS["S/8"], learned_variance=False)
    model = synthetic.synthetic_dit(spec, seed=1, span=1.0)
    x = latents(spec).expand(4, -1, -1, -1)
    for t in (0.0, 0.4, 0.94):
        here, label, later, null = model(
            x, torch.tensor([t, t, t + 0.05, t]), torch.tensor([3, 700, 3, spec.null_label])
        )
        assert distance(label, here) > 0.1 and distance(null, here) > 0.1 and distance(later, here) > 0.01
        assert 0.8 < here.std() < 1.6


def test_every_block_is_heard(small):
    """A wrong block must show in the prediction by far more than rounding: each moves it by 1 % or more."""
    model, x = small.network.module, latents(small.network.module.spec)
    expected = model(x, torch.tensor([400.0]), torch.tensor([3]))
    for block in model.blocks:
        for part in (block.attn, block.mlp):
            hook = part.register_forward_hook(lambda _, inputs, out: torch.zeros_like(out))
            assert distance(model(x, torch.tensor([400.0]), torch.tensor([3])), expected) > 0.01
            hook.remove()


@pytest.mark.parametrize("guided_channels", [3, 4])
@pytest.mark.parametrize(("solver", "steps"), [("ddim", 10), ("ddim", 25), ("ddim", 50), ("dpm++", 10), ("dpm++3", 10)])
def test_sampling_stays_bounded(small, solver, steps, guided_channels):
    """A predictor that ignored its latents would take them to 157 times themselves."""
    spec, model = small.network.module.spec, small.network.module
    labels = torch.tensor([207, 360, spec.null_label, spec.null_label])
    run = solve(small.process, solver, steps, latents(spec, 2).numpy(), lambda shape: None)
    x, t = next(run)
    while True:
        rows = torch.from_numpy(x).float().repeat(2, 1, 1, 1)
        out = model(rows, torch.full((4,), float(t)), labels)[:, : spec.channels]
        first, last = out.chunk(2)
        guided = torch.cat([(last + 4 * (first - last))[:, :guided_channels], first[:, guided_channels:]], dim=1)
        try:
            x, t = run.send((guided.numpy(), None))
        except StopIteration as end:
            final = torch.from_numpy(end.value)
            break
    assert final.isfinite().all() and 0.1 < final.std() < 10
    assert distance(final[0], final[1]) > 0.5


def test_outlier_channels(small):
    """A few inputs of qkv, fc1 and proj are many times the others, so one int8 scale for all of them hurts."""
    model, x = small.network.module, latents(small.network.module.spec)

    def run():
        return model(x, torch.tensor([400.0]), torch.tensor([3]))

    def quantized(smooth):
        def hook(layer, inputs):
            size = inputs[0].abs().amax((0, 1), keepdim=True).clamp(min=1e-6)  # (1, 1, D)
            step = (size if smooth else size.max()) / 127
            return (inputs[0] / step).round() * step

        hooks = [layer.register_forward_pre_hook(hook) for layer in layers]
        error = distance(run(), expected)
        [each.remove() for each in hooks]
        return error

    layers = [layer for block in model.blocks for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1)]
    activations = []
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: activations.append(inputs[0])) for layer in layers]
    expected = run()
    [each.remove() for each in hooks]
    for layer, inputs in zip(layers, activations, strict=True):
        size = inputs.square().mean((0, 1)).sqrt()
        count = (size > 5 * size[size > 0].median()).sum().item()
        assert 1 <= count <= 12, layer
    assert quantized(smooth=False) > 3 * quantized(smooth=True)


def test_seed():
    spec = MODELS["S/8"]
    one, same, other = (synthetic.synthetic_dit(spec, seed).blocks[3].mlp.fc1.weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_vae():
    vae = synthetic.synthetic_vae(0)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    for size in (0.3, 1.0, 4.0):  # the sizes that sampling ends with
        pictures = vae.decode(size * z / vae.config.scaling_factor).sample / 2 + 0.5
        assert 0.15 < pictures.std() < 0.35 and abs(pictures.mean() - 0.5) < 0.1
        assert ((pictures > 0) & (pictures < 1)).float().mean() > 0.9
        assert (pictures[0] - pictures[1]).square().mean().sqrt() > 0.1

"""diffusers' transformers as Networks: their own outputs, from live modules and from folders."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaTransformer2DModel,
)
from torch import Tensor, nn

from dit_export.checkpoints import load
from dit_export.checkpoints.diffusers import class_name, read_config
from dit_export.networks import Network
from dit_export.networks.families import FAMILIES, family_network
from dit_export.recipe import Recipe
from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError
from examples import family as skeleton
from tests.networks import tiny
from tests.networks.tiny import TOKENS
from tests.pixart import small_vae


def theirs(transformer: nn.Module, values: dict[str, Tensor], pixels: tuple[int, int] | None = None) -> Tensor:
    """Call the transformer as its pipeline does, with a time of the noise schedule."""
    rows, added = {"hidden_states": values["latents"], "encoder_hidden_states": values["captions"]}, {}
    if "pooled" in values:
        rows["pooled_projections"] = values["pooled"]
        return transformer(**rows, timestep=1000 * values["timesteps"]).sample
    if pixels:
        size = torch.tensor([[*map(float, pixels)]]).repeat(len(values["latents"]), 1)
        added = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
    if hasattr(transformer.config, "timestep_scale"):
        rows["encoder_attention_mask"] = values["mask"]
        if "guidance_scale" in values:
            return transformer(**rows, timestep=values["timesteps"], guidance=0.1 * values["guidance_scale"]).sample
        return transformer(**rows, timestep=1000 * values["timesteps"] * transformer.config.timestep_scale).sample
    added = {"resolution": None, "aspect_ratio": None} | added
    rows |= {"encoder_attention_mask": values["mask"], "added_cond_kwargs": added}
    return transformer(**rows, timestep=values["timesteps"]).sample


CASES = {  # transformer, latents, what the pipeline says of the image's size, span of the time
    "pixart": (tiny.pixart, {}, None, None, 1000.0),
    "pixart at another size": (tiny.pixart, {"interpolation_scale": 2}, (8, 16), None, 1000.0),
    "pixart with its size": (tiny.pixart, {"use_additional_conditions": True}, (16, 8), (128, 64), 1000.0),
    "sana": (tiny.sana, {}, None, None, 1.0),
    "sana at another size": (tiny.sana, {"qk_norm": "rms_norm_across_heads", "timestep_scale": 0.5}, (4, 6), None, 1.0),
    "sana-sprint": (tiny.sana, {"guidance_embeds": True, "num_layers": 1}, None, None, 1.0),
    "sd3": (tiny.sd3, {}, None, None, 1.0),
    "sd3.5": (tiny.sd3, tiny.SD3_5, None, None, 1.0),
    "sd3.5 at another size": (tiny.sd3, tiny.SD3_5, (12, 32), None, 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrapper_is_diffusers(name) -> None:
    make, config, size, pixels, span = CASES[name]
    transformer = make(**config)
    network = family_network(transformer, size, TOKENS)
    values = tiny.inputs(network, 3, span=span)
    assert torch.equal(tiny.run(network, values), theirs(transformer, values, pixels))


@pytest.mark.parametrize("name", CASES)
def test_every_port_matters(name) -> None:
    make, config, size, _, span = CASES[name]
    network = family_network(make(**config), size, TOKENS)
    values, others = (tiny.inputs(network, 3, seed=seed, span=span) for seed in (0, 1))
    expected = tiny.run(network, values)
    for port in network.ports:
        other = tiny.run(network, values | {port.name: others[port.name]})
        assert tiny.distance(other, expected) > 0.01, port.name


class MyTransformer2DModel(SanaTransformer2DModel):
    """A class that only the skeleton knows."""


def test_the_skeleton_is_a_family(monkeypatch) -> None:
    """It makes Sana's network of Sana's weights, and a prompt stage whose outputs fit the ports."""
    monkeypatch.setitem(FAMILIES, skeleton.MINE.name, skeleton.MINE)
    sana = tiny.sana()
    mine = MyTransformer2DModel(**{key: value for key, value in sana.config.items() if not key.startswith("_")})
    mine.load_state_dict(sana.state_dict())
    network, expected = family_network(mine, None, TOKENS), family_network(sana, None, TOKENS)
    values = tiny.inputs(network, 2)
    assert torch.equal(tiny.run(network, values), tiny.run(expected, values))
    assert (network.ports, network.guidance, network.pixels) == (expected.ports, expected.guidance, expected.pixels)
    text = skeleton.MINE.text
    ids = torch.arange(2 * TOKENS).view(2, TOKENS)
    encoder = nn.Embedding(2 * TOKENS, 48)
    module = text.module({"text_encoder": lambda rows, attention_mask: [encoder(rows)]}, mine, TOKENS)
    rows = module(ids, **{text.prompts[0].mask: torch.ones_like(ids)})
    shapes = {port.name: (2, *port.shape) for port in network.conditions}
    assert {name: tuple(row.shape) for name, row in zip(text.gives, rows, strict=True)} == shapes


def test_a_size_is_a_constant() -> None:
    transformer = tiny.pixart(use_additional_conditions=True)
    network = family_network(transformer, (8, 16), TOKENS)
    values = tiny.inputs(network, 2, span=1000.0)
    assert tiny.distance(theirs(transformer, values, (128, 64)), tiny.run(network, values)) > 0.01


def test_ports() -> None:
    network = family_network(tiny.pixart())
    assert network.ports == (
        Port("latents", "state", "float32", (4, 8, 8)),
        Port("timesteps", "time", "float32", ()),
        Port("captions", "condition", "float32", (120, 48)),
        Port("mask", "condition", "float32", (120,), masks="captions"),
    )
    assert network.learned_variance and network.null == {} and network.guided_channels is None
    assert network.model["name"] == "PixArtTransformer2DModel" and network.model["resolution"] == 64
    assert json.dumps(network.model)
    network = family_network(tiny.sd3(), (8, 16))
    assert network.ports == (
        Port("latents", "state", "float32", (16, 8, 16)),
        Port("timesteps", "time", "float32", ()),
        Port("captions", "condition", "float32", (333, 48)),
        Port("pooled", "condition", "float32", (40,)),
    )
    assert not network.learned_variance and network.model["resolution"] == "64x128"


@pytest.mark.parametrize("form", [{}, {"max_shard_size": "100KB"}, {"safe_serialization": False}])
@pytest.mark.parametrize("make", [tiny.pixart, tiny.sd3])
def test_from_a_folder(tmp_path, make, form) -> None:
    transformer = make()
    transformer.save_pretrained(tmp_path, **form)
    loaded = load(Recipe(checkpoint=str(tmp_path), latents_only=True, caption_tokens=TOKENS))
    values = tiny.inputs(loaded.network, 2)
    assert torch.equal(tiny.run(loaded.network, values), tiny.run(family_network(transformer, tokens=TOKENS), values))
    assert loaded.source["sha256"].keys() == {file.name for file in tmp_path.iterdir() if file.suffix != ".json"}
    assert loaded.vae is None and loaded.labels == ()
    module = loaded.network.module
    assert not module.training and not any(weight.requires_grad for weight in module.parameters())


OLDER = {"num_vector_embeds": None, "double_self_attention": False, "use_linear_projection": False}


@pytest.mark.parametrize(
    ("make", "published"),
    [
        (tiny.pixart, {"_class_name": "Transformer2DModel", "only_cross_attention": False, **OLDER}),
        (tiny.qwen_image, {"pooled_projection_dim": 768}),
    ],
)
def test_published_configs(tmp_path, make, published) -> None:
    """The hub's configs are older than diffusers, which maps PixArt's class and reads over retired fields."""
    transformer = make()
    transformer.save_pretrained(tmp_path)
    name = type(transformer).__name__
    today = read_config(tmp_path, name)
    rewrite(tmp_path / "config.json", **published)
    assert class_name(tmp_path) == name and read_config(tmp_path, name) == today
    rewrite(tmp_path / "config.json", only_cross_attention=True)
    with pytest.raises(UsageError, match="has no field only_cross_attention"):
        read_config(tmp_path, name)


@pytest.mark.parametrize(
    ("make", "config", "solver", "spacing", "shift", "steps"),
    [
        (tiny.sana, {}, "dpm++", "discrete", 3.0, 20),
        (tiny.sana, {"guidance_embeds": True}, "scm", "trailing", 1.0, 2),
        (tiny.flux, {}, "euler", "trailing", math.exp(0.5), 28),  # 256 image tokens
        (tiny.flux, {"guidance_embeds": False}, "euler", "trailing", 1.0, 4),
        (tiny.chroma, {}, "euler", "trailing", math.exp(0.5), 35),
        (tiny.z_image, {}, "euler", "trailing", 6.0, 50),
    ],
)
def test_a_transformer_alone_has_the_schedule_of_its_pipeline(
    tmp_path, make, config, solver, spacing, shift, steps
) -> None:
    make(**config).save_pretrained(tmp_path)
    pixels = 256 if solver == "euler" else None
    process = load(Recipe(checkpoint=str(tmp_path), latents_only=True, resolution=pixels)).process
    assert (process.sampler.solver, process.sampler.flow_spacing, process.sampler.steps) == (solver, spacing, steps)
    assert process.shift == pytest.approx(shift, rel=1e-6)


def test_half_precision_becomes_float32(tmp_path) -> None:
    tiny.sd3().to(torch.bfloat16).save_pretrained(tmp_path)
    module = load(Recipe(checkpoint=str(tmp_path), latents_only=True)).network.module
    assert {weight.dtype for weight in module.state_dict().values()} == {torch.float32}


def pipeline(folder: Path, name: str) -> Path:
    tiny.pixart().save_pretrained(folder / "transformer")
    small_vae().save_pretrained(folder / "vae")
    DPMSolverMultistepScheduler(beta_start=2e-4).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return folder


def captions(network: Network) -> tuple[int, ...]:
    return next(port.shape for port in network.conditions if port.name == "captions")


@pytest.mark.parametrize(("name", "tokens"), [("PixArtAlphaPipeline", 120), ("PixArtSigmaPipeline", 300)])
def test_a_pipeline_says_how_long_a_caption_is(tmp_path, name, tokens) -> None:
    folder = str(pipeline(tmp_path / "pipeline", name))
    loaded = load(Recipe(checkpoint=folder, resolution="64x128"))
    assert captions(loaded.network) == (tokens, 48) and loaded.network.state.shape == (4, 8, 16)
    assert loaded.process.beta_start == 2e-4 and loaded.vae is not None
    assert captions(load(Recipe(checkpoint=folder, caption_tokens=20)).network) == (20, 48)


def test_sixteen_channels_of_a_vae(tmp_path) -> None:
    """SD3's VAE: a shift, and no convolutions between encoder and decoder."""
    config = {"latent_channels": 16, "shift_factor": 0.0609, "scaling_factor": 1.5305}
    vae = small_vae(**config, use_quant_conv=False, use_post_quant_conv=False)
    tiny.sd3().save_pretrained(tmp_path / "transformer")
    vae.save_pretrained(tmp_path / "vae")
    loaded = load(Recipe(checkpoint=str(tmp_path)))
    assert loaded.process.prediction == "velocity"
    latents = torch.randn(1, 16, 4, 4)
    with torch.no_grad():
        assert torch.equal(loaded.vae.decode(latents).sample, vae.decode(latents).sample)
    assert loaded.vae.config.shift_factor == 0.0609 and loaded.vae.post_quant_conv is None


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("make", "changes", "said"),
    [
        (tiny.pixart, {"norm_type": "ada_norm"}, "PixArtTransformer2DModel refuses it"),
        (tiny.pixart, {"cross_attention_dim": 64}, r"attn2.to_k.weight is \[72, 72\], expected \[72, 64\]"),
        (tiny.pixart, {"out_channels": 4}, r"proj_out.weight is \[32, 72\], expected \[16, 72\]"),
        (tiny.pixart, {"rope": True}, "PixArtTransformer2DModel has no field rope"),
        (tiny.pixart, {"num_layers": "two"}, "PixArtTransformer2DModel refuses it"),
        (tiny.sd3, {"qk_norm": "group"}, "SD3Transformer2DModel refuses it"),
        (tiny.sd3, {"num_layers": 3}, "transformer_blocks.1.attn.to_add_out.weight is missing"),
        (tiny.sd3, {"_class_name": "StableAudioDiTModel"}, "expected .*SD3Transformer2DModel"),
        (tiny.sd3, {"sample_size": 64}, "latents of side 64; its position table ends at 32"),
        (tiny.sd3, {"sample_size": 9}, "latents of 9 x 9 do not divide into patches of 2"),
    ],
)
def test_what_is_refused(tmp_path, make, changes, said) -> None:
    make().save_pretrained(tmp_path)
    rewrite(tmp_path / "config.json", **changes)
    with pytest.raises(UsageError, match=said) as caught:
        load(Recipe(checkpoint=str(tmp_path), latents_only=True))
    assert "\n" not in str(caught.value)


def test_class_names_for_captions(tmp_path) -> None:
    tiny.sd3().save_pretrained(tmp_path)
    (tmp_path / "names").write_text("cat\ndog")
    with pytest.raises(UsageError, match="names: class names, but the network has no labels"):
        load(Recipe(checkpoint=str(tmp_path), latents_only=True, labels=str(tmp_path / "names")))


def test_what_is_refused_of_a_live_module() -> None:
    with pytest.raises(UsageError, match="PixArtTransformer2DModel: out_channels is 5, expected 4 or 8"):
        family_network(tiny.pixart(out_channels=5))
    with pytest.raises(UsageError, match="attention_type is 'gated', expected 'default'"):
        family_network(tiny.pixart(attention_type="gated"))
    with pytest.raises(UsageError, match="DiTTransformer2DModel: not a known transformer"):
        family_network(tiny.dit())


@pytest.mark.parametrize(
    ("make", "scheduler", "prediction", "words"),
    [
        (tiny.sd3, DDIMScheduler(), None, "describes a noise process; SD3Transformer2DModel is trained for a flow"),
        (tiny.pixart, FlowMatchEulerDiscreteScheduler(), None, "describes a flow process; PixArtTransformer2DModel is"),
        (tiny.pixart, None, "velocity", "or --prediction, describes a flow process; PixArtTransformer2DModel is"),
    ],
)
def test_another_kind_of_process_is_refused(tmp_path, make, scheduler, prediction, words) -> None:
    make().save_pretrained(tmp_path / "transformer")
    if scheduler is not None:
        scheduler.save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UsageError, match=words) as caught:
        load(Recipe(checkpoint=str(tmp_path), latents_only=True, prediction=prediction))
    assert "\n" not in str(caught.value)

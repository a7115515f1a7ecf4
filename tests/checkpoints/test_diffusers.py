"""Folders that diffusers wrote: outputs are its own, and every field of a config is honoured or refused."""

import inspect
import json
import math

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel

from dit_export.checkpoints import keys, load
from dit_export.checkpoints.diffusers import ABSENT, CLASSES, COUNTS, FIXED, NUMBERS
from dit_export.networks.dit import DiT
from dit_export.recipe import Recipe
from dit_runtime.errors import UsageError
from tests.pixart import small_vae

CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
    "norm_eps": 1e-3,  # far from 1e-6, so that honouring it shows
}
ROUNDING = 1e-5  # two orders of float32 sums over three blocks; angles up to 999 keep 6e-5 of absolute error


def transformer(shared: bool, seed: int = 0) -> DiTTransformer2DModel:
    """Weights under which every input is heard; embedders alike in all blocks or each block's own."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**CONFIG).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            torch.nn.init.normal_(weight, 0, 0.3 if weight.ndim == 1 else 1 / math.sqrt(weight[0].numel()))
            if "embedding_table" in name:
                weight.normal_()
        for block in model.transformer_blocks[1:] if shared else ():
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def inputs():
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.0, 517.0, 999.0]), torch.tensor([3, 10, 0])


def output(model) -> torch.Tensor:
    with torch.no_grad():
        return model(*inputs()) if isinstance(model, DiT) else model(*inputs()).sample


def distance(got, expected) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def read(path, **fields):
    return load(Recipe(checkpoint=str(path), latents_only=True, **fields))


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("shared", [True, False])
def test_forward_is_diffusers(tmp_path, shared):
    theirs = transformer(shared)
    theirs.save_pretrained(tmp_path)
    loaded = read(tmp_path)
    spec = loaded.network.module.spec
    assert spec.embedders == (1 if shared else 3)
    assert (spec.frequency_shift, spec.norm2_eps, spec.guided_channels, spec.unguided_up_to_one) == (1, 1e-3, 4, True)
    expected = output(theirs)
    assert distance(output(loaded.network.module), expected) <= ROUNDING
    if shared:  # the same weights in the other dialect are another function
        torch.save(keys.write(loaded.network.module, keys.META), tmp_path / "meta.pt")
        meta = read(tmp_path / "meta.pt", heads=4)
        assert (
            meta.network.module.spec.frequency_shift == 0
            and distance(output(meta.network.module), expected) > 1000 * ROUNDING
        )


@pytest.mark.parametrize("shared", [True, False])
def test_write_is_the_reverse_of_read(tmp_path, shared):
    theirs = transformer(shared)
    theirs.save_pretrained(tmp_path)
    written = keys.write(read(tmp_path).network.module, keys.DIFFUSERS)
    again = DiTTransformer2DModel(**CONFIG).eval()
    again.load_state_dict(written)
    assert torch.equal(output(again), output(theirs))


@pytest.mark.parametrize("form", [{"max_shard_size": "100KB"}, {"safe_serialization": False}])
def test_sharded_and_bin(tmp_path, form):
    theirs = transformer(shared=False)
    theirs.save_pretrained(tmp_path, **form)
    assert len(list(tmp_path.glob("*.safetensors"))) != 1
    loaded = read(tmp_path)
    assert distance(output(loaded.network.module), output(theirs)) <= ROUNDING
    assert loaded.source["sha256"].keys() == {file.name for file in tmp_path.iterdir() if file.suffix != ".json"}


def test_a_shard_outside_the_folder(tmp_path):
    transformer(shared=True).save_pretrained(tmp_path, max_shard_size="100KB")
    rewrite(next(tmp_path.glob("*.index.json")), weight_map={"pos_embed.proj.weight": "../other.safetensors"})
    with pytest.raises(UsageError, match="not a file beside it"):
        read(tmp_path)


@pytest.mark.parametrize("place", [".", "transformer"])
def test_a_lora_is_no_part_of_the_weights(tmp_path, place):
    """Its pictures would be those without it."""
    transformer(shared=True).save_pretrained(tmp_path / "transformer")
    read(tmp_path)
    (tmp_path / place / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(UsageError, match=r"a LoRA beside the weights, .* fuse it"):
        read(tmp_path)


def test_older_class(tmp_path):
    theirs = transformer(shared=True)
    theirs.save_pretrained(tmp_path)
    older = {"cross_attention_dim": None, "num_vector_embeds": None, "use_linear_projection": False}
    rewrite(tmp_path / "config.json", _class_name="Transformer2DModel", only_cross_attention=False, **older)
    assert distance(output(read(tmp_path).network.module), output(theirs)) <= ROUNDING
    rewrite(tmp_path / "config.json", only_cross_attention=True)
    with pytest.raises(UsageError, match="only_cross_attention is True, expected False"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("activation_fn", "geglu", "activation_fn is 'geglu', expected 'gelu-approximate'"),
        ("attention_bias", False, "attention_bias is False, expected True"),
        ("norm_elementwise_affine", True, "norm_elementwise_affine is True, expected False"),
        ("out_channels", 5, "out_channels is 5, expected 4 or 8"),
        ("num_layers", "3", "num_layers is '3', expected a positive whole number"),
        ("num_embeds_ada_norm", -1, "num_embeds_ada_norm is -1, expected a whole number"),
        ("num_embeds_ada_norm", 0, "no classes and no low-resolution picture: expected a condition"),
        ("low_channels", 4, "low_channels is 4, expected less than in_channels"),
        ("norm_eps", 0, "norm_eps is 0, expected a small positive number"),
        ("qk_norm", "rms", "has no field qk_norm"),
        (
            "_class_name",
            "StableAudioDiTModel",
            "_class_name is 'StableAudioDiTModel', expected DiTTransformer2DModel",
        ),
        ("num_embeds_ada_norm", 12, r"embedding_table.weight is \[11, 64\], expected \[13, 64\]"),
    ],
)
def test_config_fields_are_refused(tmp_path, field, value, said):
    transformer(shared=True).save_pretrained(tmp_path)
    rewrite(tmp_path / "config.json", **{field: value})
    with pytest.raises(UsageError, match=said):
        read(tmp_path)


def test_bare_file_with_diffusers_keys(tmp_path):
    """The dialect is known by its keys; what only a config.json tells is asked for or taken from it."""
    theirs = transformer(shared=False)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UsageError, match="pass the folder"):
        read(file, heads=4, resolution=64)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError, match="pass --resolution"):
        read(file, heads=4)
    spec = read(file, heads=4, resolution=64).network.module.spec
    assert (spec.frequency_shift, spec.norm2_eps, spec.embedders, spec.num_classes) == (1, 1e-5, 3, 10)


@pytest.fixture
def pipeline(tmp_path):
    folder = tmp_path / "pipeline"
    transformer(shared=True).save_pretrained(folder / "transformer")
    small_vae().save_pretrained(folder / "vae")
    DDIMScheduler(beta_start=2e-4, clip_sample=False).save_pretrained(folder / "scheduler")
    names = {str(n): f"thing {n}, item" for n in range(10)}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "id2label": names}))
    return folder


def test_pipeline(pipeline):
    loaded = load(Recipe(checkpoint=str(pipeline)))
    assert loaded.labels[3] == "thing 3, item" and len(loaded.labels) == 10
    assert loaded.process.beta_start == 2e-4 and loaded.process.sampler.solver == "ddim"
    latents = torch.randn(1, 4, 4, 4)
    theirs = AutoencoderKL.from_pretrained(pipeline / "vae").eval()
    with torch.no_grad():
        assert torch.equal(loaded.vae.decode(latents).sample, theirs.decode(latents).sample)
    assert json.dumps(loaded.source) and loaded.source["vae"]["sha256"]


def test_pipeline_without_its_scheduler(pipeline):
    (pipeline / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UsageError, match=r"scheduler_config.json: not there"):
        load(Recipe(checkpoint=str(pipeline)))


def test_vae_from_an_older_bin(pipeline):
    """Stable Diffusion's VAEs on the hub: a .bin whose attention layers have older names."""
    vae = pipeline / "vae"
    state = AutoencoderKL.from_pretrained(vae).state_dict()
    for older, newer in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
        state = {name.replace(f".{newer}.", f".{older}."): tensor for name, tensor in state.items()}
    (vae / "diffusion_pytorch_model.safetensors").rename(pipeline / "kept.safetensors")
    torch.save(state, vae / "diffusion_pytorch_model.bin")
    loaded = load(Recipe(checkpoint=str(pipeline / "transformer"), vae=str(vae)))
    assert "decoder.mid_block.attentions.0.query.weight" in state
    weight = loaded.vae.decoder.mid_block.attentions[0].to_q.weight
    assert torch.equal(weight, state["decoder.mid_block.attentions.0.query.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"out_channels": 4}, "out_channels is 4, expected 3"),
        ({"latent_channels": 16}, "its latents have 16 channels, expected 4"),
        ({"latents_mean": [0.0] * 4}, r"latents_mean is .*, expected None"),
        ({"block_out_channels": [8, 8, 8]}, "AutoencoderKL refuses it: list index out of range"),
        ({"norm_num_groups": 3}, "AutoencoderKL refuses it"),
        ({"_class_name": "AutoencoderTiny"}, "expected AutoencoderKL or"),
    ],
)
def test_vae_is_refused(pipeline, changes, said):
    rewrite(pipeline / "vae" / "config.json", **changes)
    with pytest.raises(UsageError, match=said):
        load(Recipe(checkpoint=str(pipeline)))


def test_hub_fetches_one_format(pipeline, monkeypatch):
    """Only what is needed: safetensors where there are, .bin elsewhere, no fp16, flax or onnx duplicates."""
    asked = {}
    needed = [
        "transformer/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.safetensors",
        "transformer/config.json",
        "scheduler/scheduler_config.json",
        "model_index.json",
    ]
    text = [
        "text_encoder/pytorch_model.bin",
        "text_encoder_2/config.json",
        "text_encoder_2/model-00001-of-00002.safetensors",
        "text_encoder_2/model.safetensors.index.json",
        "tokenizer_2/spiece.model",
    ]
    listing = [
        *needed,
        *text,
        "vae/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_flax_model.msgpack",
        "text_encoder_2/model.fp16.safetensors",
        "text_encoder_2/pytorch_model.bin",
    ]

    def info(_, hub_id, revision, timeout):
        asked["revision"] = revision
        siblings = [huggingface_hub.hf_api.RepoSibling(rfilename=name) for name in listing]
        return type("Info", (), {"siblings": siblings, "sha": "commit"})

    def download(hub_id, allow_patterns, revision, **_):
        assert (hub_id, revision) == ("someone/dit", "commit")
        asked["files"] = list(huggingface_hub.utils.filter_repo_objects(listing, allow_patterns=allow_patterns))
        return str(pipeline)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load(Recipe(checkpoint="someone/dit"))
    assert sorted(asked["files"]) == sorted(needed + text) and asked["revision"] is None
    assert loaded.source["hub"] == "someone/dit" and loaded.source["revision"] == "pipeline"
    loaded = load(Recipe(checkpoint="someone/dit@v1.0", without_text_encoders=True))
    assert sorted(asked["files"]) == sorted(needed) and asked["revision"] == "v1.0"
    assert loaded.source["hub"] == "someone/dit"


def test_the_installed_diffusers_has_the_fields_we_check():
    """A field that a new diffusers adds must be looked at before it passes."""
    unread = {"dropout", "norm_num_groups", "upcast_attention", "out_channels", "norm_eps"}
    known = {*FIXED, *ABSENT, *NUMBERS, *COUNTS} | unread
    for name in CLASSES:
        fields = inspect.signature(getattr(diffusers, name).__init__).parameters.keys() - {"self"}
        assert fields <= known

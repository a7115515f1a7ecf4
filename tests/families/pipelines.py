"""Tiny pipelines that are built without a family, and the comparison of their latents with a bundle's."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from dit_export.bundle import build as building
from dit_export.checkpoints.pipelines import OTHER, PROMPT
from dit_export.recipe import Recipe
from dit_runtime import Pipeline
from dit_runtime.images import psnr
from dit_runtime.progress import Progress
from tests.families import tiny
from tests.networks.tiny import randomize

SEED, STEPS, GUIDANCE = 42, 4, 3.0
HEADS = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "in_channels": 4}


def hunyuan_dit() -> Any:
    """Both predictions in one batch, half of the result unused, two masks, constants with rows, noise at each step."""
    bert, t5 = tiny.byte_tokenizer(bos="[CLS]", eos="[SEP]", model_max_length=77), tiny.t5_tokenizer(256)
    widths = {"hidden_size": 64, "cross_attention_dim": 32, "cross_attention_dim_t5": 64, "pooled_projection_dim": 16}
    transformer = diffusers.HunyuanDiT2DModel(**HEADS, **widths, patch_size=2, sample_size=8, mlp_ratio=2.0)
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 77}
    words = transformers.BertModel(transformers.BertConfig(vocab_size=len(bert), hidden_size=32, **layers))
    return diffusers.HunyuanDiTPipeline(
        vae=tiny.vae(4, shift_factor=None),
        text_encoder=randomize(words),
        tokenizer=bert,
        transformer=randomize(transformer),
        scheduler=diffusers.DDPMScheduler(prediction_type="v_prediction", steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=tiny.t5(t5),
        tokenizer_2=t5,
    )


def wan(**config: Any) -> Any:
    """Videos (C, F, H, W); a call for each prediction."""
    t5 = tiny.t5_tokenizer()
    sizes = {"out_channels": 4, "text_dim": 64, "freq_dim": 64, "ffn_dim": 64, "rope_max_seq_len": 32}
    transformer = randomize(diffusers.WanTransformer3DModel(**HEADS, **sizes))
    for block in transformer.blocks:
        block.attn2.to_out[0].weight.mul_(6)  # 500 of 512 tokens are zeros, and a prompt must be seen
    stages = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    umt5 = transformers.UMT5Config(vocab_size=len(t5), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return diffusers.WanPipeline(
        tokenizer=t5,
        text_encoder=randomize(transformers.UMT5EncoderModel(umt5)),
        transformer=transformer,
        vae=diffusers.AutoencoderKLWan(**stages, **statistics),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **config,
    )


def cogvideox() -> Any:
    """Videos (F, C, H, W); a tuple of rotary tables; both predictions in one batch."""
    t5 = tiny.t5_tokenizer(226)
    sizes = {"sample_width": 8, "sample_height": 8, "sample_frames": 9, "max_text_seq_length": 226}
    widths = {"out_channels": 4, "time_embed_dim": 32, "text_embed_dim": 64, "use_rotary_positional_embeddings": True}
    blocks = {f"{way}_block_types": (f"CogVideoX{way.title()}Block3D",) * 4 for way in ("down", "up")}
    channels = {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "norm_num_groups": 2}
    return diffusers.CogVideoXPipeline(
        tokenizer=t5,
        text_encoder=tiny.t5(t5),
        transformer=randomize(diffusers.CogVideoXTransformer3DModel(**HEADS, **sizes, **widths)),
        vae=diffusers.AutoencoderKLCogVideoX(**blocks, **channels, layers_per_block=1),
        scheduler=diffusers.DDIMScheduler(
            prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
        ),
    )


def cogview3() -> Any:
    """Sizes of the picture are constants with rows."""
    t5 = tiny.t5_tokenizer(224)
    widths = {"out_channels": 4, "text_embed_dim": 64, "time_embed_dim": 32, "condition_dim": 16}
    sizes = {"pos_embed_max_size": 8, "sample_size": 8, "patch_size": 2}
    return diffusers.CogView3PlusPipeline(
        tokenizer=t5,
        text_encoder=tiny.t5(t5),
        vae=tiny.vae(4, shift_factor=None),
        transformer=randomize(diffusers.CogView3PlusTransformer2DModel(**HEADS, **widths, **sizes)),
        scheduler=diffusers.DDIMScheduler(
            prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"
        ),
    )


def latte() -> Any:
    """Captions as long as their prompt."""
    t5 = tiny.t5_tokenizer(120)
    kinds = {"norm_type": "ada_norm_single", "norm_elementwise_affine": False, "activation_fn": "gelu-approximate"}
    sizes = {"sample_size": 8, "patch_size": 2, "video_length": 2, "caption_channels": 64, "cross_attention_dim": 64}
    return diffusers.LattePipeline(
        tokenizer=t5,
        text_encoder=tiny.t5(t5),
        vae=tiny.vae(4),
        transformer=randomize(diffusers.LatteTransformer3DModel(**HEADS, **kinds, **sizes, out_channels=8)),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )


def build(pipeline: Any, folder: Path, **recipe: Any) -> Path:
    """Save a pipeline and build the bundle of what its runs show."""
    pipeline.save_pretrained(folder / "pipeline")
    fields = {"pipeline": str(folder / "pipeline"), "output": str(folder / "bundle"), "backend": "onnxruntime"}
    built = building.build(Recipe(**fields | {"resolution": 64, "max_batch": 2} | recipe), Progress(io.StringIO()))
    assert built.passed, [figure for figure in built.checks if not figure.passed]
    return built.folder


@dataclass(frozen=True)
class Case:
    """A pipeline and its bundle, which has the conditions of two prompts."""

    pipeline: Any
    bundle: Path
    call: Mapping[str, Any] = field(default_factory=dict)
    size: str | None = None  # of a bundle with several

    def theirs(self, prompt: Any = PROMPT, seed: Any = SEED, **options: Any) -> NDArray[np.float32]:
        """Return the final state (N, …)."""
        seeds = seed if isinstance(seed, list) else [seed]
        generators = [torch.Generator().manual_seed(each) for each in seeds]
        fixed = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, "output_type": "latent"}
        self.pipeline.set_progress_bar_config(disable=True)
        sizes = {"height": 64, "width": 64}
        with torch.no_grad():
            return np.asarray(self.pipeline(prompt, generator=generators, **fixed | sizes | self.call | options)[0])

    def ours(self, rows: slice = slice(1), seed: Any = SEED, guidance: float = GUIDANCE) -> NDArray[np.float32]:
        condition = {name: array[rows] for name, array in np.load(self.bundle / "conditions.npz").items()}
        away = self.bundle / "negative.npz"
        options = {"negative": dict(np.load(away))} if away.exists() else {}
        options |= {"seed": seed, "guidance": guidance, "steps": STEPS, "output": "latents"}
        with Pipeline.load(self.bundle, threads=1, size=self.size) as pipe:
            return pipe.sample(condition=condition, **options)


def distance(got: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the PSNR in dB, of the range of the expected values."""
    return psnr(got, expected, peak=float(np.ptp(expected)))


def accept(case: Case) -> None:
    """Compare latents: one prompt, guided and not, and two at once; and what must differ."""
    expected = case.theirs()
    assert distance(case.ours(), expected) >= tiny.SAME
    assert distance(case.ours(guidance=1.0), case.theirs(guidance_scale=1.0)) >= tiny.SAME
    for got in (case.ours(slice(1, 2)), case.ours(seed=SEED + 9), case.ours(guidance=4 * GUIDANCE)):
        assert distance(got, expected) < tiny.ANOTHER
    both = case.theirs([PROMPT, OTHER], [SEED, SEED + 1])
    assert distance(case.ours(slice(2), [SEED, SEED + 1]), both) >= tiny.SAME

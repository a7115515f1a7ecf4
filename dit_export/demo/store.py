"""The demo model's folder: diffusers' layout, weights stored in float16 and read as float32."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_export.checkpoints import keys
from dit_export.checkpoints.diffusers import read_transformer
from dit_export.checkpoints.vae import read_vae
from dit_export.demo.data import CLASSES
from dit_export.demo.vit import ViT, ViTSpec
from dit_export.networks.dit import DiT
from dit_export.networks.spec import ModelSpec
from dit_runtime.files import beside, write_file

MODEL = Path(__file__).parent / "model"
SR = "sr"  # the folder in it of the DiT for super-resolution, which shares the autoencoder
LATENT_SIZE = 8
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "timestep_spacing": "linspace",
}


class Demo(NamedTuple):
    dit: DiT
    vae: AutoencoderKL
    judge: ViT


def demo_spec(depth: int, hidden: int, heads: int, patch: int) -> ModelSpec:
    """diffusers' dialect, with the demo's classes and one embedder for all blocks."""
    return ModelSpec(
        depth,
        hidden,
        heads,
        patch,
        latent_size=LATENT_SIZE,
        num_classes=len(CLASSES),
        frequency_shift=1,
        norm2_eps=1e-5,
        guided_channels=4,
        unguided_up_to_one=True,
        position_span=LATENT_SIZE // patch,
    )


def save_transformer(dit: DiT, folder: Path) -> None:
    spec = dit.spec
    config = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": spec.heads,
        "attention_head_dim": spec.hidden // spec.heads,
        "in_channels": spec.channels + spec.low_channels,
        "out_channels": spec.out_channels,
        "num_layers": spec.depth,
        "sample_size": spec.latent_size,
        "patch_size": spec.patch,
        "num_embeds_ada_norm": spec.num_classes,
        "norm_type": "ada_norm_zero",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
        "norm_eps": spec.norm2_eps,
    }
    if spec.low_channels:
        config["low_channels"] = spec.low_channels
    _save(keys.write(dit, keys.DIFFUSERS), folder / "transformer" / WEIGHTS, config)


def save_vae(vae: AutoencoderKL, folder: Path) -> None:
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    _save(vae.state_dict(), folder / "vae" / WEIGHTS, {"_class_name": "AutoencoderKL", **config})


def save_judge(judge: ViT, folder: Path) -> None:
    _save(judge.state_dict(), folder / "judge" / "model.safetensors", asdict(judge.spec))


def save_index(folder: Path) -> None:
    index = {
        "_class_name": "DiTPipeline",
        "id2label": {str(index): name for index, name in enumerate(CLASSES)},
        "scheduler": ["diffusers", SCHEDULER["_class_name"]],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write(index, folder / "model_index.json")
    save_scheduler(folder)


def save_scheduler(folder: Path) -> None:
    _write(SCHEDULER, folder / "scheduler" / "scheduler_config.json")


def load(folder: Path = MODEL, part: str = "") -> Demo:
    """The three models in float32, ready to run; with `part` SR, the DiT is the one of super-resolution."""
    dit, _ = read_transformer(folder / part / "transformer")
    vae, _ = read_vae(folder, dit.spec.channels)
    return Demo(dit, vae, load_judge(folder))


def load_judge(folder: Path = MODEL) -> ViT:
    spec = ViTSpec(**json.loads((folder / "judge" / "config.json").read_text(encoding="utf-8")))
    judge = ViT(spec)
    judge.load_state_dict(load_file(folder / "judge" / "model.safetensors"))
    return judge.eval()


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _save(weights: Mapping[str, Tensor], path: Path, config: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside(path) as partial:
        save_file({name: tensor.detach().half().contiguous() for name, tensor in weights.items()}, partial)
    _write(config, path.parent / "config.json")


def _write(value: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(value, indent=2) + "\n")

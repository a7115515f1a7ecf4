"""Tiny transformers of diffusers with random weights under which every input matters, and inputs for their Networks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    CogView4Transformer2DModel,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor

from dit_export.networks import Network

TOKENS = 12


def randomize(model: Any, seed: int = 0) -> Any:
    """Fill in linears of unit gain, norms around 1, tables that are not zero: adaLN-Zero starts with outputs of 0."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=random)
            if weight.ndim >= 2 and "table" not in name:
                weight.copy_(noise / weight[0].numel() ** 0.5)
            else:
                weight.copy_(0.3 * noise + (weight.ndim == 1 and name.endswith("weight")))
    return model.eval().requires_grad_(False)


def dit(**config: Any) -> DiTTransformer2DModel:
    fields = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "sample_size": 8, "out_channels": 8}
    return randomize(DiTTransformer2DModel(**fields | config))


def pixart(**config: Any) -> PixArtTransformer2DModel:
    fields = {"num_attention_heads": 2, "attention_head_dim": 36, "num_layers": 2, "sample_size": 8}
    return randomize(PixArtTransformer2DModel(**fields | {"cross_attention_dim": 72, "caption_channels": 48} | config))


def sana(**config: Any) -> SanaTransformer2DModel:
    fields = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "in_channels": 8}
    fields |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "cross_attention_dim": 64}
    return randomize(SanaTransformer2DModel(**fields | {"out_channels": 8, "caption_channels": 48} | config))


def sd3(**config: Any) -> SD3Transformer2DModel:
    fields = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "sample_size": 8}
    widths = {"joint_attention_dim": 48, "caption_projection_dim": 64, "pooled_projection_dim": 40}
    return randomize(SD3Transformer2DModel(**fields | widths | {"pos_embed_max_size": 16} | config))


FLUX = {"num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12), "joint_attention_dim": 48}


def flux(**config: Any) -> FluxTransformer2DModel:
    """FLUX.1-dev; schnell has guidance_embeds=False."""
    fields = {"num_layers": 2, "num_single_layers": 1, "pooled_projection_dim": 40, "guidance_embeds": True}
    return randomize(FluxTransformer2DModel(**FLUX | fields | config))


def chroma(**config: Any) -> ChromaTransformer2DModel:
    fields = {"num_layers": 2, "num_single_layers": 1, "approximator_hidden_dim": 48, "approximator_layers": 2}
    return randomize(ChromaTransformer2DModel(**FLUX | fields | config))


def auraflow(**config: Any) -> AuraFlowTransformer2DModel:
    fields = {"num_attention_heads": 2, "attention_head_dim": 32, "num_mmdit_layers": 2, "num_single_dit_layers": 1}
    fields |= {"sample_size": 8, "joint_attention_dim": 48, "caption_projection_dim": 64, "pos_embed_max_size": 64}
    return randomize(AuraFlowTransformer2DModel(**fields | config))


def flux2(**config: Any) -> Flux2Transformer2DModel:
    fields = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "num_single_layers": 1}
    widths = {"in_channels": 16, "joint_attention_dim": 48, "axes_dims_rope": (8, 8, 8, 8), "guidance_embeds": False}
    return randomize(Flux2Transformer2DModel(**fields | widths | config))


def ltx(**config: Any) -> LTXVideoTransformer3DModel:
    fields = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "in_channels": 8, "out_channels": 8}
    return randomize(
        LTXVideoTransformer3DModel(**fields | {"cross_attention_dim": 64, "caption_channels": 48} | config)
    )


def hunyuan_dit(**config: Any) -> HunyuanDiT2DModel:
    """Four blocks, the last of which has a skip; captions of 4 and 28 tokens."""
    fields = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 4, "in_channels": 4, "patch_size": 2}
    widths = {"hidden_size": 64, "cross_attention_dim": 32, "cross_attention_dim_t5": 64, "pooled_projection_dim": 16}
    sizes = {"sample_size": 8, "mlp_ratio": 2.0, "text_len": 4, "text_len_t5": 28}
    return randomize(HunyuanDiT2DModel(**fields | widths | sizes | config))


def cogview4(**config: Any) -> CogView4Transformer2DModel:
    fields = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "sample_size": 8, "in_channels": 4}
    widths = {"out_channels": 4, "text_embed_dim": 48, "time_embed_dim": 64, "condition_dim": 16}
    return randomize(CogView4Transformer2DModel(**fields | widths | {"rope_axes_dim": (32, 32)} | config))


SD3_5 = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}


def qwen_image(**config: Any) -> QwenImageTransformer2DModel:
    fields = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "axes_dims_rope": (8, 12, 12)}
    return randomize(QwenImageTransformer2DModel(**fields | {"joint_attention_dim": 48} | config))


def lumina2(**config: Any) -> Lumina2Transformer2DModel:
    fields = {"num_attention_heads": 4, "num_kv_heads": 2, "hidden_size": 96, "num_layers": 2, "sample_size": 8}
    sizes = {"axes_dim_rope": (8, 8, 8), "axes_lens": (300, 16, 16), "cap_feat_dim": 48, "multiple_of": 16}
    return randomize(Lumina2Transformer2DModel(**fields | sizes | {"num_refiner_layers": 1} | config))


def z_image(**config: Any) -> ZImageTransformer2DModel:
    fields = {"dim": 96, "n_heads": 3, "n_kv_heads": 3, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 48}
    sizes = {"axes_dims": [8, 12, 12], "axes_lens": [600, 16, 16]}
    return randomize(ZImageTransformer2DModel(**fields | sizes | config))


def inputs(network: Network, rows: int, seed: int = 0, span: float = 1.0) -> dict[str, Tensor]:
    """Return random values by port; masks have runs of ones of different lengths, times are within `span`."""
    random = torch.Generator().manual_seed(seed)
    values = {}
    for port in network.ports:
        shape = (rows, *port.shape)
        if port.role == "time":
            values[port.name] = span * torch.rand(shape, generator=random)
        elif port.masks:
            lengths = torch.randint(1, port.shape[0] + 1, (rows, 1), generator=random)
            values[port.name] = (torch.arange(port.shape[0]) < lengths).float()
        elif port.dtype == "int64":
            values[port.name] = torch.randint(0, port.size, shape, generator=random)
        else:
            values[port.name] = torch.randn(shape, generator=random)
    return values


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def run(network: Network, values: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return network.module(**values)

"""A whole pipeline at its real size with random weights: Sana 0.6B for 512 px, with Gemma 2 2B and DC-AE.

`python -m tests.survey.checkpoint FOLDER` writes it as diffusers does, in bf16, a shard at a time: 6.7 GB. No weight is
zero, so the network reacts to all of its inputs. The tokenizer has single bytes in place of Gemma's 256,000 words.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.families.tiny import byte_tokenizer
from tests.networks.tiny import randomize

SHARD = 1 << 30  # bytes
TRANSFORMER = {
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "sample_size": 16,
}
KINDS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
VAE = {"encoder_block_types": KINDS, "decoder_block_types": KINDS, "scaling_factor": 0.41407}
VAE |= {"upsample_block_type": "interpolate", "downsample_block_type": "conv"}


def write(module: nn.Module, folder: Path, stem: str) -> None:
    """Write random weights for a module without memory, in shards with an index."""
    random, shards = torch.Generator().manual_seed(0), list[dict[str, Tensor]]()
    table: dict[str, str] = {}
    for number, shard in enumerate(_sharded(module, random)):
        name = f"{stem}-{number + 1:05d}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        table |= dict.fromkeys(shard, name)
    del shards
    index = {"metadata": {}, "weight_map": table}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _sharded(module: nn.Module, random: torch.Generator) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=random)
        if values.ndim >= 2 and "table" not in name:
            values /= values[0].numel() ** 0.5
        else:
            values = 0.3 * values + (values.ndim == 1 and name.endswith("weight"))
        shard[name] = values.bfloat16()
        if sum(value.nbytes for value in shard.values()) >= SHARD:
            yield shard
            shard = {}
    yield shard


def save_config(model: Any, folder: Path) -> None:
    folder.mkdir(parents=True)
    model.save_config(folder) if hasattr(model, "save_config") else model.config.save_pretrained(folder)


def sana(folder: Path, transformer: Mapping[str, Any] = TRANSFORMER, gemma: Mapping[str, Any] = {}) -> None:
    """Write the pipeline; the sizes are the published ones unless these fields say otherwise."""
    tokenizer = byte_tokenizer(bos="<bos>", padding_side="left")
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": None}
    config = transformers.Gemma2Config(**ids, **gemma)
    with torch.device("meta"):
        text, network = transformers.Gemma2Model(config), SanaTransformer2DModel(**transformer)
    vae = randomize(AutoencoderDC(**VAE))
    picture = vae.decode(torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(0)) / 0.41407).sample
    last = vae.decoder.conv_out.conv if hasattr(vae.decoder.conv_out, "conv") else vae.decoder.conv_out
    last.weight /= 2 * picture.std()  # so that pictures stay within their range
    last.bias *= 0
    for module, name, stem in (
        (text, "text_encoder", "model"),
        (network, "transformer", "diffusion_pytorch_model"),
    ):
        save_config(module, folder / name)
        write(module, folder / name, stem)
    vae.bfloat16().save_pretrained(folder / "vae")
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    names = {
        "scheduler": ("diffusers", "DPMSolverMultistepScheduler"),
        "text_encoder": ("transformers", "Gemma2Model"),
        "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
        "transformer": ("diffusers", "SanaTransformer2DModel"),
        "vae": ("diffusers", "AutoencoderDC"),
    }
    index = {"_class_name": "SanaPipeline", **names}
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sana(Path(sys.argv[1]))

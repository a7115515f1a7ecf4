"""AuraFlow: a bundle's pictures are those of diffusers' pipeline."""

from __future__ import annotations

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from dit_export.networks.families import family_network
from dit_runtime.bundle import manifest
from dit_runtime.errors import UsageError
from tests.families import tiny
from tests.networks.tiny import randomize

JOINT, SINGLE, TOKENS = 2, 1, 24


def transformer(**config):
    fields = {"sample_size": 8, "num_mmdit_layers": JOINT, "num_single_dit_layers": SINGLE, "num_attention_heads": 2}
    fields |= {"attention_head_dim": 32, "joint_attention_dim": 48, "caption_projection_dim": 64}
    return randomize(AuraFlowTransformer2DModel(**fields | {"pos_embed_max_size": 64} | config))

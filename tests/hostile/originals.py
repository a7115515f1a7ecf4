"""The sound checkpoints that recipes damage."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.conftest import meta_state
from tests.networks import tiny

CLASSES, INDEX = 10, "model_index.json"


def make(place: Path, kind: str) -> None:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    from tests.families import tiny as texts
    from tests.pixart import small_vae

    if kind == "meta":
        torch.save(meta_state(), place)
        return
    classes = {"_class_name": "DiTPipeline", "id2label": {str(number): f"thing {number}" for number in range(CLASSES)}}
    if kind == "dit":
        tiny.dit(num_embeds_ada_norm=CLASSES).save_pretrained(place / "transformer")
        DDIMScheduler().save_pretrained(place / "scheduler")
    else:
        tiny.pixart().save_pretrained(place / "transformer")
        DPMSolverMultistepScheduler().save_pretrained(place / "scheduler")
        tokenizer = texts.t5_tokenizer()
        tokenizer.save_pretrained(place / "tokenizer")
        texts.t5(tokenizer, width=48).save_pretrained(place / "text_encoder")
        kinds = {"tokenizer": ["transformers", "T5Tokenizer"], "text_encoder": ["transformers", "T5EncoderModel"]}
        classes = {"_class_name": "PixArtAlphaPipeline", **kinds}
    small_vae(sample_size=64).save_pretrained(place / "vae")
    (place / INDEX).write_text(json.dumps(classes))

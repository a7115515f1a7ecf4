"""Hostile checkpoints: configs, schedulers, labels, weights and tokenizers of a folder that diffusers wrote, and files
of weights alone (`pickles.py`)."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.hostile.damage import REMOVED, Apply, Damage, folder_at, pipe, setting, written
from tests.hostile.manifests import BIDI, ESCAPE, FORGED
from tests.hostile.originals import CLASSES, INDEX
from tests.hostile.pickles import pickles

TRANSFORMER, SCHEDULER = "transformer/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
WRONG = (None, True, -1, 0, 1.5, 10**30, "x", ESCAPE, [], {}, [None], REMOVED)


def shown(value: Any) -> str:
    return "removed" if value is REMOVED else repr(value)[:20]


def texts() -> Iterator[Damage]:
    contents: dict[str, bytes] = {
        "nothing": b"",
        "a list": b"[]",
        "null": b"null",
        "a number": b"7",
        "a brace": b"{",
        "bytes": b"\xff\xfe",
        "lists in each other": b"[" * 100_000,
        "20 MB": b'{"a": "' + b"x" * 20_000_000 + b'"}',
        "a number of 5,000 digits": b'{"num_layers": ' + b"9" * 5000 + b"}",
        "a class that a terminal obeys": json.dumps({"_class_name": ESCAPE + FORGED}).encode(),
        "a class of 1 MB": json.dumps({"_class_name": "a" * 1_000_000}).encode(),
    }
    for file in (TRANSFORMER, SCHEDULER, INDEX, "vae/config.json"):
        for name, content in contents.items():
            plain = file == INDEX and name == "a class that a terminal obeys"
            yield Damage(f"{file}: {name}", written(file, content), "fine" if plain else "refused")
        yield Damage(f"{file}: a pipe", pipe(file))
        yield Damage(f"{file}: a folder", folder_at(file), "survives")
        yield Damage(f"{file}: NaN", written(file, b'{"_class_name": NaN}'))
    for file in ("tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json", "text_encoder/config.json"):
        for name in ("nothing", "a list", "a number", "bytes", "lists in each other"):
            yield Damage(f"{file}: {name}", written(file, contents[name]), "refused", "pixart")


def configs() -> Iterator[Damage]:
    numbers = ("num_layers", "num_attention_heads", "attention_head_dim", "sample_size", "patch_size", "in_channels")
    for key in (*numbers, "out_channels", "num_embeds_ada_norm", "norm_eps", "activation_fn"):
        for value in (*WRONG, 10**9):
            yield Damage(f"transformer: {key} is {shown(value)}", setting(TRANSFORMER, key, value), "survives")
        yield Damage(f"family: {key} is 10^9", setting(TRANSFORMER, key, 10**9), "survives", "pixart")
    for key in ("caption_channels", "cross_attention_dim", "sample_size"):
        for value in WRONG:
            yield Damage(f"family: {key} is {shown(value)}", setting(TRANSFORMER, key, value), "survives", "pixart")
    for key in ("latent_channels", "block_out_channels", "up_block_types", "layers_per_block", "norm_num_groups"):
        for value in (*WRONG, 10**9, [10**9] * 4, ["UpDecoderBlock2D"] * 100_000):
            yield Damage(f"vae: {key} is {shown(value)}", setting("vae/config.json", key, value), "survives")
    for key in ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff", "d_kv", "feed_forward_proj"):
        for value in (None, -1, 10**9, 10**30, "x", []):
            yield Damage(
                f"encoder: {key} is {shown(value)}",
                setting("text_encoder/config.json", key, value),
                "survives",
                "pixart",
            )
    yield Damage("transformer: a field that nobody knows", setting(TRANSFORMER, ESCAPE, 1))
    yield Damage("transformer: code of its own", setting(TRANSFORMER, "auto_map", {"AutoModel": "evil.Model"}))
    yield Damage(
        "tokenizer: code of its own",
        setting("tokenizer/tokenizer_config.json", "auto_map", {"AutoTokenizer": ["evil.T", None]}),
        "survives",
        "pixart",
    )
    yield Damage(
        "index: a class of text encoders that is none",
        setting(INDEX, "text_encoder", ["os", "system"]),
        "refused",
        "pixart",
    )
    yield Damage(
        "index: a text encoder elsewhere",
        setting(INDEX, "text_encoder/../../x", ["a", "T5EncoderModel"]),
        "survives",
        "pixart",
    )
    yield Damage("index: a tokenizer that is a number", setting(INDEX, "tokenizer", 7), "survives", "pixart")


def schedulers() -> Iterator[Damage]:
    fields = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    for key in (*fields, "timestep_spacing", "steps_offset", "clip_sample", "_class_name", "_use_default_values"):
        for value in WRONG:
            yield Damage(f"scheduler: {key} is {shown(value)}", setting(SCHEDULER, key, value), "survives")
    yield Damage("scheduler: 10^9 training steps", setting(SCHEDULER, "num_train_timesteps", 10**9))
    yield Damage("scheduler: 1,000,000 betas", setting(SCHEDULER, "trained_betas", [0.5] * 1_000_000))
    yield Damage("scheduler: a field that a terminal obeys", setting(SCHEDULER, ESCAPE, FORGED))
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    for key in ("base_shift", "max_shift", "base_image_seq_len", "shift", "num_train_timesteps"):
        for value in (1e308, -1e308, 0, "x", None, []):
            content = json.dumps(flow | {key: value}).encode()
            yield Damage(f"flow: {key} is {shown(value)}", written(SCHEDULER, content), "survives", "pixart")


def labels() -> Iterator[Damage]:
    for value in (
        7,
        True,
        "x",
        [],
        ["x"],
        ["x"] * 1_000_000,
        {"0": "x"},
        [[]] * CLASSES,
        [None] * CLASSES,
        [""] * CLASSES,
    ):
        empty = value == []
        yield Damage(
            f"labels: {shown(value)} of {type(value).__name__}",
            setting(INDEX, "id2label", value),
            "fine" if empty else "refused",
        )
    for name in (ESCAPE, BIDI, FORGED, "a" * 1_000_000):
        yield Damage(f"labels: {name!r}"[:60], setting(INDEX, "id2label", [name] * CLASSES), "survives")


def weights() -> Iterator[Damage]:
    for file in (f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}"):
        for name, content in {
            "nothing": b"",
            "text": b"hello",
            "a header of 2^63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
            "a header of 100 MB": struct.pack("<Q", 100_000_001) + b"{" + b" " * 1000,
            "no JSON": struct.pack("<Q", 2) + b"{]",
            "lists in each other": struct.pack("<Q", 100_000) + b"[" * 100_000,
            "a tensor outside": header({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}}),
            "a shape of 2^60": header({"x": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 0]}}),
            "a type that is none": header({"x": {"dtype": ESCAPE, "shape": [], "data_offsets": [0, 0]}}),
            "tensors that overlap": header(
                {key: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for key in "ab"}, bytes(4)
            ),
            "a name that a terminal obeys": header(
                {ESCAPE + FORGED: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)
            ),
            "100,000 names": header(
                {f"x{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)}
            ),
            "a pickle": pickle.dumps({"x": 1}),
        }.items():
            yield Damage(f"{file.partition('/')[0]} weights: {name}", written(file, content))
        yield Damage(f"{file.partition('/')[0]} weights: a pipe", pipe(file))
        yield Damage(
            f"{file.partition('/')[0]} weights: 20 GB of holes",
            lambda place, file=file: os.truncate(place / file, 20 << 30),
        )
    for name, table in {
        "no table": [],
        "no map": {},
        "a map of numbers": {"weight_map": {"x": 7}},
        "a path that leaves": {"weight_map": {"x": "../../outside.safetensors"}},
        "a path from the root": {"weight_map": {"x": "/etc/passwd"}},
        "a name that a terminal obeys": {"weight_map": {"x": ESCAPE}},
        "no shards": {"weight_map": {}},
        "200,000 names": {"weight_map": {str(number): "x" for number in range(200_000)}},
    }.items():
        yield Damage(f"shards: {name}", sharded(table))


def header(table: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def sharded(table: object) -> Apply:
    def apply(place: Path) -> None:
        (place / "transformer" / WEIGHTS).unlink()
        (place / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(table))

    return apply


def folders() -> Iterator[Damage]:
    yield Damage("dit: as it was", lambda place: None, "fine")
    yield Damage("pixart: as it was", lambda place: None, "fine", "pixart")
    yield Damage("dit: no transformer", lambda place: shutil.rmtree(place / "transformer"))
    yield Damage(
        "dit: a LoRA beside it",
        lambda place: save_file({"x": torch.zeros(1)}, place / "pytorch_lora_weights.safetensors"),
    )
    yield Damage("dit: floats of 8 bits", _narrow)


def _narrow(place: Path) -> None:
    from safetensors.torch import load_file

    path = place / "transformer" / WEIGHTS
    save_file(
        {
            name: np.asarray(tensor).tolist() and tensor.to(torch.float8_e4m3fn)
            for name, tensor in load_file(path).items()
        },
        path,
    )


CHECKPOINTS: tuple[Damage, ...] = (*texts(), *configs(), *schedulers(), *labels(), *weights(), *pickles(), *folders())

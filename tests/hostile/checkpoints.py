"""Hostile checkpoints: configs, schedulers, labels, weights and tokenizers of a folder that diffusers wrote, and files
of weights alone."""

from __future__ import annotations

import collections
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from tests.conftest import meta_state
from tests.hostile.manifests import BIDI, ESCAPE, FORGED
from tests.hostile.originals import CLASSES, INDEX

Apply = Callable[[Path], object]
TRANSFORMER, SCHEDULER = "transformer/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
REMOVED = object()
WRONG = (None, True, -1, 0, 1.5, 10**30, "x", ESCAPE, [], {}, [None], REMOVED)


class Damage(NamedTuple):
    name: str
    apply: Apply  # to the checkpoint
    verdict: str = "refused"  # or "fine", or "survives": either
    kind: str = "dit"  # or pixart, a pipeline with a text encoder; or meta, a .pt of Meta's


def setting(file: str, key: str, value: Any) -> Apply:
    def apply(place: Path) -> None:
        table = json.loads((place / file).read_text())
        if value is REMOVED:
            table.pop(key, None)
        else:
            table[key] = value
        (place / file).write_text(json.dumps(table))

    return apply


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


def written(file: str, content: bytes) -> Apply:
    return lambda place: (place / file).write_bytes(content)


def pipe(file: str) -> Apply:
    def apply(place: Path) -> None:
        (place / file).unlink()
        os.mkfifo(place / file)

    return apply


def folder_at(file: str) -> Apply:
    def apply(place: Path) -> None:
        (place / file).unlink()
        (place / file).mkdir()

    return apply


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


class Trap:
    """Unpickled, it makes a file: the sign that code ran."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def changed(change: Callable[[dict], Any], legacy: bool = False) -> Apply:
    def apply(place: Path) -> None:
        state = meta_state()
        made = change(state)
        torch.save(state if made is None else made, place, _use_new_zipfile_serialization=not legacy)

    return apply


def pickles() -> Iterator[Damage]:
    deep: Any = ()
    for _ in range(60):  # shown in full it has 2^60 parts
        deep = (deep, deep)
    whole = "x_embedder.proj.weight"
    cases: dict[str, Callable[[dict], Any]] = {
        "a number": lambda state: 7,
        "a list": lambda state: [*state.values()],
        "code": lambda state: state | {"x": Trap()},
        "a name that is a number": lambda state: state | {7: torch.zeros(1)},
        "a value of 2^60 parts": lambda state: state | {"x": deep},
        "an ordered table of 2^60 parts": lambda state: collections.OrderedDict(state | {"x": deep}),
        "a tensor that repeats": lambda state: state.update(
            {whole: torch.zeros(1).expand(1 << 20, 4, 1 << 10, 1 << 10)}
        ),
        "a table that repeats": lambda state: state.update({"pos_embed": torch.zeros(1).expand(1, 1 << 30, 64)}),
        "classes that repeat": lambda state: state.update(
            {"y_embedder.embedding_table.weight": torch.zeros(1).expand(1 << 30, 64)}
        ),
        "a sparse tensor": lambda state: state.update(
            {whole: torch.sparse_coo_tensor([[0], [0], [0], [0]], [1.0], (1 << 20, 4, 2, 2))}
        ),
        "a meta tensor": lambda state: state.update({whole: torch.empty(1 << 30, 4, 2, 2, device="meta")}),
        "integers": lambda state: state.update({whole: state[whole].to(torch.int64)}),
        "complex numbers": lambda state: state.update({whole: state[whole].to(torch.complex64)}),
        "one dimension": lambda state: state.update({whole: state[whole].flatten()}),
        "no dimension": lambda state: state.update({whole: torch.tensor(1.0)}),
        "no numbers": lambda state: state.update({whole: torch.zeros(0, 4, 2, 2)}),
        "no patch": lambda state: state.update({whole: torch.zeros(64, 4, 0, 0)}),
        "no width": lambda state: state.update({"blocks.0.mlp.fc1.weight": torch.zeros(0, 64)}),
        "100,000 blocks": lambda state: state.update({f"blocks.{n}.x": torch.zeros(1) for n in range(100_000)}),
        "a block of 10^30": lambda state: state.update({f"blocks.{10**30}.x": torch.zeros(1)}),
        "NaN": lambda state: state.update({whole: torch.full_like(state[whole], float("nan"))}),
        "names that a terminal obeys": lambda state: state.update({ESCAPE + FORGED: torch.zeros(1)}),
        "nothing": lambda state: {},
        "nothing under ema": lambda state: {"ema": {}},
    }
    for name, change in cases.items():
        yield Damage(f"pt: {name}", changed(change), "refused", "meta")
        if name in ("code", "a number", "NaN", "a tensor that repeats"):
            yield Damage(f"pt: {name}, in the old format", changed(change, legacy=True), "refused", "meta")
    for share in (0.0, 0.01, 0.5, 0.99):
        yield Damage(
            f"pt: {share} of it",
            lambda place, share=share: os.truncate(place, int(share * place.stat().st_size)),
            "refused",
            "meta",
        )
    doubled = b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * 60  # a tuple of 2^60 parts
    contents = {
        "text": b"hello",
        "a pickle of many lists": b"\x80\x02" + b"]" * 1_000_000 + b".",
        "a pickle without an end": b"\x80\x02}q\0" * 1000,
        "a text of 2^40 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40),
        "a memo of 2^31": b"\x80\x02]r" + struct.pack("<I", 2**31) + b".",
        "a key of 2^60 parts": doubled + b"}h\0K\x01s.",
        "a set of 2^60 parts": doubled + b"c__builtin__\nset\n]h\0a\x85R.",
        "a function of 2^60 parts": doubled + b")R.",
        "a class of 2^60 parts": doubled + b")\x81.",
        "a list as a function": b"\x80\x02])R.",
        "a key of a million tuples in each other": b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s.",
        "an empty zip": b"PK\5\6" + bytes(18),
    }
    for name, content in contents.items():
        yield Damage(f"pt: {name}", lambda place, content=content: place.write_bytes(content), "refused", "meta")
    yield Damage("pt: a pipe", lambda place: (place.unlink(), os.mkfifo(place)), "refused", "meta")
    yield Damage("pt: a zip that unpacks to 400 MB", _bomb, "refused", "meta")
    yield Damage("pt: as it was", lambda place: None, "fine", "meta")
    yield Damage("dit: as it was", lambda place: None, "fine")
    yield Damage("pixart: as it was", lambda place: None, "fine", "pixart")
    yield Damage("dit: no transformer", lambda place: shutil.rmtree(place / "transformer"))
    yield Damage(
        "dit: a LoRA beside it",
        lambda place: save_file({"x": torch.zeros(1)}, place / "pytorch_lora_weights.safetensors"),
    )
    yield Damage("dit: floats of 8 bits", _narrow)


def _bomb(place: Path) -> None:
    with zipfile.ZipFile(place) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, bytes(400_000_000) if name.endswith("/data/0") else content)


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


CHECKPOINTS: tuple[Damage, ...] = (*texts(), *configs(), *schedulers(), *labels(), *weights(), *pickles())

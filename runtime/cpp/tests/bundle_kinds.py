"""The stages of make_bundle.py's bundles, by kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
from bundle_graphs import MAX_BATCH, VECTORS, WIDTH, Maker
from bundle_ports import CLASSES, PROMPTS, WORDS
from onnx import TensorProto


def labels(make: Maker) -> None:
    make.stage(
        "conditioner", "time+condition", ["timesteps", "labels"], {"conditioning": [VECTORS, WIDTH]},
        ("table", make.weight(CLASSES + 1, VECTORS, WIDTH)),
        ("direction", 0.001 * make.weight(VECTORS, WIDTH)),
        ("axes", np.array([1, 2])),
        ("one", np.array(1)),
        ("room", np.zeros(MAX_BATCH, np.float32)),  # for so many rows: ONNX Runtime refuses more
        ("Size", ["timesteps"], ["count"], {}),
        ("Sub", ["count", "one"], ["last"], {}),
        ("Gather", ["room", "last"], ["nothing"], {"axis": 0}),
        ("Gather", ["table", "labels"], ["entries"], {"axis": 0}),
        ("Unsqueeze", ["timesteps", "axes"], ["times"], {}),
        ("Mul", ["times", "direction"], ["moved"], {}),
        ("Add", ["entries", "moved"], ["all"], {}),
        ("Add", ["all", "nothing"], ["conditioning"], {}),
    )  # fmt: skip
    make.step(["conditioning"], ("Identity", ["conditioning"], ["vectors"], {}), variance=True)
    make.update()
    make.decoder()


def pictured(make: Maker) -> None:
    make.encoder()
    labels(make)


def enlarged(make: Maker) -> None:
    make.encoder()
    make.stage(
        "conditioner", "time+condition", ["timesteps", "low"], {"conditioning": [VECTORS, WIDTH]},
        ("axes", np.array([1, 2])),
        ("flat", np.array([0, -1])),
        ("split", np.array([0, VECTORS, WIDTH])),
        ("read", make.weight(2 * 4 * 4, VECTORS * WIDTH) / 4),
        ("direction", 0.001 * make.weight(VECTORS, WIDTH)),
        ("Reshape", ["low", "flat"], ["numbers"], {}),
        ("MatMul", ["numbers", "read"], ["row"], {}),
        ("Reshape", ["row", "split"], ["entries"], {}),
        ("Unsqueeze", ["timesteps", "axes"], ["times"], {}),
        ("Mul", ["times", "direction"], ["moved"], {}),
        ("Add", ["entries", "moved"], ["conditioning"], {}),
    )  # fmt: skip
    make.step(["conditioning"], ("Identity", ["conditioning"], ["vectors"], {}))
    make.decoder()


def captioned(make: Maker) -> None:
    make.stage(
        "context", "condition", ["captions", "mask"], {"context": [5, WIDTH], "context_mask": [5]},
        ("words", make.weight(3, WIDTH)),
        ("far", np.array(100, np.float32)),
        ("MatMul", ["captions", "words"], ["context"], {}),
        ("Mul", ["mask", "far"], ["present"], {}),
        ("Sub", ["present", "far"], ["context_mask"], {}),
    )  # fmt: skip
    make.stage(
        "modulation", "time", ["timesteps"], {"modulation": [VECTORS, WIDTH]},
        ("own", make.weight(VECTORS, WIDTH)),
        ("direction", 0.001 * make.weight(VECTORS, WIDTH)),
        ("axes", np.array([1, 2])),
        ("Unsqueeze", ["timesteps", "axes"], ["times"], {}),
        ("Mul", ["times", "direction"], ["moved"], {}),
        ("Add", ["own", "moved"], ["modulation"], {}),
    )  # fmt: skip
    make.step(
        ["modulation", "context", "context_mask"],
        ("row", np.array([2])),
        ("Softmax", ["context_mask"], ["shares"], {"axis": -1}),
        ("Unsqueeze", ["shares", "row"], ["weights"], {}),
        ("MatMul", ["weights", "context"], ["mean"], {}),
        ("Add", ["modulation", "mean"], ["vectors"], {}),
        variance=True,
    )
    make.decoder()


def wave(make: Maker) -> None:
    make.stage(
        "context", "condition", ["words", "words_mask"], {"context": [3, WIDTH]},
        ("wide", np.array([2])),
        ("read", make.weight(4, WIDTH)),
        ("bias", make.weight(WIDTH)),
        ("MatMul", ["words", "read"], ["product"], {}),
        ("Add", ["product", "bias"], ["all"], {}),
        ("Unsqueeze", ["words_mask", "wide"], ["present"], {}),
        ("Mul", ["all", "present"], ["context"], {}),
    )  # fmt: skip
    make.stage(
        "summary", "condition", ["context", "pooled"], {"summary": [WIDTH]},
        ("tokens", np.array([1])),
        ("read", make.weight(5, WIDTH)),
        ("MatMul", ["pooled", "read"], ["product"], {}),
        ("ReduceMean", ["context", "tokens"], ["mean"], {"keepdims": 0}),
        ("Add", ["product", "mean"], ["summary"], {}),
    )  # fmt: skip
    make.stage(
        "modulation", "time", ["moment"], {"modulation": [WIDTH]},
        ("wide", np.array([1])),
        ("direction", 0.001 * make.weight(WIDTH)),
        ("Unsqueeze", ["moment", "wide"], ["times"], {}),
        ("Mul", ["times", "direction"], ["modulation"], {}),
    )  # fmt: skip
    make.stage(
        "conditioner", "time+condition", ["moment", "modulation", "summary"], {"conditioning": [VECTORS, WIDTH]},
        ("wide", np.array([1])),
        ("axes", np.array([1, 2])),
        ("table", make.weight(VECTORS, WIDTH)),
        ("Sin", ["moment"], ["turned"], {}),
        ("Unsqueeze", ["turned", "axes"], ["turn"], {}),
        ("Add", ["modulation", "summary"], ["sum"], {}),
        ("Unsqueeze", ["sum", "wide"], ["vector"], {}),
        ("Mul", ["vector", "table"], ["vectors"], {}),
        ("Add", ["vectors", "turn"], ["conditioning"], {}),
    )  # fmt: skip
    make.step(
        ["conditioning", "context", "words_mask", "modulation"],
        ("row", np.array([2])),
        ("Unsqueeze", ["words_mask", "row"], ["weights"], {}),
        ("MatMul", ["weights", "context"], ["sums"], {}),
        ("Unsqueeze", ["modulation", "row"], ["slow"], {}),
        ("Add", ["conditioning", "sums"], ["some"], {}),
        ("Add", ["some", "slow"], ["vectors"], {}),
    )


def video(make: Maker) -> None:
    make.stage(
        "conditioner", "time+condition", ["timesteps", "labels", "rate"], {"conditioning": [VECTORS, WIDTH]},
        ("table", make.weight(4, VECTORS, WIDTH)),
        *((name, scale * make.weight(VECTORS, WIDTH)) for name, scale in (("direction", 0.001), ("faster", 1))),
        ("axes", np.array([1, 2])),
        ("Gather", ["table", "labels"], ["entries"], {"axis": 0}),
        ("Unsqueeze", ["timesteps", "axes"], ["times"], {}),
        ("Unsqueeze", ["rate", "axes"], ["rates"], {}),
        ("Mul", ["times", "direction"], ["moved"], {}),
        ("Mul", ["rates", "faster"], ["more"], {}),
        ("Add", ["entries", "moved"], ["some"], {}),
        ("Add", ["some", "more"], ["conditioning"], {}),
    )  # fmt: skip
    make.step(["conditioning"], ("Identity", ["conditioning"], ["vectors"], {}))
    make.decoder()


def free(make: Maker) -> None:
    make.stage(
        "modulation", "time", ["timesteps"], {"modulation": [VECTORS, WIDTH]},
        ("axes", np.array([1, 2])),
        ("direction", 0.001 * make.weight(VECTORS, WIDTH)),
        ("Unsqueeze", ["timesteps", "axes"], ["times"], {}),
        ("Mul", ["times", "direction"], ["modulation"], {}),
    )  # fmt: skip
    make.step(["modulation"], ("Identity", ["modulation"], ["vectors"], {}))
    make.decoder()


def prompted(make: Maker) -> None:
    for prompt, words in zip(PROMPTS["prompted"], WORDS, strict=True):
        (make.folder / prompt["tokenizer"]).write_text(tokenizer(prompt["tokens"], words), encoding="utf-8")
    make.stage(
        "text", "prompt", ["ids", "ids_mask", "ids_2"], {"captions": [5, 3], "mask": [5], "pooled": [6]},
        ("table", make.weight(len(WORDS[0]), 3)),
        ("table_2", make.weight(len(WORDS[1]), 6)),
        ("tokens", np.array([1])),
        ("Gather", ["table", "ids"], ["captions"], {"axis": 0}),
        ("Cast", ["ids_mask"], ["mask"], {"to": TensorProto.FLOAT}),
        ("Gather", ["table_2", "ids_2"], ["words"], {"axis": 0}),
        ("ReduceMean", ["words", "tokens"], ["pooled"], {"keepdims": 0}),
    )  # fmt: skip
    make.stage(
        "context", "condition", ["captions", "mask"], {"context": [5, WIDTH], "context_mask": [5]},
        ("words", make.weight(3, WIDTH)),
        ("far", np.array(100, np.float32)),
        ("MatMul", ["captions", "words"], ["context"], {}),
        ("Mul", ["mask", "far"], ["present"], {}),
        ("Sub", ["present", "far"], ["context_mask"], {}),
    )  # fmt: skip
    make.stage(
        "conditioner", "time+condition", ["timesteps", "pooled", "rate"], {"conditioning": [VECTORS, WIDTH]},
        ("direction", 0.001 * make.weight(VECTORS, WIDTH)),
        ("read", make.weight(6, WIDTH)),
        ("axes", np.array([1, 2])),
        ("wide", np.array([1])),
        ("Unsqueeze", ["timesteps", "axes"], ["times"], {}),
        ("Mul", ["times", "direction"], ["moved"], {}),
        ("MatMul", ["pooled", "read"], ["product"], {}),
        ("Unsqueeze", ["product", "wide"], ["vector"], {}),
        ("Unsqueeze", ["rate", "axes"], ["rates"], {}),
        ("Add", ["moved", "vector"], ["some"], {}),
        ("Add", ["some", "rates"], ["conditioning"], {}),
    )  # fmt: skip
    make.step(
        ["conditioning", "context", "context_mask"],
        ("row", np.array([2])),
        ("Softmax", ["context_mask"], ["shares"], {"axis": -1}),
        ("Unsqueeze", ["shares", "row"], ["weights"], {}),
        ("MatMul", ["weights", "context"], ["mean"], {}),
        ("Add", ["conditioning", "mean"], ["vectors"], {}),
    )
    make.decoder()


def tokenizer(tokens: int, words: Sequence[str]) -> str:
    """Return a tokenizer.json that takes these words apart at spaces, cuts them, and fills up with <pad>."""
    table = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": tokens, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            **{"strategy": {"Fixed": tokens}, "direction": "Right", "pad_to_multiple_of": None},
            **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
        },
        **dict.fromkeys(("normalizer", "post_processor", "decoder")),
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(words)},
            "unk_token": "<unk>",
        },
    }
    return json.dumps(table, indent=1)


def embedded(make: Maker) -> None:
    make.stage(
        "conditioner", "time+condition", ["timesteps", "labels", "strength"], {"conditioning": [VECTORS, WIDTH]},
        ("table", make.weight(4, VECTORS, WIDTH)),
        *((name, scale * make.weight(VECTORS, WIDTH)) for name, scale in (("direction", 0.001), ("stronger", 0.1))),
        ("axes", np.array([1, 2])),
        ("Gather", ["table", "labels"], ["entries"], {"axis": 0}),
        ("Unsqueeze", ["timesteps", "axes"], ["times"], {}),
        ("Unsqueeze", ["strength", "axes"], ["strengths"], {}),
        ("Mul", ["times", "direction"], ["moved"], {}),
        ("Mul", ["strengths", "stronger"], ["more"], {}),
        ("Add", ["entries", "moved"], ["some"], {}),
        ("Add", ["some", "more"], ["conditioning"], {}),
    )  # fmt: skip
    make.step(["conditioning"], ("Identity", ["conditioning"], ["vectors"], {}))
    make.decoder()


KINDS: dict[str, Callable[[Maker], None]] = {
    "labels": labels,
    "sizes": labels,
    "wide": labels,
    "pictured": pictured,
    "enlarged": enlarged,
    "captioned": captioned,
    "wave": wave,
    "video": video,
    "free": free,
    "prompted": prompted,
    "embedded": embedded,
}

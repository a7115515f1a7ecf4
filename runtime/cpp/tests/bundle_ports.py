"""Inputs of make_bundle.py's networks, by kind: ports, constants of guidance, and tokenizers."""

from __future__ import annotations

from typing import Any

CLASSES = 5


def port(name: str, role: str, *shape: int, size: int = 0, masks: str = "", picture: bool = False) -> dict[str, Any]:
    dtype = "int64" if size else "float32"
    whole = {"name": name, "role": role, "dtype": dtype, "shape": list(shape), "size": size, "masks": masks}
    return whole | ({"picture": True} if picture else {})


# By kind: ports, and what guidance leads away from.
PORTS: dict[str, list[dict[str, Any]]] = {
    "labels": [
        port("latents", "state", 2, 4, 4),
        port("timesteps", "time"),
        port("labels", "condition", size=CLASSES + 1),
    ],
    "wide": [
        port("latents", "state", 2, 4, 8),
        port("timesteps", "time"),
        port("labels", "condition", size=CLASSES + 1),
    ],
    "captioned": [
        port("latents", "state", 2, 4, 4),
        port("timesteps", "time"),
        port("captions", "condition", 5, 3),
        port("mask", "condition", 5, masks="captions"),
    ],
    "wave": [
        port("signal", "state", 6),
        port("moment", "time"),
        port("words", "condition", 3, 4),
        port("words_mask", "condition", 3, masks="words"),
        port("pooled", "condition", 5),
    ],
    "video": [
        port("latents", "state", 2, 3, 4, 4),
        port("timesteps", "time"),
        port("labels", "condition", size=4),
        port("rate", "condition"),
    ],
    "free": [port("latents", "state", 2, 4, 4), port("timesteps", "time")],
    "enlarged": [
        port("latents", "state", 2, 4, 4),
        port("timesteps", "time"),
        port("low", "condition", 2, 4, 4, picture=True),
    ],
    "prompted": [
        port("latents", "state", 2, 4, 4),
        port("timesteps", "time"),
        port("captions", "condition", 5, 3),
        port("mask", "condition", 5, masks="captions"),
        port("pooled", "condition", 6),
        port("rate", "condition"),
    ],
    "embedded": [
        port("latents", "state", 2, 4, 4),
        port("timesteps", "time"),
        port("labels", "condition", size=4),
        port("strength", "condition"),
    ],
}
NULL: dict[str, dict[str, float]] = {
    "labels": {"labels": CLASSES},
    "wide": {"labels": CLASSES},
    "captioned": {},
    "wave": {"words": 0.0, "pooled": 0.0},
    "video": {"labels": 3, "rate": 0.0},
    "free": {},
    "enlarged": {"low": 0.0},
    "prompted": {"rate": 0.0},
    "embedded": {},
}
# The two tokenizers of "prompted": each knows other words, and the second one's encoder reads no mask.
WORDS = (("<pad>", "<unk>", "a", "no", "red", "blue", "cat", "dog"), ("<pad>", "<unk>", "cat", "dog", "hat"))
for kind in ("sizes", "pictured"):
    PORTS[kind], NULL[kind] = PORTS["labels"], NULL["labels"]
PROMPTS: dict[str, list[dict[str, Any]]] = {
    "prompted": [
        {
            **{"ids": "ids", "tokens": 5, "size": len(WORDS[0]), "tokenizer": "tokenizer.json", "mask": "ids_mask"},
            **{"template": "a {}", "negative": "no {}", "lowercase": True},
        },
        {"ids": "ids_2", "tokens": 4, "size": len(WORDS[1]), "tokenizer": "tokenizer_2.json"},
    ]
}

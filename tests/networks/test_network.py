"""Tests of networks that no bundle could hold.

Each is refused where it is stated, in the words of the manifest's parser.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_export.networks import Network
from dit_runtime.bundle.manifest import Port
from dit_runtime.errors import UsageError

STATE, TIME = Port("x", "state", "float32", (2, 3)), Port("t", "time", "float32", ())
LABELS = Port("labels", "condition", "int64", (), size=5)
NAMES = ["guidance", "prediction", "variance", "previous", "kept", "next", "images", "coefficients"]
PACKS = ["context", "modulation", "conditioning", "context_1", "conditioning_12"]


def network(*ports: Port, **fields: Any) -> Network:
    return Network(torch.nn.Identity(), ports, **fields)


@pytest.mark.parametrize("name", NAMES + PACKS)
def test_names_of_the_stages_tensors_are_taken(name) -> None:
    with pytest.raises(UsageError, match=f"a port is called '{name}'"):
        network(STATE, TIME, Port(name, "condition", "float32", (4,)))


def test_other_names_are_free() -> None:
    for name in ("contexts", "context_", "label", "modulation_a"):
        network(STATE, TIME, Port(name, "condition", "float32", (4,)))


@pytest.mark.parametrize(
    ("ports", "fields", "words"),
    [
        ((STATE, TIME, STATE), {}, "expected distinct names"),
        ((STATE,), {}, r"time ports: got \[\], expected exactly one"),
        ((Port("x", "state", "int64", (2,), size=4), TIME), {}, "port x: got int64"),
        ((STATE, Port("t", "time", "float32", (1,))), {}, r"port t: got float32 \[1\], expected float32 of rank 0"),
        ((STATE, TIME, Port("a", "condition", "int32", ())), {}, "dtype: got int32, expected one of float32, int64"),
        ((STATE, TIME, Port("a", "other", "float32", ())), {}, "role: got other"),
        ((STATE, TIME, Port("a", "condition", "int64", ())), {}, "size: got 0, expected 1 to"),
        ((STATE, TIME, Port("a", "condition", "float32", (3,), masks="x")), {}, "port a: masks 'x'"),
        ((STATE, TIME, LABELS), {"null": {"labels": 1.5}}, "null: labels: got 1.5, expected a number of int64"),
        ((STATE, TIME, LABELS), {"null": {"labels": 2}}, "null: labels: got 2, expected 4, after all classes"),
        ((STATE, TIME, LABELS), {"null": {"label": 4}}, "null: got label, expected one of the condition ports labels"),
        ((STATE, TIME), {"guided_channels": 3}, "guidance: channels: got 3, expected 1 to 2"),
        ((STATE, TIME), {"guided_channels": 0}, "guidance: channels: got 0, expected 1 to 2"),
    ],
)
def test_what_is_refused(ports, fields, words) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        network(*ports, **fields)
    assert "\n" not in str(caught.value)

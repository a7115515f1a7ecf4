"""Names that lead from a bundle back to PyTorch: what crosses into the loop, and which module made a tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from dit_export.graph.oracle import Oracle
from dit_export.passes.stages import Pack
from dit_export.verify import modules
from dit_export.verify.taps import original, residual_sums
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.errors import BundleError

NAME = "traced.json"


@dataclass(frozen=True)
class Traced:
    packs: tuple[Pack, ...]  # in the order in which the step stage reads them
    places: Mapping[str, str]  # module paths by the names of traced tensors, where they are known


def trace_back(denoiser: gs.Graph, packs: Iterable[Pack], oracle: Oracle) -> Traced:
    """Name the modules that made what crosses into the loop, and those behind its residual sums.

    `packs` are those of all stages; only what the denoiser reads crosses.
    """
    by_name = {pack.name: pack for pack in packs}
    packs = tuple(by_name[tensor.name] for tensor in denoiser.inputs if tensor.name in by_name)
    known = oracle.names
    places = {name: modules.maker(oracle.node(name)) for pack in packs for name in pack.tensors if name in known}
    state = denoiser.inputs[0].name
    for x, total in residual_sums(denoiser):
        if {total.name, original(x).name} <= set(known):
            nodes = (oracle.node(name) for name in (total.name, original(x).name, state))
            places[total.name] = modules.branch(*nodes)
    return Traced(packs, {name: place for name, place in places.items() if place})


def write(folder: Path, traced: Traced) -> None:
    packs = {pack.name: dict(zip(pack.tensors, pack.sizes, strict=True)) for pack in traced.packs}
    text = json.dumps({"packs": packs, "places": dict(traced.places)}, indent=1)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read(folder: Path, contract: Manifest) -> Traced:
    name = contract.own(NAME)
    manifest.check_files(folder, contract, [name])
    try:
        table: Any = json.loads(manifest.inside(folder, name).read_text(encoding="utf-8"))
        packs = [Pack(name, tuple(sizes), tuple(sizes.values())) for name, sizes in table["packs"].items()]
        return Traced(tuple(packs), {str(name): str(place) for name, place in table["places"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{folder}: {name} cannot be read: {error}; rebuild the bundle") from None

"""A bundle as a model of Triton Inference Server: its repository, config.pbtxt from the manifest.

Words are UTF-8 in TYPE_UINT8: with NumPy 2 the Python backend of Triton 24.10 reads nothing of a TYPE_STRING, and ends.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.errors import UsageError
from dit_runtime.serve.servable import require_servable

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# What Triton asks before it says that the model is ready; "0" is a class, and a prompt too.
WARMUP = {"prompt": b"0", "num_inference_steps": np.int32(2).tobytes()}
MODEL = '''"""A bundle in Triton's Python backend, written by `dit-export triton`: the class is dit_serve's."""

from dit_serve.triton import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write(
    bundle: Path,
    repository: Path,
    name: str,
    decoupled: bool,
    parameters: Mapping[str, object],
    public_key: bytes | None = None,
) -> Path:
    """Write the model's folder into a repository, with a copy of the bundle; a reader never sees half of it."""
    contract = manifest.read(bundle, public_key=public_key)
    require_servable(bundle, contract)
    folder = repository / name
    if not NAME.fullmatch(name):
        raise UsageError(f"--name {name!r}; expected letters, digits, and . _ -")
    if folder.exists():
        raise UsageError(f"{folder}: exists already; remove it, or take another --name")
    repository.mkdir(parents=True, exist_ok=True)
    partial = repository / f".{name}.partial-{secrets.token_hex(4)}"
    try:
        version = partial / "1"
        shutil.copytree(bundle, version / "bundle")
        (version / "model.py").write_text(MODEL, encoding="utf-8")
        (partial / "warmup").mkdir()
        for field, content in WARMUP.items():
            (partial / "warmup" / field).write_bytes(content)
        text = config(contract, name, decoupled, parameters)
        (partial / "config.pbtxt").write_text(text, encoding="utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def config(contract: Manifest, name: str, decoupled: bool, parameters: Mapping[str, object]) -> str:
    """Return config.pbtxt: a request is a call of the API, and Triton's own batcher is off."""
    shapes = {tuple(size.require_end().gives[0].shape[-2:]) for size in contract.each_size}
    height, width = next(iter(shapes)) if len(shapes) == 1 else (-1, -1)
    fields = _fields(contract)
    inputs = [
        f'  {{ name: "{field}" {kind}{"" if field == "prompt" else " optional: true"} }}'
        for field, kind in fields.items()
    ]
    outputs = [
        f'  {{ name: "images" data_type: TYPE_UINT8 dims: [ -1, {height}, {width}, 3 ] }}',
        '  { name: "seeds" data_type: TYPE_UINT64 dims: [ -1 ] }',
    ]
    warmup = [
        f'    inputs {{ key: "{field}" value {{ {fields[field].replace("-1", "1")} input_data_file: "{field}" }} }}'
        for field in WARMUP
    ]
    return "\n".join(
        [
            f'name: "{name}"',
            'backend: "python"',
            "max_batch_size: 0",
            *_block("input", ",\n".join(inputs)),
            *_block("output", ",\n".join(outputs)),
            "instance_group [ { kind: KIND_CPU count: 1 } ]",
            *(["model_transaction_policy { decoupled: true }"] if decoupled else []),
            *_block("model_warmup", "\n".join(['  { name: "two steps" batch_size: 1', *warmup, "  }"])),
            *(_parameter(key, value) for key, value in parameters.items() if value is not None),
            "",
        ]
    )


def _fields(contract: Manifest) -> dict[str, str]:
    """Return the fields of a request, named as those of the HTTP API, and their types in config.pbtxt."""
    words, number = "data_type: TYPE_UINT8 dims: [ -1 ]", "data_type: TYPE_{} dims: [ 1 ]"
    return (
        {"prompt": words}
        | ({"negative_prompt": words} if contract.prompts and contract.mixes_guidance else {})
        | {"n": number.format("INT32"), "seed": number.format("UINT64"), "num_inference_steps": number.format("INT32")}
        | {"guidance_scale": number.format("FP32"), "solver": words}
        | ({"preset": words} if contract.presets else {})
        | ({"size": words} if len(contract.each_size) > 1 else {})
    )


def _block(name: str, lines: str) -> Sequence[str]:
    return f"{name} [", lines, "]"


def _parameter(key: str, value: object) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: {json.dumps(str(value))} }} }}'

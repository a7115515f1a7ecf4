"""Files of weights, in safetensors or PyTorch's format, read without ever running what they contain."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_export.checkpoints.pickles import require_bounded
from dit_runtime.errors import UsageError
from dit_runtime.files import read_json

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TENSORS = 1 << 14  # of one file
LISTED = 5  # problems named in one error


def find_weights(folder: Path, stem: str = "diffusion_pytorch_model") -> list[Path]:
    """The weight files of a diffusers folder: safetensors before .bin, one file or its shards."""
    for suffix in (".safetensors", ".bin"):
        whole, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return shards(index)
    raise UsageError(f"{folder}: holds neither {stem}.safetensors nor {stem}.bin (whole or with an .index.json)")


def shards(index: Path) -> list[Path]:
    content = read_json(index)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not 0 < len(table) <= TENSORS:
        raise UsageError(f"{index}: has no weight_map of at most {TENSORS} tensors")
    names = sorted({str(name) for name in table.values()})
    for name in names:
        if Path(name).name != name:
            raise UsageError(f"{index}: names {name!r}, which is not a file beside it")
        if not (index.parent / name).is_file():
            raise UsageError(f"{index}: names {name}, which is not there")
    return [index.parent / name for name in names]


def read_weights(paths: list[Path]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in paths:
        state |= read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    return state


def open_weights(paths: list[Path]) -> Mapping[str, Tensor]:
    """Return tensors by name, each read from its file whenever it is looked up; those of a pickle are memory maps."""
    return Weights(paths) if all(path.suffix == ".safetensors" for path in paths) else read_weights(paths)


class Weights(Mapping[str, Tensor]):
    """The tensors of safetensors files; an unused tensor takes no memory."""

    def __init__(self, paths: list[Path]) -> None:
        self._files: dict[str, Path] = {}
        for path in paths:
            with _open(path) as file:
                self._files |= dict.fromkeys(_names(file, path), path)

    def __getitem__(self, name: str) -> Tensor:
        with _open(self._files[name]) as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


Place = tuple[Mapping[str, Tensor], str]  # of a tensor: where it is, and its name there


class Renamed(Mapping[str, Tensor]):
    """Tensors of other mappings under other names."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Tensor:
        weights, own = self._places[name]
        return weights[own]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: damaged, or not a safetensors file: {first_line(error)}") from None


def _names(file: Any, path: Path) -> list[str]:
    names = list(file.keys())
    if len(names) > TENSORS:
        raise UsageError(f"{path}: {len(names)} tensors, expected at most {TENSORS}")
    return names


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with _open(path) as file:
            return {name: file.get_tensor(name) for name in _names(file, path)}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: damaged, or not a safetensors file: {first_line(error)}") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A .pt or .bin: a state dict, or one under `ema` (preferred) or `model` as training scripts save it."""
    try:
        require_bounded(path)
        # Meta's training script keeps its arguments beside the weights; a Namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if wants := re.search(r"GLOBAL (\S+)", str(error)):
            raise UsageError(
                f"{path}: refused, it asks for {wants[1]}, which is code and not weights; "
                "save the state dict alone, or as .safetensors"
            ) from None
        raise UsageError(f"{path}: damaged, or not a weight file: {first_line(error)}") from None
    except Exception as error:  # what a damaged file raises shares no base class but this
        raise UsageError(f"{path}: damaged, or not a weight file: {first_line(error)}") from None
    for key in ("ema", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds a {type(content).__name__}, expected a state dict")
    for name, value in content.items():
        if not isinstance(name, str):  # nothing else is shown: it may be endless
            raise UsageError(f"{path}: a name is of type {type(name).__name__}, expected a text")
        if not isinstance(value, Tensor):
            raise UsageError(f"{path}: {name!r} is of type {type(value).__name__}, expected a tensor")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise UsageError(f"{path}: {name!r} is a tensor without values")
        if value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise UsageError(f"{path}: {name!r} has more values than its file")
    return content


def check(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Exactly these names and shapes, every value a finite float."""
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not expected" for name in state if name not in expected]
    problems += [
        f"{name} is {list(state[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != tuple(shape)
    ]
    if problems:
        rest = len(problems) - LISTED
        more = f"; and {rest} more" if rest > 0 else ""
        raise UsageError(f"{where}: the weights do not fit: {'; '.join(problems[:LISTED])}{more}")
    for name, tensor in state.items():
        if tensor.dtype not in FLOATS:
            raise UsageError(f"{where}: {name} is {tensor.dtype}, expected floating point of 16 bits or more")
        if not tensor.isfinite().all():
            raise UsageError(f"{where}: {name} holds NaN or infinite values")


def sha256(paths: list[Path]) -> dict[str, str]:
    digests = {}
    for path in paths:
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

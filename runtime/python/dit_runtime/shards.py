"""Many pictures as shards: files in ADM's form, each drawn once, whatever stops a run.

Picture i has the seed `seed + i` and the i-th of the labels or prompts, in turn. A shard is `size` pictures that follow
one another. It is written beside its place and renamed, so a file is whole or not there, and a run that goes on draws
what is missing. Its calls depend on nothing but the series: wherever it is drawn on one kind of machine, its bits are
the same.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.conditions.labels import class_number
from dit_runtime.errors import UsageError
from dit_runtime.files import PARTIAL, beside, write_file
from dit_runtime.pipeline import Pipeline
from dit_runtime.request import Request

NAME = "series.json"
SIZE, BATCH = 500, 8  # pictures of a shard, and of a call

Report = Callable[[int, int], object]  # pictures drawn, of how many


@dataclass(frozen=True)
class Series:
    """All that the pictures of a folder depend on."""

    sha256: str  # of the bundle's manifest, which has the sums of all other files
    count: int
    size: int = SIZE
    batch: int = BATCH
    seed: int = 0
    labels: Sequence[int] = ()  # classes
    prompts: Sequence[str] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)  # of each request

    @property
    def shards(self) -> range:
        return range(-(-self.count // self.size))

    def numbers(self, shard: int) -> range:
        """Return the pictures of a shard."""
        return range(shard * self.size, min(self.count, (shard + 1) * self.size))

    def seeds(self, numbers: range) -> list[int]:
        return [self.seed + number for number in numbers]

    def classes(self, numbers: range) -> list[int]:
        """Return the class of each picture; where there are prompts the number of its prompt, and else 0."""
        known = self.labels or range(len(self.prompts) or 1)
        return [known[number % len(known)] for number in numbers]

    def request(self, numbers: range) -> Request:
        values: dict[str, Any] = {"seed": self.seeds(numbers)}
        if self.labels:
            values["labels"] = self.classes(numbers)
        elif self.prompts:
            values["prompt"] = [self.prompts[number] for number in self.classes(numbers)]
        return Request(**values, **self.fields)


def plan(
    folder: Path, contract: Manifest, labels: Sequence[str | int], prompts: Sequence[str] | None, **values: Any
) -> Series:
    """Return the series for a bundle: without labels a bundle of classes draws them all in turn."""
    for name in ("count", "size", "batch"):
        if values[name] < 1:
            raise UsageError(f"{name} is {values[name]}; expected 1 or more")
    if len(contract.at(values["fields"].get("size")).require_end().gives[0].shape) != 4:
        raise UsageError(f"{folder}: this bundle draws videos, and shards hold images")
    numbers: Sequence[int] = [class_number(label, contract.labels, contract.classes) for label in labels]
    if not labels and not prompts and contract.classes and not contract.prompts:
        numbers = range(contract.classes)
    last = values["seed"] + values["count"] - 1
    if not -(2**63) <= values["seed"] <= last < 2**64:
        raise UsageError(f"seeds are {values['seed']} to {last}; expected integers from -2**63 to 2**64 - 1")
    series = Series(manifest.sha256(folder / manifest.NAME), labels=[*numbers], prompts=[*(prompts or ())], **values)
    if not series.prompts:  # words need the tokenizers of an open bundle
        series.request(series.numbers(0)[: series.batch]).check(contract)
    return series


def begin(folder: Path, series: Series) -> None:
    """Make the folder, or find that it holds shards of the same series."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(series), indent=1, ensure_ascii=False)
    file = folder / NAME
    if not file.exists():
        if any(PARTIAL not in item.name for item in folder.iterdir()):
            raise UsageError(f"{folder}: holds other files, and no {NAME}; take an empty folder")
        write_file(file, text)
        return
    try:
        old, new = json.loads(file.read_text(encoding="utf-8")), json.loads(text)
        different = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    except (ValueError, TypeError, AttributeError):
        raise UsageError(f"{file}: damaged; take another folder") from None
    if different:
        raise UsageError(
            f"{folder}: holds shards of another series: {', '.join(different)} differ; take another folder"
        )


def missing(folder: Path, series: Series, picture: Sequence[int]) -> list[int]:
    """Return the shards that are still to be drawn; a `picture` has this shape."""
    return [shard for shard in series.shards if not is_whole(folder, series, shard, picture)]


def path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.npz"


def is_whole(folder: Path, series: Series, shard: int, picture: Sequence[int]) -> bool:
    """Return whether a shard's file has its seeds, its classes, and pictures of the right shape."""
    numbers = series.numbers(shard)
    try:
        with zipfile.ZipFile(path(folder, shard)) as archive:
            with archive.open("arr_0.npy") as member:
                np.lib.format.read_magic(member)
                shape, _, kind = np.lib.format.read_array_header_1_0(member)
            with archive.open("arr_1.npy") as member:
                classes = np.lib.format.read_array(member)
            with archive.open("seeds.npy") as member:
                seeds = np.lib.format.read_array(member)
    except Exception:  # of zipfile, of zlib or of NumPy: a damaged file may mean anything
        return False
    return (
        (*shape, kind) == (len(numbers), *picture, np.uint8)
        and classes.tolist() == series.classes(numbers)
        and seeds.tolist() == series.seeds(numbers)
    )


def picture_shape(contract: Manifest, series: Series) -> tuple[int, int, int]:
    channels, height, width = contract.at(series.fields.get("size")).require_end().gives[0].shape[1:]
    return int(height), int(width), int(channels)


def draw(pipe: Pipeline, series: Series, folder: Path, shard: int, report: Report = lambda done, total: None) -> None:
    """Draw a shard, and put its file in place."""
    numbers = series.numbers(shard)
    parts: list[NDArray[Any]] = []
    for first in range(0, len(numbers), series.batch):
        parts.append(pipe.run(series.request(numbers[first : first + series.batch])).result())
        report(min(first + series.batch, len(numbers)), len(numbers))
    classes, seeds = np.array(series.classes(numbers)), series.seeds(numbers)
    kind = np.uint64 if seeds[-1] >= 2**63 else np.int64  # left to itself NumPy makes float64 of both

    with beside(path(folder, shard)) as partial, partial.open("wb") as file:
        np.savez(file, arr_0=np.concatenate(parts), arr_1=classes, seeds=np.array(seeds, kind))


def run(pipe: Pipeline, series: Series, folder: Path, todo: Sequence[int], report: Report) -> None:
    """Draw the missing shards in this process."""
    done = series.count - sum(len(series.numbers(shard)) for shard in todo)
    for shard in todo:
        before = done

        def part(drawn: int, _: int, before: int = before) -> None:
            report(before + drawn, series.count)

        draw(pipe, series, folder, shard, part)
        done += len(series.numbers(shard))


def clean(folder: Path) -> None:
    """Remove the partial files of workers that were killed."""
    for left in folder.glob(f".*{PARTIAL}*"):
        left.unlink(missing_ok=True)

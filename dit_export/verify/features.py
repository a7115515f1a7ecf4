"""Pictures before a judge: any ONNX network with an image input, a user's or one that the bundle brings.

The network takes float32 [N, 3, H, W] in [0, 1] and gives features [N, D] and, if it likes, logits [N, classes]; what
a protocol wants of its input (another size, another range) stands inside it, so that there is one place for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_export.arrays import read_arrays
from dit_export.verify.baseline import LIMITS
from dit_export.verify.distribution import Floats, Gaussian, balanced_labels, fit, gaussian_distance, inception_score
from dit_export.verify.metrics import unit
from dit_runtime import images
from dit_runtime.bundle import manifest
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.bundle.records import LABELS
from dit_runtime.conditions.condition import Rows
from dit_runtime.errors import BundleError, UsageError
from dit_runtime.pipeline import Pipeline
from dit_runtime.verify import Figure, Reference

CHUNK = 64  # pictures at a time
FEWEST = 100  # for a distance between distributions
FILE = "an .npz of features or pictures"
NUMBERS = "fiu"  # NumPy's kinds


class Judged(NamedTuple):
    features: Floats  # (N, D)
    logits: Floats | None  # (N, classes)


class Seen(NamedTuple):
    judged: Judged
    labels: NDArray[np.int64] | None  # what was asked for
    psnr: list[float]  # to the other bundle's pictures of the same seeds, where there is one
    ssim: list[float]


Judge = Callable[[NDArray[np.uint8]], Judged]


class OnnxJudge:
    """A network of the user's on ONNX Runtime."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        try:
            import onnxruntime as ort
        except ImportError:
            raise UsageError("--features needs onnxruntime: pip install 'dit-runtime[onnxruntime]'") from None
        if not path.is_file():
            raise UsageError(f"{path}: no such file; expected an ONNX network with an image input")
        settings = ort.SessionOptions()
        settings.log_severity_level = 4  # what fails is said by us
        if threads:
            settings.intra_op_num_threads = threads
        try:
            self._session: Any = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class but this
            raise UsageError(f"{path}: ONNX Runtime does not open it: {str(error).splitlines()[0]}") from None
        inputs, names = self._session.get_inputs(), [output.name for output in self._session.get_outputs()]
        if (
            len(inputs) != 1
            or len(inputs[0].shape) != 4
            or inputs[0].shape[1] != 3
            or inputs[0].type != "tensor(float)"
        ):
            got = ", ".join(f"{tensor.name} {tensor.type} {tensor.shape}" for tensor in inputs)
            raise UsageError(f"{path}: takes {got}; expected one input, tensor(float) [N, 3, H, W] in [0, 1]")
        if "features" not in names and len(names) != 1:
            raise UsageError(f"{path}: gives {', '.join(names)}; name the output to compare 'features'")
        self._features = "features" if "features" in names else names[0]
        self._logits = "logits" if "logits" in names and self._features != "logits" else None
        self._path, self._input = path, inputs[0]

    def __call__(self, pictures: NDArray[np.uint8]) -> Judged:
        rows, *size = (self._input.shape[axis] for axis in (0, 2, 3))
        for got, want in zip(pictures.shape[1:3], size, strict=True):
            if isinstance(want, int) and want != got:
                raise UsageError(
                    f"{self._path}: takes pictures of {size[0]} × {size[1]}, got {pictures.shape[1]} × "
                    f"{pictures.shape[2]}; put the resize that its protocol asks for into the network"
                )
        batch = rows if isinstance(rows, int) else len(pictures)
        names = [self._features] + ([self._logits] if self._logits else [])
        parts = []
        for first in range(0, len(pictures), batch):
            some = pictures[first : first + batch].transpose(0, 3, 1, 2).astype(np.float32) / 255
            count = len(some)
            some = np.concatenate([some, np.repeat(some[-1:], batch - count, 0)]) if count < batch else some
            try:
                arrays = self._session.run(names, {self._input.name: some})
            except Exception as error:  # a size that something inside does not take
                (height, width), reason = pictures.shape[1:3], str(error).splitlines()[0]
                raise UsageError(f"{self._path}: fails on pictures of {height} × {width}: {reason}") from None
            parts.append([np.atleast_1d(array)[:count] for array in arrays])
        features, *logits = (np.concatenate(part) for part in zip(*parts, strict=True))
        if features.ndim < 2 or features.size != len(pictures) * features.shape[1]:
            raise UsageError(f"{self._path}: features have shape {list(features.shape)}; expected [N, D]: pool them")
        judged = Judged(features.reshape(len(pictures), -1), logits[0] if logits else None)
        _require_tables(self._path, judged)
        return judged


class Draw(NamedTuple):
    """The pictures to ask a bundle for; number i has seed i, so that more pictures begin with the same ones."""

    condition: Rows  # a row a picture
    negative: Rows | None
    labels: NDArray[np.int64] | None  # the classes, where the bundle takes classes
    pictures: int

    def __call__(self, pipe: Pipeline) -> Iterator[NDArray[np.uint8]]:
        for first in range(0, self.pictures, CHUNK):
            part = slice(first, min(first + CHUNK, self.pictures))
            condition = {name: rows[part] for name, rows in self.condition.items()}
            seeds = list(range(part.start, part.stop))
            yield pipe.sample(condition=condition, negative=self.negative, seed=seeds)


def plan_draw(contract: Manifest, reference: Reference, count: int) -> Draw:
    """Ask for all classes as often, or for the reference's conditions in turn."""
    own = {name: rows[np.arange(count) % len(rows)] for name, rows in reference.condition.items()}
    labels = balanced_labels(count, contract.classes) if contract.classes else None
    if labels is not None:
        own[LABELS] = labels
    return Draw(own, reference.negative if contract.without_null else None, labels, count)


def look(
    judge: Judge, pipe: Pipeline, draw: Draw, other: Pipeline | None, on_step: Callable[[int, int], None]
) -> tuple[Seen, Judged | None]:
    """Show the judge pictures of the bundle and, of the same seeds, of another one."""
    ours: list[Judged] = []
    theirs: list[Judged] = []
    psnr: list[float] = []
    ssim: list[float] = []
    others = draw(other) if other is not None else None
    for index, pictures in enumerate(draw(pipe)):
        ours.append(judge(pictures))
        if others is not None:
            same = next(others)
            theirs.append(judge(same))
            psnr += [images.psnr(*pair) for pair in zip(pictures, same, strict=True)]
            ssim += [images.ssim(*pair) for pair in zip(pictures, same, strict=True)]
        on_step(min(draw.pictures, (index + 1) * CHUNK), draw.pictures)
    return Seen(_joined(ours), draw.labels, psnr, ssim), _joined(theirs) if theirs else None


def _joined(parts: list[Judged]) -> Judged:
    logits = [part.logits for part in parts if part.logits is not None]
    return Judged(np.concatenate([part.features for part in parts]), np.concatenate(logits) if logits else None)


def figures(ours: Seen, other: Judged | None, real: Gaussian | None, classes: int) -> list[Figure]:
    """Return agreement, Fréchet distance and Inception Score; another bundle's figures set their limits."""
    where = f"{len(ours.judged.features)} pictures"

    def measure(judged: Judged) -> Iterator[Figure]:
        logits, labels = judged.logits, ours.labels
        if logits is not None and labels is not None and logits.shape[1] == classes:
            agreement = float((logits.argmax(1) == labels).mean())
            yield Figure("run", "judge's agreement, share", agreement, at_least=True, where=where)
        if real is not None:
            distance = gaussian_distance(fit(judged.features), real)
            yield Figure("run", "to real pictures, Fréchet distance", distance, where=where)
        if logits is not None:
            yield Figure("run", "Inception, score", inception_score(logits), at_least=True, where=where)

    limits = {} if other is None else {same.metric: LIMITS[unit(same)](same) for same in measure(other)}
    measured = [replace(figure, limit=limits.get(figure.metric)) for figure in measure(ours.judged)]
    if ours.psnr:
        finite = np.minimum(ours.psnr, 100.0)  # equal pictures are ∞ dB
        for metric, value in (("PSNR in dB", finite.mean()), ("SSIM", np.mean(ours.ssim))):
            measured.append(Figure("run", f"same seed, mean, {metric}", float(value), at_least=True, where=where))
    return measured


def read_real(path: Path, judge: Judge | None) -> Gaussian:
    """Read an .npz: `mu` and `sigma` as ADM's references have them, `features` (N, D), or `arr_0`, pictures."""
    arrays = read_arrays(path, FILE, alone={"mu", "sigma"})  # ADM's references hold thousands of pictures besides
    if {"mu", "sigma"} <= set(arrays):
        mean, covariance = arrays["mu"], arrays["sigma"]
        numbers = {mean.dtype.kind, covariance.dtype.kind} <= {*NUMBERS}
        if not numbers or mean.ndim != 1 or covariance.shape != 2 * mean.shape:
            raise UsageError(
                f"{path}: mu is {list(mean.shape)} and sigma {list(covariance.shape)}; expected [D], [D, D] of numbers"
            )
        return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))
    return fit(_judged(path, arrays, judge).features)


def read_samples(path: Path, judge: Judge | None) -> Seen:
    """Read an .npz: `features` and maybe `logits`; or `arr_0`, pictures, and maybe `arr_1`, their labels."""
    arrays = read_arrays(path, FILE)
    judged, labels = _judged(path, arrays, judge), arrays.get("arr_1", arrays.get("labels"))
    if labels is not None and (labels.shape != (len(judged.features),) or labels.dtype.kind not in NUMBERS):
        expected = f"[{len(judged.features)}] of numbers"
        raise UsageError(f"{path}: labels are {labels.dtype} {list(labels.shape)}; expected {expected}")
    return Seen(judged, labels, [], [])


def require_width(judged: Judged, real: Gaussian | None) -> None:
    """Refuse real pictures' statistics that are of other features."""
    if real is not None and real.mean.shape != judged.features.shape[1:]:
        raise UsageError(
            f"{len(real.mean)} features a picture in --real, {judged.features.shape[1]} in what is compared with it; "
            "expected those of one network"
        )


def _judged(path: Path, arrays: dict[str, NDArray[Any]], judge: Judge | None) -> Judged:
    if "features" in arrays:
        judged = Judged(arrays["features"], arrays.get("logits"))
    elif "" in arrays:
        raise UsageError(f"{path}: one array without a name; expected {FILE}")
    elif "arr_0" not in arrays:
        raise UsageError(f"{path}: holds {', '.join(arrays)}; expected features, arr_0 (pictures), or mu and sigma")
    elif judge is None:
        raise UsageError(f"{path}: holds pictures, so a network must look at them: pass --features FILE.onnx")
    else:
        pictures = arrays["arr_0"]
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3 or not len(pictures):
            raise UsageError(f"{path}: arr_0 is {pictures.dtype} {list(pictures.shape)}; expected uint8 [N, H, W, 3]")
        judged = _joined([judge(pictures[first : first + CHUNK]) for first in range(0, len(pictures), CHUNK)])
    _require_tables(path, judged)
    if len(judged.features) < 2:
        raise UsageError(f"{path}: features have shape {list(judged.features.shape)}; expected [N, D], N at least 2")
    return judged


def _require_tables(path: Path, judged: Judged) -> None:
    """Refuse features and logits that are not numbers, a row a picture."""
    for name, array in judged._asdict().items():
        if array is None:
            continue
        if array.ndim != 2 or array.dtype.kind not in NUMBERS:
            raise UsageError(f"{path}: {name} are {array.dtype} {list(array.shape)}; expected [N, D] of numbers")
        if len(array) != len(judged.features):
            raise UsageError(
                f"{path}: {len(array)} rows of {name}, {len(judged.features)} of features; expected as many"
            )


def own_judge(folder: Path, contract: Manifest, threads: int | None) -> tuple[OnnxJudge, Gaussian | None, str] | None:
    """Return the bundle's own judge, what it says of real pictures, and its sha256; None where there is none.

    The manifest names both: `"built_with": {"judge": {"features": "judge.onnx", "real": "judge.npz"}}`.
    """
    table = contract.built_with.get("judge")
    if not table:
        return None
    try:
        names = [str(table[key]) for key in ("features", "real") if key in table]
        network, *real = names
    except (TypeError, KeyError, ValueError):
        raise BundleError(f"{folder}: built_with says {table!r} of its judge; expected features and real") from None
    manifest.check_files(folder, contract, names)
    judge = OnnxJudge(manifest.inside(folder, network), threads)
    numbers = read_real(manifest.inside(folder, real[0]), judge) if real else None
    return judge, numbers, contract.files[network].sha256

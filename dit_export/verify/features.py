"""Pictures before a judge: any ONNX network with an image input, or, for a bundle of the demo, the demo's own.

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
from dit_export.verify.distribution import (
    Floats,
    Gaussian,
    balanced_labels,
    fit,
    gaussian_distance,
    inception_score,
)
from dit_export.verify.metrics import Metric
from dit_runtime import images
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.errors import UsageError
from dit_runtime.pipeline import Pipeline

STEPS, GUIDANCE = 25, 4.0  # as `dit-run sample` draws
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
            raise UsageError("--features needs onnxruntime: pip install 'dit-export[onnxruntime]'") from None
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
                found = self._session.run(names, {self._input.name: some})
            except Exception as error:  # a size that something inside does not take
                (height, width), reason = pictures.shape[1:3], str(error).splitlines()[0]
                raise UsageError(f"{self._path}: fails on pictures of {height} × {width}: {reason}") from None
            parts.append([np.atleast_1d(array)[:count] for array in found])
        features, *logits = (np.concatenate(part) for part in zip(*parts, strict=True))
        if features.ndim < 2 or features.size != len(pictures) * features.shape[1]:
            raise UsageError(f"{self._path}: features have shape {list(features.shape)}; expected [N, D]: pool them")
        judged = Judged(features.reshape(len(pictures), -1), logits[0] if logits else None)
        _require_tables(self._path, judged)
        return judged


def draw(pipe: Pipeline, labels: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    """Picture i has seed i, so that more pictures begin with the same ones."""
    for first in range(0, len(labels), CHUNK):
        part = labels[first : first + CHUNK]
        seeds = list(range(first, first + len(part)))
        yield pipe.sample([int(label) for label in part], steps=STEPS, guidance=GUIDANCE, seed=seeds)


def look(
    judge: Judge, pipe: Pipeline, count: int, other: Pipeline | None, on_step: Callable[[int, int], None]
) -> tuple[Seen, Judged | None]:
    """Pictures of the bundle and, of the same seeds, of another one, before the judge."""
    labels = balanced_labels(count, pipe.manifest.num_classes)
    ours: list[Judged] = []
    theirs: list[Judged] = []
    psnr: list[float] = []
    ssim: list[float] = []
    others = draw(other, labels) if other is not None else None
    for index, pictures in enumerate(draw(pipe, labels)):
        ours.append(judge(pictures))
        if others is not None:
            same = next(others)
            theirs.append(judge(same))
            psnr += [images.psnr(*pair) for pair in zip(pictures, same, strict=True)]
            ssim += [images.ssim(*pair) for pair in zip(pictures, same, strict=True)]
        on_step(min(count, (index + 1) * CHUNK), count)
    return Seen(_joined(ours), labels, psnr, ssim), _joined(theirs) if theirs else None


def _joined(parts: list[Judged]) -> Judged:
    logits = [part.logits for part in parts if part.logits is not None]
    return Judged(np.concatenate([part.features for part in parts]), np.concatenate(logits) if logits else None)


def metrics(seen: Seen, other: Judged | None, real: Gaussian | None, classes: int) -> list[Metric]:
    """Agreement, Fréchet distance and Inception Score; beside another bundle they must keep to its figures."""
    where = f"{len(seen.judged.features)} pictures"

    def of(judged: Judged) -> Iterator[Metric]:
        logits, labels = judged.logits, seen.labels
        if logits is not None and labels is not None and logits.shape[1] == classes:
            yield Metric("run", "judge's agreement", "share", float((logits.argmax(1) == labels).mean()), where)
        if real is not None:
            distance = gaussian_distance(fit(judged.features), real)
            yield Metric("run", "to real pictures", "Fréchet distance", distance, where)
        if logits is not None:
            yield Metric("run", "Inception", "score", inception_score(logits), where)

    limits = {} if other is None else {same.key: LIMITS[same.unit](same) for same in of(other)}
    found = [replace(metric, limit=limits.get(metric.key)) for metric in of(seen.judged)]
    if seen.psnr:
        finite = np.minimum(seen.psnr, 100.0)  # equal pictures are ∞ dB
        found.append(Metric("run", "same seed, mean", "PSNR in dB", float(finite.mean()), where))
        found.append(Metric("run", "same seed, mean", "SSIM", float(np.mean(seen.ssim)), where))
    return found


def read_real(path: Path, judge: Judge | None) -> Gaussian:
    """From an .npz: `mu` and `sigma` as ADM's references have them, `features` (N, D), or `arr_0`, pictures."""
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
    """From an .npz: `features` and, if there, `logits`; or `arr_0`, pictures, and, if there, `arr_1`, their labels."""
    arrays = read_arrays(path, FILE)
    judged, labels = _judged(path, arrays, judge), arrays.get("arr_1", arrays.get("labels"))
    if labels is not None and (labels.shape != (len(judged.features),) or labels.dtype.kind not in NUMBERS):
        expected = f"[{len(judged.features)}] of numbers"
        raise UsageError(f"{path}: labels are {labels.dtype} {list(labels.shape)}; expected {expected}")
    return Seen(judged, labels, [], [])


def require_width(judged: Judged, real: Gaussian | None) -> None:
    """Refuses real pictures' statistics that are of other features."""
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
    """Refuses features and logits that are not numbers, a row a picture."""
    for name, array in judged._asdict().items():
        if array is None:
            continue
        if array.ndim != 2 or array.dtype.kind not in NUMBERS:
            raise UsageError(f"{path}: {name} are {array.dtype} {list(array.shape)}; expected [N, D] of numbers")
        if len(array) != len(judged.features):
            raise UsageError(
                f"{path}: {len(array)} rows of {name}, {len(judged.features)} of features; expected as many"
            )


def is_demo(contract: Manifest) -> bool:
    """Whether the demo's judge, which ships, knows these classes."""
    from dit_export.demo import data

    if contract.labels != data.CLASSES:
        return False
    try:
        from dit_export.demo import store
    except ImportError:  # it needs PyTorch
        return False
    return (store.MODEL / "judge").is_dir()


def demo_judge() -> tuple[Judge, Gaussian]:
    """The judge, and held-out pictures before it."""
    import torch

    from dit_export.demo import score, store

    judge = store.load_judge(store.MODEL)

    def look_at(pictures: NDArray[np.uint8]) -> Judged:
        with torch.no_grad():
            logits, features = judge(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
        return Judged(features.double().numpy(), logits.numpy())

    return look_at, fit(score.reference_features(judge))

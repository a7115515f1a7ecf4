"""Shards drawn by the machines of a Ray cluster: an actor for each, which opens the bundle and draws shard by shard.

Actors and their calls are started again where a process or a machine dies. The bundle and the folder of the shards must
be at the same place on each machine, as on a shared disk.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_runtime import shards
from dit_runtime.bundle import manifest
from dit_runtime.errors import EngineError, Stopped, UsageError
from dit_runtime.pipeline import Pipeline
from dit_runtime.shards import Report, Series

RETRIES = 3  # of a call whose worker died: a shard that ends all its workers ends the run


class Worker:
    """Draws shards; Ray makes it an actor."""

    def __init__(self, bundle: Path, series: Series, folder: Path, options: Mapping[str, Any]) -> None:
        self._bundle, self._series, self._folder, self._options = bundle, series, folder, options
        self._pipe: Pipeline | None = None

    def open(self) -> Pipeline:
        """Open the bundle where it is not open: here, because Ray reports no errors of a constructor as they are."""
        if self._pipe is None:
            if manifest.sha256(self._bundle / manifest.NAME) != self._series.sha256:
                raise UsageError(f"{self._bundle}: another bundle than the one where the series was started")
            self._pipe = Pipeline.load(self._bundle, **self._options)
        return self._pipe

    def ready(self) -> None:
        self.open()

    def draw(self, shard: int) -> int:
        """Draw a shard, unless a worker did that died before it could say so."""
        pipe = self.open()
        if not shards.is_whole(self._folder, self._series, shard, shards.picture_shape(pipe.manifest, self._series)):
            shards.draw(pipe, self._series, self._folder, shard)
        return shard


def run(
    bundle: Path,
    series: Series,
    folder: Path,
    todo: Sequence[int],
    report: Report,
    *,
    address: str | None,
    workers: int | None,
    options: Mapping[str, Any],
) -> None:
    """Draw the missing shards on the cluster at `address`; None: on the one that RAY_ADDRESS or Ray itself names, or on
    a new one of this machine."""
    try:
        import ray
    except ImportError:
        raise UsageError("--ray needs the package ray: pip install 'dit-runtime[ray]'") from None
    _require_listener(address)
    try:
        ray.init(address=address, include_dashboard=False, logging_level="warning", log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"--ray {address or ''}: {error}") from None
    try:
        gpu = (options.get("provider") or "").startswith("cuda")
        machines = sum(node["Alive"] for node in ray.nodes())
        places = workers or (int(ray.cluster_resources().get("GPU", 0)) if gpu else machines) or 1
        actor = ray.remote(
            num_cpus=options.get("threads") or 1,
            num_gpus=int(gpu),
            max_restarts=-1,
            max_task_retries=RETRIES,
            scheduling_strategy="SPREAD",
        )(Worker)
        arguments = (bundle.absolute(), series, folder.absolute(), options)
        idle = [actor.remote(*arguments) for _ in range(min(places, len(todo)))]
        _draw(ray, series, idle, todo, report)
    finally:
        ray.shutdown()


def _require_listener(address: str | None) -> None:
    """Refuse an address where nothing listens: Ray itself would wait for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10):
            pass
    except (OSError, OverflowError) as error:
        raise UsageError(f"--ray {address}: no cluster answers there: {error}") from None


def _draw(ray: Any, series: Series, workers: Sequence[Any], todo: Sequence[int], report: Report) -> None:
    """Give each worker that is open the next shard, until all are drawn; one without a machine gets none."""
    waiting, left = deque(todo), set(todo)
    calls = {worker.ready.remote(): worker for worker in workers}
    while left:
        (call, *_), _ = ray.wait([*calls])
        worker = calls.pop(call)
        try:
            shard = ray.get(call)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UsageError | EngineError | OSError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            first = str(error).strip().splitlines()[0]
            raise Stopped(f"a worker was lost: {first}; the same command draws what is missing") from None
        left.discard(shard)
        report(series.count - sum(len(series.numbers(number)) for number in left), series.count)
        if waiting:
            calls[worker.draw.remote(waiting.popleft())] = worker

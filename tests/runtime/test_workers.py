"""The pool of Ray's actors, on a double of Ray whose calls end in an order that the test chooses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dit_runtime import EngineError, UsageError, cluster, shards
from dit_runtime.bundle import manifest
from dit_runtime.cli import main
from dit_runtime.errors import Stopped
from dit_runtime.shards import Series


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__("a task failed")
        self.cause = cause


class Ray:
    """Runs a call when it is waited for: of the calls under way the last, unless its worker never gets a machine."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, draw: Callable[[int], int], lost: int | None = None) -> None:
        self.draw, self.lost, self.drawn = draw, lost, []

    def worker(self, number: int) -> Any:
        def call(work: Callable[..., Any]) -> Any:
            return SimpleNamespace(remote=lambda *arguments: (number, work, arguments, object()))

        return SimpleNamespace(ready=call(lambda: None), draw=call(self._draw))

    def _draw(self, shard: int) -> int:
        self.drawn.append(shard)
        return self.draw(shard)

    def wait(self, calls: list[Any]) -> tuple[list[Any], list[Any]]:
        able = [call for call in calls if call[0] != self.lost]
        assert able, "all wait for a worker without a machine"
        return [able[-1]], [call for call in calls if call is not able[-1]]

    def get(self, call: Any) -> Any:
        return call[1](*call[2])


def drawing(ray: Ray, todo: list[int]) -> list[tuple[int, int]]:
    reports: list[tuple[int, int]] = []
    workers = [ray.worker(number) for number in range(3)]
    cluster._draw(ray, Series("", 48, 5), workers, todo, lambda *report: reports.append(report))
    return reports


def test_each_shard_once_whoever_is_slow() -> None:
    """A worker that never gets a machine holds no shard."""
    for lost in (None, 0, 1, 2):
        ray = Ray(lambda shard: shard, lost)
        reports = [report for report in drawing(ray, [1, 3, 9]) if report != (35, 48)]  # before the first is done
        assert sorted(ray.drawn) == [1, 3, 9]
        assert reports[-1] == (48, 48) and len(reports) == 3  # the last shard has 3 pictures


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RayTaskError(UsageError("damaged")), UsageError, "damaged"),
        (RayTaskError(EngineError("NaN")), EngineError, "NaN"),
        (RayTaskError(KeyError("a bug")), RayTaskError, "a task failed"),
        (RayError("The actor died\nand more"), Stopped, "a worker was lost: The actor died; the same command draws"),
    ],
)
def test_what_a_worker_says(error, kind, words) -> None:
    def draw(shard: int) -> int:
        raise error

    with pytest.raises(kind, match=words):
        drawing(Ray(draw), [0, 1])


def test_a_worker_draws_what_is_not_there(handmade, tmp_path) -> None:
    """The pictures of a worker before it stay; another bundle than the driver's is refused."""
    bundle = handmade("labels")
    series = Series(manifest.sha256(bundle / manifest.NAME), 4, 2, labels=[1], fields={"steps": 2})
    worker = cluster.Worker(bundle, series, tmp_path, {"threads": 1})
    worker.ready()
    assert [worker.draw(0), worker.draw(1)] == [0, 1]
    times = [shards.path(tmp_path, shard).stat().st_mtime_ns for shard in (0, 1)]
    shards.path(tmp_path, 1).write_bytes(b"torn")
    assert [worker.draw(0), worker.draw(1)] == [0, 1]
    assert shards.path(tmp_path, 0).stat().st_mtime_ns == times[0]
    assert shards.missing(tmp_path, series, (32, 32, 3)) == []
    worker.open().close()
    other = cluster.Worker(handmade("wide"), series, tmp_path, {})
    with pytest.raises(UsageError, match="another bundle"):
        other.ready()


def test_without_ray(handmade, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["sample", str(handmade("labels")), "--count", "2", "--shards", str(tmp_path / "shards"), "--ray"]
    assert main(words) == 2
    assert capsys.readouterr().err == "dit-run: error: --ray needs the package ray: pip install 'dit-runtime[ray]'\n"


def test_shards_that_others_do_not_see(handmade, tmp_path, capsys, monkeypatch) -> None:
    """Workers that write to their own disks are found out."""
    monkeypatch.setattr(cluster, "run", lambda *arguments, **options: None)
    folder: Path = tmp_path / "shards"
    assert main(["sample", str(handmade("labels")), "--count", "2", "--shards", str(folder), "--ray"]) == 1
    assert "1 shards that were drawn are not here: is it a shared folder?" in capsys.readouterr().err

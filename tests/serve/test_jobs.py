"""Jobs: their events, previews and ends, and how many of them are held."""

from __future__ import annotations

import asyncio
import base64
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from dit_serve.app import Settings
from dit_serve.jobs import Jobs
from tests.serve.serving import WAIT, Running, events, pixels, running, start, until
from tests.serve.watched import Watched


def test_a_job_and_its_events(held: tuple[Running, Watched]) -> None:
    server, watched = held
    job = start(server, n=2, previews=1, num_inference_steps=4, seed=3)
    assert server.ask("GET", f"/v1/jobs/{job}").json["status"] == "queued"
    stream = events(server, job)
    name, table = next(stream)
    assert (name, table["steps_done"], table["steps"]) == ("progress", 0, 8)
    watched.gate.release(10**6)
    rest = [*stream]
    assert rest[-1][0] == "succeeded" and {name for name, _ in rest[:-1]} <= {"progress", "preview"}
    counts = [table["steps_done"] for name, table in rest if name == "progress"]
    assert counts == sorted(counts)
    shown = server.ask("GET", f"/v1/jobs/{job}").json
    assert shown == rest[-1][1] and shown["steps_done"] == 8
    assert [image["seed"] for image in shown["result"]["data"]] == [3, 4]
    assert [*events(server, job)] == [("succeeded", shown)]
    assert server.ask("DELETE", f"/v1/jobs/{job}").json["deleted"]
    assert server.ask("GET", f"/v1/jobs/{job}").status == 404


def test_previews_reach_who_follows(held: tuple[Running, Watched]) -> None:
    server, watched = held
    stream = events(server, start(server, previews=3, num_inference_steps=8))
    for number in (2, 4, 6):
        watched.gate.release(2)
        table = next(table for name, table in stream if name == "preview")
        assert table["number"] == number and pixels(base64.b64decode(table["b64_json"])).shape == (32, 32, 3)
    watched.gate.release(2)
    assert [name for name, _ in stream][-1] == "succeeded"


def test_a_job_is_cancelled(held: tuple[Running, Watched]) -> None:
    server, watched = held
    job = start(server, num_inference_steps=50)
    assert watched.entered.acquire(timeout=WAIT)
    assert server.ask("DELETE", f"/v1/jobs/{job}").status == 200
    watched.gate.release(2)
    until(lambda: server.ask("GET", f"/v1/jobs/{job}").json["status"] == "cancelled", WAIT / 3)
    assert server.model.batcher.active == 0 and len(watched.calls) <= 2


def test_a_job_ends_once(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of its other images, which are heard later, do not bring it back; no error keeps it from its end."""

    async def fail_and_hear() -> list[str]:
        job = server.service.jobs.add()
        job.progress = [(0, 9), (0, 9)]
        job.finish("failed", {})
        server.service._heard(job, 1, 3, 9, None)
        return [name async for name, _ in job.events()]

    assert asyncio.run(fail_and_hear()) == ["failed"]
    monkeypatch.setattr("dit_serve.drawing.encode", None)
    assert [name for name, _ in events(server, start(server, num_inference_steps=2))][-1] == "failed"


def test_what_is_under_way_has_the_grace_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the signal on, however often it comes; after it a job is stopped between two steps."""
    with running(folder, places=2, settings=Settings(grace=5)) as server:
        engines = server.model.batcher.pipe.engines
        watched = Watched(engines.opened["denoiser"])
        engines._opened["denoiser"] = watched
        watched.hold()
        service, job = server.service, start(server, num_inference_steps=250)
        assert watched.entered.acquire(timeout=WAIT)
        now = 100.0
        monkeypatch.setattr("dit_serve.app.time", SimpleNamespace(monotonic=lambda: now))
        service.drain()
        now = 104.0
        service.drain()
        assert service._until == 105
        now = 106.0
        (ticket,) = server.model.batcher._scheduler.jobs

        def let_go() -> None:
            until(lambda: ticket.cancelled)
            watched.gate.release(2)

        waiting = threading.Thread(target=let_go)
        waiting.start()
    waiting.join()
    assert not server.model.batcher.alive and len(watched.calls) <= 2
    assert service.jobs.get(job).status == "cancelled"


def test_only_so_many_jobs_are_held() -> None:
    jobs = Jobs(kept=1000, most=2)
    first, _ = jobs.add(), jobs.add()
    with pytest.raises(Exception, match="2 jobs are under way"):
        jobs.add()
    first.finish("succeeded", {})
    third = jobs.add()
    with pytest.raises(Exception, match="no job has this id"):
        jobs.get(first.id)
    third.finish("succeeded", {})
    third.ended -= 1001
    with pytest.raises(Exception, match="no job has this id"):
        jobs.get(third.id)


def test_the_images_of_jobs_are_bounded() -> None:
    """Jobs that ended first go; the last one stays, whatever it has, and so do jobs without images."""
    jobs = Jobs(most_bytes=100)
    drawn = [jobs.add() for _ in range(4)]
    jobs.finish(failed := jobs.add(), "failed", {"error": {}})
    for job in (drawn[1], drawn[0], drawn[2]):
        jobs.finish(job, "succeeded", {"data": [{"b64_json": "x" * 25}] * 2})
    with pytest.raises(Exception, match="no job has this id"):
        jobs.get(drawn[1].id)
    assert [jobs.get(job.id) for job in (failed, drawn[0], drawn[2])]
    jobs.finish(drawn[3], "succeeded", {"data": [{"b64_json": "x" * 101}]})
    assert list(jobs._jobs) == [drawn[3].id, failed.id]

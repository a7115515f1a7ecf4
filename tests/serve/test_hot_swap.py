"""Another bundle in the place of one that is served, and the process's signals."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from dit_runtime.errors import BundleError, UsageError
from dit_serve.models import Model, Opening, open_bundle
from tests import tamper
from tests.serve.serving import WAIT, process, running, start, until
from tests.serve.watched import Watched


def digest(folder: Path) -> str:
    return sha256((folder / "manifest.json").read_bytes()).hexdigest()


def rename(folder: Path, name: str) -> None:
    """Make another sound bundle of one: its network has another name."""
    tamper.edit(folder, lambda table: table["model"].update(name=name))


def break_weight(folder: Path) -> None:
    """Change one weight of the network, and make every sum right again."""
    graph = next(name for name, shape in tamper.shapes(folder, "denoiser") if len(shape) == 2)
    tamper.weight(folder, "denoiser", name=graph)[0, 0] += 1.0
    tamper.seal(folder)


@pytest.fixture
def link(handmade, tmp_path) -> Path:
    """A link to a copy of a bundle, as a deployment has it."""
    shutil.copytree(handmade("labels"), tmp_path / "v1")
    (tmp_path / "live").symlink_to("v1")
    return tmp_path / "live"


def point(link: Path, version: Path) -> None:
    link.unlink()
    link.symlink_to(version.name)


def test_no_request_fails_while_bundles_are_swapped(link: Path) -> None:
    with running(link) as server:
        answers: list[int] = []
        ended = threading.Event()

        def client(seed: int) -> None:
            while not ended.is_set():
                answers.append(server.draw(seed=seed, num_inference_steps=8, guidance_scale=3.0).status)

        clients = [threading.Thread(target=client, args=(seed,)) for seed in range(3)]
        for thread in clients:
            thread.start()
        first = server.model.batcher
        for version in ("v2", "v3"):
            new = Path(shutil.copytree(link.resolve(), link.with_name(version)))
            rename(new, version)
            point(link, new)
            drawn = len(answers)
            assert server.model.swap() and server.model.served.sha256 == digest(new)
            until(lambda drawn=drawn: len(answers) > drawn + 3)
        ended.set()
        for thread in clients:
            thread.join(WAIT)
        assert {*answers} == {200} and not first.alive
        assert server.model.swaps == {"swapped": 2} and server.model.manifest.model["name"] == "v3"
        assert server.model.swap() and server.model.swaps == {"swapped": 2}  # what is served already is left alone


def test_an_old_bundle_that_drains_holds_up_nothing(link: Path) -> None:
    """Neither requests nor the next swap; and it finishes what it has."""
    with running(link) as server:
        first = server.model.batcher
        watched = Watched(first.pipe.engines.opened["denoiser"])
        first.pipe.engines._opened["denoiser"] = watched
        watched.hold()
        answers: list[int] = []
        drawing = threading.Thread(target=lambda: answers.append(server.draw(num_inference_steps=9).status))
        drawing.start()
        assert watched.entered.acquire(timeout=WAIT)
        swaps = []
        for version in ("v2", "v3"):
            new = Path(shutil.copytree(link.resolve(), link.with_name(version)))
            rename(new, version)
            point(link, new)
            swaps.append(threading.Thread(target=server.model.swap))
            swaps[-1].start()
            until(lambda new=new: server.model.served.sha256 == digest(new))
            assert server.draw(num_inference_steps=2).status == 200
        swaps[1].join(WAIT)
        assert first.alive and not answers and swaps[0].is_alive()
        watched.gate.release(10**6)
        for thread in (drawing, swaps[0]):
            thread.join(WAIT)
        assert answers == [200] and not first.alive and server.model.swaps == {"swapped": 2}


def test_a_request_that_meets_a_closing_bundle_gets_the_new_one(link: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(link) as server:
        old = server.model.batcher
        new = Path(shutil.copytree(link.resolve(), link.with_name("v2")))
        rename(new, "v2")
        point(link, new)
        assert server.model.swap() and not old.alive
        batchers = iter([old])
        monkeypatch.setattr(Model, "batcher", property(lambda model: next(batchers, model.served.batcher)))
        assert server.draw(num_inference_steps=2).status == 200 and next(batchers, None) is None


def test_one_wrong_weight_never_serves_a_picture(link: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(link) as server:
        before, batcher = digest(link), server.model.batcher
        expected = server.draw(seed=1, response_format="bytes").body
        broken = Path(shutil.copytree(link.resolve(), link.with_name("v2")))
        break_weight(broken)
        point(link, broken)
        assert digest(link) != before
        assert not server.model.swap()
        assert server.model.batcher is batcher and server.model.served.sha256 == before
        assert "verification failed: denoiser" in server.model.refusal
        ready = server.ask("GET", "/readyz")
        assert ready.status == 200 and "verification failed" in ready.json["models"]["demo"]["refused"]
        assert b'dit_swaps_total{model="demo",result="refused"} 1.0' in server.ask("GET", "/metrics").body
        assert server.draw(seed=1, response_format="bytes").body == expected
        point(link, link.with_name("v1"))
        assert server.model.swap()
    with pytest.raises(BundleError, match="verification failed"):
        open_bundle(broken, Opening(threads=1))


def test_pins(link: Path) -> None:
    with pytest.raises(BundleError, match="which no --pin names"):
        open_bundle(link, Opening(threads=1, verify=False, pins=["0" * 64]))
    with running(link, pins=[digest(link)]) as server:
        other = Path(shutil.copytree(link.resolve(), link.with_name("v2")))
        rename(other, "other")
        point(link, other)
        assert not server.model.swap() and "which no --pin names" in server.model.refusal
    with pytest.raises(BundleError, match="of no file"):
        open_bundle(link.with_name("nothing"), Opening(pins=["0" * 64]))


def test_no_shared_calls_where_pictures_depend_on_them(link: Path) -> None:
    with pytest.raises(UsageError, match=r"--batch is 2, but pictures .* or pass --allow-batch-variance"):
        open_bundle(link, Opening(threads=1, verify=False, places=2))
    open_bundle(link, Opening(threads=1, verify=False, places=1)).batcher.close()
    allowed = open_bundle(link, Opening(threads=1, verify=False, places=2, variance=True)).batcher
    assert allowed.places == 2
    allowed.close()


def test_a_manifest_that_changes_while_it_is_opened(link: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changing(pipe: object) -> None:
        rename(link.resolve(), "changed")

    monkeypatch.setattr("dit_serve.models.require_servable", lambda folder, contract: changing(folder))
    with pytest.raises(BundleError, match="changed while it was opened"):
        open_bundle(link, Opening(threads=1))


def test_signals(link: Path) -> None:
    """SIGHUP swaps; SIGTERM finishes the request and the job that are under way, and exits with 0."""
    with process(f"demo={link}", "--grace", "60") as (server, client, lines):
        v2 = Path(shutil.copytree(link.resolve(), link.with_name("v2")))
        rename(v2, "v2")
        point(link, v2)
        os.kill(server.pid, signal.SIGHUP)
        until(lambda: client.ask("GET", "/v1/models/demo").json["sha256"] == digest(v2))

        answers: list[int] = []
        drawing = threading.Thread(target=lambda: answers.append(client.draw(num_inference_steps=250).status))
        drawing.start()
        until(lambda: b'dit_active_images{model="demo"} 0.0' not in client.ask("GET", "/metrics").body or answers)
        job = start(client, n=4, num_inference_steps=250, guidance_scale=3.0)  # ends after the request
        os.kill(server.pid, signal.SIGTERM)
        drawing.join(WAIT)
        assert server.wait(WAIT) == 0 and answers == [200]
    assert [line["event"] for line in lines if line["level"] != "info"] == []
    assert {"swapped", "job ended"} <= {line["event"] for line in lines}
    (ended,) = [line for line in lines if line["event"] == "job ended"]
    assert (ended["job"], ended["status"]) == (job, "succeeded")
    (request,) = [line for line in lines if line.get("path") == "/v1/images/generations"]
    assert request["model"] == "demo" and request["status"] == 200 and request["calls"] == 250
    assert np.all([line[key] for line in lines for key in ("time", "level", "event")])

"""`dit-serve` as its clients see it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from dit_runtime import EngineError, Pipeline, Request
from dit_runtime.bundle.manifest import Manifest, TensorSpec
from dit_runtime.errors import UsageError
from dit_runtime.serve.servable import require_servable
from dit_serve import cli, models
from dit_serve.app import Settings
from dit_serve.body import FILES, OF_FILES, Body, Limits
from dit_serve.jobs import Jobs
from dit_serve.protocol import Protocol
from tests import tamper
from tests.serve.serving import WAIT, Running, running, until
from tests.serve.test_batcher import POISON, Watched

SIZE = "32x32"


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Running]:
    with running(folder) as started:
        yield started


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_openais_client_draws_the_runtimes_pictures(server: Running, folder: Path) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    extra = {"seed": 7, "num_inference_steps": 4, "guidance_scale": 3.0, "solver": "ddim"}
    answer = client.images.generate(model="demo", prompt="bee", n=2, size=SIZE, extra_body=extra)
    with Pipeline.load(folder, threads=1) as pipe:
        expected = pipe.sample(["bee", "bee"], seed=[7, 8], steps=4, guidance=3.0, solver="ddim")
    for image, picture in zip(answer.data, expected, strict=True):
        difference = np.abs(pixels(base64.b64decode(image.b64_json)).astype(int) - picture)
        assert difference.max() <= 1  # this bundle's sums depend on the batch; test_batcher.py compares bits
    assert [image.seed for image in answer.data] == [7, 8]
    assert [model.id for model in client.models.list().data] == ["demo"]
    with pytest.raises(openai.BadRequestError, match="class 'bees' is not known"):
        client.images.generate(prompt="bees")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_bytes(server: Running, kind: str) -> None:
    answer = server.draw(response_format="bytes", output_format=kind, seed=5, num_inference_steps=3)
    assert (answer.status, answer.headers["content-type"], answer.headers["x-seed"]) == (200, f"image/{kind}", "5")
    assert Image.open(io.BytesIO(answer.body)).format == kind.upper()
    assert answer.headers["server-timing"].startswith("queue;dur=")
    again = server.draw(output_format="png", seed=5, num_inference_steps=3).json
    exact = pixels(base64.b64decode(again["data"][0]["b64_json"])).astype(int)
    assert np.abs(pixels(answer.body) - exact).mean() < (1e-9 if kind == "png" else 30)  # another seed's: 85


def test_a_seed_is_drawn_where_none_is_asked_for(server: Running) -> None:
    seeds = [server.draw(num_inference_steps=2).json["data"][0]["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1] and all(0 <= seed < 2**32 for seed in seeds)


BAD: list[tuple[Any, str | None, str]] = [
    ("", None, "not JSON"),
    ("{", None, "not JSON"),
    ('{"prompt": "1", "guidance_scale": NaN}', None, "not JSON"),
    ('{"prompt": "1", "guidance_scale": 1e999}', "guidance_scale", "from 0 to 100"),
    ("[" * 20000, None, "not JSON"),
    (b"\xff\xfe{}", None, "not JSON"),
    ([1], None, "not a JSON object"),
    ({}, "prompt", "prompt is missing"),
    ({"prompt": 1}, "prompt", "a string"),
    ({"prompt": ["a"]}, "prompt", "a string"),
    ({"prompt": "x" * 8001}, "prompt", "at most 8000"),
    ({"prompt": "1", "stepz": 3, "<script>": 1}, None, "not known"),
    ({"prompt": "1", "n": 0}, "n", "from 1 to 8"),
    ({"prompt": "1", "n": 9}, "n", "from 1 to 8"),
    ({"prompt": "1", "n": True}, "n", "an integer"),
    ({"prompt": "1", "n": 1.0}, "n", "an integer"),
    ({"prompt": "1", "n": {}}, "n", "an integer"),
    ({"prompt": "1", "seed": -1}, "seed", "an integer from 0"),
    ({"prompt": "1", "num_inference_steps": 251}, "num_inference_steps", "from 1 to 250"),
    ({"prompt": "1", "num_inference_steps": 10**400}, "num_inference_steps", "from 1 to 250"),
    ({"prompt": "1", "guidance_scale": "4"}, "guidance_scale", "a number"),
    ({"prompt": "1", "size": "64x64"}, "size", "32x32"),
    ({"prompt": "1", "response_format": "url"}, "response_format", "b64_json or bytes"),
    ({"prompt": "1", "response_format": []}, "response_format", "b64_json or bytes"),
    ({"prompt": "1", "response_format": "bytes", "n": 2}, "n", "must be 1"),
    ({"prompt": "1", "output_format": "gif"}, "output_format", "png, jpeg, webp"),
    ({"prompt": "1", "negative_prompt": "x"}, "negative_prompt", "takes no negative_prompt"),
    ({"prompt": "5"}, "prompt", "out of range"),
    ({"prompt": "9" * 5000}, "prompt", "out of range"),
    ({"prompt": ""}, "prompt", "not known"),
    ({"prompt": "x\u202e" * 3000}, "prompt", "not known"),
    ({"prompt": "1", "solver": "x" * 50}, None, "is not known"),
]


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/jobs"])
@pytest.mark.parametrize(("body", "param", "message"), BAD, ids=range(len(BAD)))
def test_bad_bodies_are_400(server: Running, path: str, body: Any, param: str | None, message: str) -> None:
    answer = server.ask("POST", path, body)
    error = answer.json["error"]
    assert answer.status == error["code"] == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and message in error["message"]
    assert "<script>" not in error["message"] and len(error["message"]) <= 320


def test_other_refusals(server: Running) -> None:
    def status(method: str, path: str, body: Any = None, **headers: str) -> int:
        answer = server.ask(method, path, body, **headers)
        assert answer.json["error"]["code"] == answer.status
        return answer.status

    path = "/v1/images/generations"
    assert status("POST", path, {"prompt": "1", "model": "other"}) == 404
    assert status("GET", "/v1/models/other") == status("GET", "/nowhere") == status("GET", "/v1/jobs/x") == 404
    assert status("GET", path) == 405
    assert status("POST", "/v1/images/edits", {"prompt": "1"}) == 415
    assert status("POST", path, "x" * (Limits().body + 1)) == 413
    assert status("POST", path, {"prompt": "1"}, Content_Type="text/plain") == 415  # what a form of another site sends
    assert status("POST", path, {"prompt": "1"}, Host="evil.example:80") == 403
    for origin in ("http://evil.example", "null", "http://localhost.evil.example:80"):  # forms of theirs need no leave
        assert status("POST", path, {"prompt": "1"}, Origin=origin) == 403
    assert status("POST", path, {"prompt": ""}, Origin=f"http://127.0.0.1:{server.port}") == 400
    for length in ("", "Content-Length: 10\r\n"):  # of a chunked body it bounds nothing
        with server.connect() as client:
            head = f"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\n{length}Transfer-Encoding: chunked\r\n\r\n"
            client.sendall(head.encode())
            assert client.recv(100).startswith(b"HTTP/1.1 411")


def test_limits_of_pixels_and_steps(folder: Path) -> None:
    with running(folder, Settings(grace=5, limits=Limits(pixels=2 * 32 * 32, steps=3))) as server:
        assert "pixels" in server.draw(n=3, num_inference_steps=2).json["error"]["message"]
        assert server.draw(n=2, num_inference_steps=2).status == 200
        assert "at most 3" in server.draw().json["error"]["message"]  # the bundle's own number of steps


def test_a_key_is_asked_for(folder: Path) -> None:
    with running(folder, Settings(grace=5, key=b"0123456789abcdef")) as server:
        for path in ("/v1/models", "/metrics", "/v1/jobs/x"):
            assert server.ask("GET", path).status == 401
            assert server.ask("GET", path, Authorization="Bearer 0123456789abcdeg").status == 401
        refused = server.draw()
        assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
        own = {"Authorization": "Bearer 0123456789abcdef"}
        assert server.ask("GET", "/v1/models", **own).status == 200
        assert server.ask("GET", "/v1/models", Host="models.example", **own).status == 200
        for path in ("/", "/healthz", "/readyz"):
            assert server.ask("GET", path).status == 200


def test_it_is_not_open_to_others_without_a_key(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(folder), "--host", "0.0.0.0"]) == 2
    assert "--host 0.0.0.0 is open to others: pass --api-key-file" in capsys.readouterr().err
    (tmp_path / "key").write_text("short\n")
    assert cli.main([str(folder), "--host", "0.0.0.0", "--api-key-file", str(tmp_path / "key")]) == 2
    assert "at least 16 characters" in capsys.readouterr().err
    for option in (["--batch", "0"], ["--deadline", "nan"], ["--max-pixels", "-1"]):
        assert cli.main([str(folder), *option]) == 2
        assert f"{option[0]} is" in capsys.readouterr().err
    for bundles in (["a=x", "a=y"], ["a b=x"]):
        assert cli.main(bundles) == 2
        assert "each name once" in capsys.readouterr().err


def test_without_its_extra_it_says_what_to_install(folder: Path) -> None:
    code = (
        "import sys\nclass Blocker:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('uvicorn', 'starlette'): raise ModuleNotFoundError(name, name=name)\n"
        f"sys.meta_path.insert(0, Blocker())\nfrom dit_serve.cli import main\nsys.exit(main([{str(folder)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "needs the package uvicorn: pip install 'dit-runtime[serve]'" in done.stderr


def test_models(server: Running) -> None:
    (model,) = server.ask("GET", "/v1/models").json["data"]
    assert model == server.ask("GET", "/v1/models/demo").json
    assert (model["sizes"], model["prompt"], model["classes"]) == ([SIZE], "class", 5)
    assert model["labels"][1] == "bee, honey bee" and model["batch_invariant"] is False and model["batch"] == 1


def test_presets(copied) -> None:
    bundle = copied("labels")
    tamper.edit(bundle, lambda table: table.update(presets={"quick": {"steps": 3, "solver": "ddim", "guidance": 2.0}}))
    with running(bundle) as server:
        assert server.ask("GET", "/v1/models/demo").json["presets"] == ["quick"]
        same = {"seed": 1, "response_format": "bytes"}
        quick = server.draw(preset="quick", **same)
        stated = server.draw(num_inference_steps=3, solver="ddim", guidance_scale=2.0, **same)
        assert quick.status == 200 and quick.body == stated.body
        more = server.draw(preset="quick", num_inference_steps=5, **same)  # what a request states wins
        assert (
            more.body
            == server.draw(num_inference_steps=5, solver="ddim", guidance_scale=2.0, **same).body
            != quick.body
        )
        assert "preset 'slow' is not known" in server.draw(preset="slow").json["error"]["message"]


def test_bundles_that_no_prompt_states_are_refused(opened) -> None:
    def refusal(contract: Manifest) -> str:
        with pytest.raises(UsageError) as error:
            require_servable(Path("bundle"), contract)
        return str(error.value)

    assert "takes arrays (captions, mask)" in refusal(opened("captioned").manifest)
    assert "takes arrays (rate)" in refusal(opened("prompted").manifest)
    assert "no decoder" in refusal(opened("wave").manifest)
    labels = opened("labels").manifest
    frames = TensorSpec("images", "float32", ("batch", 3, 2, 32, 32))
    stages = [replace(stage, gives=(frames,)) if stage.runs == "end" else stage for stage in labels.stages]
    assert "draws videos" in refusal(replace(labels, stages=tuple(stages)))
    require_servable(Path("bundle"), labels)


def test_words(handmade, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hand-made bundle also takes a number, which no prompt states: it is filled in here."""
    monkeypatch.setattr(models, "require_servable", lambda folder, contract: None)
    monkeypatch.setattr(models, "Request", partial(Request, condition={"rate": [0.5]}))
    with running(handmade("prompted")) as server:
        model = server.ask("GET", "/v1/models/demo").json
        assert (model["prompt"], model["labels"]) == ("words", [])
        fields = {"seed": 1, "num_inference_steps": 3, "response_format": "bytes"}
        cat, again, dog = (server.draw(words, **fields) for words in ("a cat", "a cat", "a dog"))
        other = server.draw("a cat", negative_prompt="hat", **fields)
        assert cat.status == 200 and cat.body == again.body != dog.body and other.body != cat.body
        long = server.draw("cat " * 50)
        assert long.status == 400 and "is too long" in long.json["error"]["message"]


def events(server: Running, job: str) -> Iterator[tuple[str, Any]]:
    with server.connect() as client:
        client.sendall(f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        lines = client.makefile("r", encoding="utf-8")
        name = ""
        for line in lines:
            if line.startswith("event: "):
                name = line[7:].strip()
            if line.startswith("data: "):
                yield name, json.loads(line[6:])


def start(server: Running, **fields: Any) -> str:
    answer = server.ask("POST", "/v1/jobs", {"prompt": "1", **fields})
    assert (answer.status, answer.headers["location"]) == (202, f"/v1/jobs/{answer.json['id']}")
    return answer.json["id"]


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
    """Those that ended first go; the last one stays, whatever it has, and so do those without images."""
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


def test_a_client_that_leaves_frees_its_place(held: tuple[Running, Watched]) -> None:
    server, watched = held
    body = json.dumps({"prompt": "1", "num_inference_steps": 50})
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with server.connect() as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        assert watched.entered.acquire(timeout=WAIT)
    until(lambda: server.ask("GET", "/metrics").body.count(b'code="499"'))
    watched.gate.release(2)  # at most the call under way and one more
    until(lambda: server.model.batcher.active == 0, WAIT / 3)  # the gate gives up after WAIT
    assert len(watched.calls) <= 2
    watched.gate.release(10**6)
    assert server.draw(num_inference_steps=2).status == 200


def test_an_engine_that_fails_is_500_and_keeps_its_words(
    held: tuple[Running, Watched], caplog: pytest.LogCaptureFixture
) -> None:
    server, watched = held
    watched.gate.release(10**6)
    with caplog.at_level(logging.ERROR, "dit_serve"):
        answer = server.ask(
            "POST", "/v1/images/generations", {"prompt": "1", "guidance_scale": POISON}, X_Request_Id="mine-1"
        )
    assert answer.status == 500 and b"secret" not in answer.body and answer.headers["x-request-id"] == "mine-1"
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.fields["id"] == "mine-1" and isinstance(record.exc_info[1], EngineError)
    job = start(server, guidance_scale=POISON)
    until(lambda: server.ask("GET", f"/v1/jobs/{job}").json["status"] == "failed")
    assert server.ask("GET", f"/v1/jobs/{job}").json["error"]["code"] == 500
    assert server.ask("GET", "/readyz").status == 200


def test_too_busy_is_429(held: tuple[Running, Watched]) -> None:
    server, watched = held
    batcher = server.model.batcher
    for _ in range(400):
        batcher.costs.update("row", 1.0)
    waiting = threading.Thread(target=server.draw, kwargs={"num_inference_steps": 8})
    waiting.start()
    assert watched.entered.acquire(timeout=WAIT)
    answer = server.draw(num_inference_steps=12)  # 16 s of work ahead, 24 s of its own, 30 s in all
    assert answer.status == 429 and 10 <= int(answer.headers["retry-after"]) <= 11
    assert answer.json["error"]["type"] == "rate_limit_error"
    assert server.draw(num_inference_steps=3, n=2).status == 429  # there is room for one of them
    watched.gate.release(10**6)
    waiting.join(WAIT)
    until(lambda: batcher.active == batcher.queued == 0)
    assert (batcher.counts["drawn"], batcher.counts["refused"], batcher.counts["cancelled"]) == (1, 2, 1)


def test_a_full_server_refuses_before_it_reads(held: tuple[Running, Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its measures are the queue's seconds and the number of requests that wait; other paths are answered."""
    server, watched = held
    batcher = server.model.batcher

    def answer(body: bytes = b"", path: str = "/v1/images/generations") -> bytes:
        with server.connect() as client:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
            client.sendall(f"{head}\r\n".encode() + body)
            return client.recv(10000).lower()

    def refused(text: bytes) -> bool:
        parts = (b"http/1.1 429", b"\r\nretry-after: ", b"\r\nx-request-id: ")
        return all(part in text for part in parts)

    waiting = threading.Thread(target=server.draw, kwargs={"num_inference_steps": 100})
    waiting.start()
    assert watched.entered.acquire(timeout=WAIT)
    assert b" 400 " in answer(b"{}")
    with monkeypatch.context() as patch:
        patch.setattr("dit_serve.app.WAITING", 1)
        assert refused(answer()) and b" 400 " in answer(b"{}", "/v1/jobs")
    for _ in range(400):
        batcher.costs.update("row", 1.0)
    until(lambda: batcher.lateness(30) > 150)  # it is looked up again after a while
    assert batcher.lateness(600) == 0 and b" 400 " in answer(b"{}", "/v1/jobs")  # whose deadline is 600 s
    assert refused(answer()) and server.ask("GET", "/healthz").status == server.ask("GET", "/v1/models").status == 200
    assert batcher.counts["refused"] == 1
    assert b'dit_requests_total{code="429",model="demo"} 2.0' in server.ask("GET", "/metrics").body
    watched.gate.release(10**6)
    waiting.join(WAIT)


def test_of_several_models_one_is_full(held: tuple[Running, Watched], folder: Path) -> None:
    """The body says which; where all are full, a request is refused by its head."""
    server, watched = held
    (other,) = models.open_models({"other": folder}, models.Opening(threads=1, verify=False), lambda _: None).values()
    server.service.models["other"] = other
    server.model.batcher.costs.update("row", 1e6)
    server.model.batcher.submit(Request(1, steps=9))
    assert server.draw(num_inference_steps=2).status == 429
    assert server.draw(num_inference_steps=2, model="other").status == 200
    batchers = server.model.batcher, other.batcher
    for batcher in batchers:
        batcher.costs.update("decode", 1e6)
        batcher._scheduler.undecoded = 1.0
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with server.connect() as client:
        client.sendall(f"{head}Content-Length: 2\r\n\r\n".encode())
        assert client.recv(10000).startswith(b"HTTP/1.1 429")
    for batcher in batchers:
        batcher._scheduler.undecoded = 0.0
    watched.gate.release(10**6)


def test_too_late_is_504(folder: Path) -> None:
    with running(folder, Settings(grace=5, deadline=0.5)) as server:
        engines = server.model.batcher.pipe.engines
        watched = Watched(engines.opened["denoiser"])
        engines._opened["denoiser"] = watched
        watched.hold()

        def let_go() -> None:
            assert watched.entered.acquire(timeout=WAIT)
            time.sleep(0.6)
            watched.gate.release(10**6)

        waiting = threading.Thread(target=let_go)
        waiting.start()
        assert server.draw(num_inference_steps=4).status == 504
        waiting.join()


class Hasty(Protocol):
    silence, unread = 0.3, 0.3


def test_silent_clients_are_let_go(folder: Path) -> None:
    with running(folder, protocol=Hasty) as server:
        clients = [server.connect() for _ in range(6)]
        clients[1].sendall(b"POST /v1/images/gen")
        clients[2].sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\n")
        head = b"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{"
        clients[3].sendall(b"POST /v1/jobs HTTP/1.1\r\n" + head)
        clients[4].sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = b""
        while b'"ok"}' not in received:
            received += clients[4].recv(1000)
        clients[4].sendall(b"GET /healthz HT")  # the head of a further request
        assert server.draw(num_inference_steps=2).status == 200  # others are served meanwhile
        for client in clients[:5]:
            client.settimeout(WAIT)
            with suppress(ConnectionResetError):
                assert client.recv(1000) == b""
        for client in clients:
            client.close()


def test_an_answer_that_is_not_read_is_given_up(folder: Path) -> None:
    with running(folder, Settings(grace=5), protocol=Hasty) as server:
        tables = {"id": "x" * 3_000_000}
        server.service.models["demo"].describe = lambda: tables  # an answer that no socket's buffer holds
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(b"GET /v1/models/demo HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.settimeout(WAIT)
        time.sleep(1)
        received = 0
        with suppress(ConnectionResetError):
            while part := client.recv(1 << 16):
                received += len(part)
        assert received < 3_000_000
        client.close()


def test_metrics_are_those_of_the_documentation(server: Running) -> None:
    server.draw(num_inference_steps=3, guidance_scale=2.0)
    server.draw(model="invented by a client")
    text = server.ask("GET", "/metrics").body.decode()
    names = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
    assert {name for name in names if name.startswith("dit_")} == {*re.findall(r"^\| `(dit_\w+)`", page, re.MULTILINE)}
    assert "process_resident_memory_bytes" in names
    values = dict(re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE))
    assert float(values['dit_requests_total{code="404",model=""}']) >= 1 and "invented" not in text
    rows, samples = (float(values[f'dit_step_{what}_total{{model="demo"}}']) for what in ("rows", "samples"))
    assert rows > samples > 0


def test_the_fields_of_a_body_are_those_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
    table = page[page.index("## Images") : page.index("## Jobs")]
    assert {*re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)} == {*Body.__dataclass_fields__, *FILES} - {*OF_FILES}

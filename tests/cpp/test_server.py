"""`dit-server` as its clients see it: the same answers as those of `dit-serve`, of which it borrows the cases."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_runtime import Pipeline
from dit_serve.body import Limits
from dit_serve.models import Model, Opening
from tests.serve import load
from tests.serve.serving import WAIT, Running, pixels, until
from tests.serve.test_hot_swap import break_weight, digest, point, rename
from tests.serve.test_server import BAD

GENERATIONS = "/v1/images/generations"
Start = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], Running, list[dict]]]]
# What libdit says in its own words: by the place in BAD.
OWN_WORDS = {
    '{"prompt": "1", "guidance_scale": 1e999}': (None, "not JSON"),
    str({"prompt": "1", "num_inference_steps": 10**400}): (None, "not JSON"),
    str({"prompt": "1", "output_format": "gif"}): ("output_format", "must be png"),
    str({"prompt": "1", "negative_prompt": "x"}): ("negative_prompt", "no tokenizer"),
}


@pytest.fixture(scope="module")
def server(start: Start, tiny: Path) -> Iterator[Running]:
    with start(f"demo={tiny}", "--batch", "4", "--allow-batch-variance") as (_, client, _):
        yield client


def talk(server: Running, content: bytes) -> bytes:
    """Send bytes on a connection, and read until the server closes it."""
    with server.connect() as client:
        client.sendall(content)
        return b"".join(iter(lambda: client.recv(4096), b""))


def active(server: Running) -> str:
    lines = server.ask("GET", "/metrics").body.decode()
    return "".join(re.findall(r"dit_(?:active|queued)_images\{model=\"demo\"\} (\S+)", lines))


def test_it_draws_the_runtimes_pictures(server: Running, tiny: Path) -> None:
    fields = {"n": 2, "seed": 7, "num_inference_steps": 4, "guidance_scale": 3.0, "solver": "ddim", "size": "32x32"}
    answer = server.draw("bee", **fields)
    with Pipeline.load(tiny, threads=1) as pipe:
        expected = pipe.sample(["bee", "bee"], seed=[7, 8], steps=4, guidance=3.0, solver="ddim")
    table = answer.json
    assert (table["model"], table["size"], table["output_format"]) == ("demo", "32x32", "png")
    for image, picture in zip(table["data"], expected, strict=True):
        assert np.abs(pixels(base64.b64decode(image["b64_json"])).astype(int) - picture).max() <= 1
        assert image["stats"]["calls"] == 4 and image["stats"]["batch"] >= 1
    assert [image["seed"] for image in table["data"]] == [7, 8]
    assert answer.headers["server-timing"].startswith("conditions;dur=")
    quick = server.draw("bee", preset="quick", seed=3, response_format="bytes")
    assert (quick.status, quick.headers["content-type"], quick.headers["x-seed"]) == (200, "image/png", "3")
    with Pipeline.load(tiny, threads=1) as pipe:
        expected = pipe.sample("bee", seed=3, preset="quick")
    assert np.abs(pixels(quick.body).astype(int) - expected[0]).max() <= 1


def test_models_and_metrics_are_those_of_dit_serve(server: Running, tiny: Path) -> None:
    model = Model("demo", tiny, Opening(threads=1, places=4, verify=False, variance=True))
    expected = model.describe()
    model.close()
    (listed,) = server.ask("GET", "/v1/models").json["data"]
    assert listed == server.ask("GET", "/v1/models/demo").json
    assert sorted(listed.pop("presets")) == sorted(expected.pop("presets"))
    assert listed | {"created": 0} == expected | {"created": 0}
    server.draw(num_inference_steps=2)
    table = re.findall(r"^\| `(dit_\w+)` \|", Path("docs/serving.md").read_text(encoding="utf-8"), re.MULTILINE)
    scraped = server.ask("GET", "/metrics").body.decode()
    assert len(table) > 15
    for name in table:
        assert re.search(rf"^{name}(_bucket)?(\{{\S+\}})? \S+$", scraped, re.MULTILINE), name
    assert 'dit_requests_total{model="demo",code="200"}' in scraped and "dit_active_images" in scraped


def cases() -> Iterator[Any]:
    for number, (body, param, message) in enumerate(BAD):
        yield pytest.param(body, *OWN_WORDS.get(str(body), (param, message)), id=str(number))


def test_bad_bodies_are_400(server: Running) -> None:
    for case in cases():
        body, param, message = case.values
        for path in (GENERATIONS, "/v1/jobs"):
            answer = server.ask("POST", path, body)
            error = answer.json["error"]
            assert answer.status == error["code"] == 400 and error["type"] == "invalid_request_error", body
            assert error["param"] == param and message in error["message"], (body, error)
            assert "<script>" not in error["message"] and len(error["message"]) <= 320


def test_other_refusals(server: Running) -> None:
    def status(method: str, path: str, body: Any = None, **headers: str) -> int:
        answer = server.ask(method, path, body, **headers)
        assert answer.json["error"]["code"] == answer.status
        return answer.status

    assert status("POST", GENERATIONS, {"prompt": "1", "model": "other"}) == 404
    assert status("GET", "/v1/models/other") == status("GET", "/nowhere") == status("GET", "/v1/jobs/x") == 404
    assert status("GET", GENERATIONS) == status("POST", "/healthz", {}) == 405
    assert status("POST", "/v1/images/edits", {"prompt": "1"}) == 415
    assert status("POST", GENERATIONS, "x" * (Limits().body + 1)) == 413
    assert status("POST", GENERATIONS, {"prompt": "1"}, Content_Type="text/plain") == 415
    assert status("POST", GENERATIONS, {"prompt": "1"}, Host="evil.example:80") == 403
    for origin in ("http://evil.example", "null", "http://localhost.evil.example:80"):
        assert status("POST", GENERATIONS, {"prompt": "1"}, Origin=origin) == 403
    assert status("POST", GENERATIONS, {"prompt": ""}, Origin=f"http://127.0.0.1:{server.port}") == 400
    assert server.ask("GET", "/healthz", X_Request_Id="mine").headers["x-request-id"] == "mine"
    assert server.ask("GET", "/healthz", X_Request_Id="<mine>").headers["x-request-id"] != "<mine>"


HOST = b"Host: localhost\r\n"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"GET /healthz HTTP/2.0\r\n" + HOST + b"\r\n", 400),
        (b"GET healthz HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /a b HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n" + HOST + b" folded: 1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n" + HOST + b"Host: other\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n" + HOST + b"name : 1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n" + HOST + b"name: \x01\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n" + HOST + b"a: 1\nb: 2\r\n\r\n", 400),
        (b"POST /v1/jobs HTTP/1.1\r\n" + HOST + b"Content-Length: +1\r\n\r\nx", 400),
        (b"POST /v1/jobs HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nx", 400),
        (b"POST /v1/jobs HTTP/1.1\r\n" + HOST + b"Content-Length: 9" + b"9" * 30 + b"\r\n\r\n", 413),
        (b"POST /v1/jobs HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
        (b"POST /v1/jobs HTTP/1.1\r\n" + HOST + b"\r\n", 411),
        (b"GET /healthz HTTP/1.1\r\n" + b"a: 1\r\n" * 200 + b"\r\n", 431),
        (b"GET /" + b"x" * (16 << 10), 431),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 403),
        (b"GET /healthz HTTP/1.0\r\n" + HOST + b"\r\n", 200),
        (b"HEAD /healthz HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n", 200),
        (b"GET /healthz?x=1 HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n", 200),
    ],
)
def test_heads(server: Running, content: bytes, status: int) -> None:
    answer = talk(server, content)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"\r\nConnection: close" in head
    length = int(re.search(rb"Content-Length: (\d+)", head)[1])
    assert len(body) == (0 if content.startswith(b"HEAD") else length)


def test_requests_that_come_together_or_in_pieces(server: Running) -> None:
    one = b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"
    last = one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert talk(server, one * 3 + last).count(b"HTTP/1.1 200 OK") == 4
    with server.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in last:
            client.sendall(bytes([byte]))
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
    body = b'{"prompt": "1", "num_inference_steps": 2}'
    head = f"POST {GENERATIONS} HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n".encode()
    with server.connect() as client:
        client.sendall(head + HOST + b"Expect: 100-continue\r\n\r\n")
        assert client.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert client.recv(4096).startswith(b"HTTP/1.1 200")


def test_silent_and_unreading_clients_hold_up_nobody(server: Running) -> None:
    async def idle() -> None:
        writers = [*await load.idle(server.port, 20, reading=True), *await load.idle(server.port, 20, reading=False)]
        assert await asyncio.to_thread(lambda: server.draw(num_inference_steps=2).status) == 200
        for writer in writers:
            writer.close()

    asyncio.run(idle())


def test_silent_clients_take_no_places(server: Running) -> None:
    """A further connection takes the place of the one that has been silent for the longest time."""
    clients = [server.connect() for _ in range(520)]
    assert server.draw(num_inference_steps=2).status == 200
    assert clients[0].recv(1) == b""
    for client in clients:
        client.close()


def test_jobs(server: Running) -> None:
    job = server.ask("POST", "/v1/jobs", {"prompt": "1", "n": 2, "seed": 5, "num_inference_steps": 4})
    name = job.json["id"]
    assert (job.status, job.headers["location"], job.json["steps"]) == (202, f"/v1/jobs/{name}", 8)
    until(lambda: server.ask("GET", f"/v1/jobs/{name}").json["status"] == "succeeded")
    table = server.ask("GET", f"/v1/jobs/{name}").json
    assert table["steps_done"] == 8 and [image["seed"] for image in table["result"]["data"]] == [5, 6]
    drawn = server.draw(n=2, seed=5, num_inference_steps=4).json["data"]
    for image, again in zip(table["result"]["data"], drawn, strict=True):
        files = [pixels(base64.b64decode(each["b64_json"])).astype(int) for each in (image, again)]
        assert np.abs(files[0] - files[1]).max() <= 1
    assert server.ask("DELETE", f"/v1/jobs/{name}").json["deleted"]
    assert server.ask("GET", f"/v1/jobs/{name}").status == 404

    body = {"prompt": "1", "n": 8, "num_inference_steps": 250}
    *others, long = [server.ask("POST", "/v1/jobs", body).json["id"] for _ in range(10)]  # a second of work
    server.ask("DELETE", f"/v1/jobs/{long}")
    for other in others:
        server.ask("DELETE", f"/v1/jobs/{other}")
    until(lambda: server.ask("GET", f"/v1/jobs/{long}").json["status"] == "cancelled")
    assert server.ask("GET", f"/v1/jobs/{long}").json["error"]["code"] == 499


def test_clients_that_leave_leave_nothing(server: Running) -> None:
    async def leave() -> None:
        asks = [load.ask(server.port, load.body(load.random.Random(n), steps=(250,)), 0.002 * n) for n in range(30)]
        await asyncio.gather(*asks)

    asyncio.run(leave())
    until(lambda: active(server) == "0.00.0")
    scraped = server.ask("GET", "/metrics").body.decode()
    assert int(float(re.search(r'dit_requests_total\{model="demo",code="499"\} (\S+)', scraped)[1])) > 1
    assert server.draw(num_inference_steps=2).status == 200


def test_overload_is_answered(start: Start, tiny: Path) -> None:
    shared = ["--batch", "2", "--allow-batch-variance", "--max-steps", "1000"]
    with start(f"demo={tiny}", "--skip-verify", "--deadline", "2", *shared) as (_, client, _):
        outcomes = asyncio.run(load.opened(client.port, 400, 1, steps=(1000,)))
        statuses = {outcome.status for outcome in outcomes}
        assert {200, 429} <= statuses <= {200, 429, 504}
        assert all(outcome.retry_after == (outcome.status == 429) for outcome in outcomes)
        assert active(client) == "0.00.0"


def test_a_key(start: Start, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a key of 16 letters".replace(" ", "-") + "\n")
    with start(f"demo={tiny}", "--skip-verify", "--api-key-file", str(tmp_path / "key")) as (_, client, _):
        assert client.ask("GET", "/v1/models").status == 401
        assert client.ask("GET", "/v1/models", Authorization="Bearer a-key").status == 401
        assert client.ask("GET", "/v1/models", Authorization="Bearer a-key-of-16-letters", Host="any").status == 200
        assert client.ask("GET", "/healthz").status == client.ask("GET", "/readyz").status == 200


def test_swaps_and_signals(start: Start, tiny: Path, tmp_path: Path) -> None:
    """SIGHUP swaps for a bundle that passes, and for no other; SIGTERM finishes what is under way, and exits with 0."""
    shutil.copytree(tiny, tmp_path / "v1")
    link = tmp_path / "live"
    link.symlink_to("v1")
    with start(f"demo={link}", "--grace", "60", "--max-steps", "1000") as (server, client, lines):
        broken = Path(shutil.copytree(tiny, tmp_path / "broken"))
        break_weight(broken)
        point(link, broken)
        os.kill(server.pid, signal.SIGHUP)
        until(lambda: client.ask("GET", "/readyz").json["models"]["demo"]["refused"] != "")
        ready = client.ask("GET", "/readyz")
        assert ready.status == 200 and "verification failed: denoiser" in ready.json["models"]["demo"]["refused"]
        assert client.ask("GET", "/v1/models/demo").json["sha256"] == digest(tmp_path / "v1")
        assert b'dit_swaps_total{model="demo",result="refused"} 1.0' in client.ask("GET", "/metrics").body

        second = Path(shutil.copytree(tiny, tmp_path / "v2"))
        rename(second, "v2")
        point(link, second)
        os.kill(server.pid, signal.SIGHUP)
        until(lambda: client.ask("GET", "/v1/models/demo").json["sha256"] == digest(second))

        answers: list[int] = []
        ask = lambda: answers.append(client.draw(num_inference_steps=1000, n=4).status)  # noqa: E731
        drawing = threading.Thread(target=ask)
        drawing.start()
        until(lambda: active(client) != "0.00.0" or answers)
        body = {"prompt": "1", "n": 4, "num_inference_steps": 1000}
        job = client.ask("POST", "/v1/jobs", body).json["id"]
        os.kill(server.pid, signal.SIGTERM)
        drawing.join(WAIT)
        assert server.wait(WAIT) == 0 and answers == [200]
    assert [line["event"] for line in lines if line["level"] != "info"] == ["swap refused"]
    (ended,) = [line for line in lines if line["event"] == "job ended"]
    assert (ended["job"], ended["status"], ended["calls"]) == (job, "succeeded", 1000)
    (request,) = [line for line in lines if line.get("path") == GENERATIONS]
    assert request["model"] == "demo" and request["status"] == 200 and request["images"] == 4


def test_command_lines(build: Path, tiny: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        command = [str(build / "programs/dit-server"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "no bundle" in refused()
    assert "open to others" in refused(tiny, "--host", "0.0.0.0")
    assert "--port is x" in refused(tiny, "--port", "x")
    assert "--deadline is nan" in refused(tiny, "--deadline", "nan")
    assert "--batch is 1.5; expected an integer" in refused(tiny, "--batch", "1.5")
    assert "--grace lacks its value" in refused(tiny, "--grace")
    assert "unrecognized argument --gracee" in refused(tiny, "--gracee", "1")
    assert "NAME=BUNDLE" in refused(f"a b={tiny}") and "twice" in refused(tiny, tiny)
    assert "no --pin names" in refused(tiny, "--pin", "0" * 64)
    assert "lacks its value" in refused(tiny, "--pin", "0")
    assert "pass --allow-batch-variance too" in refused(tiny, "--batch", "2")
    (tmp_path / "key").write_text("short")
    assert "16 characters" in refused(tiny, "--api-key-file", tmp_path / "key")
    assert "nothing" in refused(tmp_path / "nothing")

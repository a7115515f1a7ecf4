"""A server that is busy, late or failing, and clients that leave, stay silent or do not read."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dit_runtime import EngineError, Request
from dit_serve import models
from dit_serve.app import Settings
from dit_serve.protocol import Protocol
from tests.serve.serving import WAIT, Running, running, start, until
from tests.serve.watched import POISON, Watched


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

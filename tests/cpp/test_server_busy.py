"""`dit-server` refuses what it has no room for before it reads a body, as `dit-serve` does; its log and its errors."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import dit_serve.cli
from dit_serve.app import Service, Settings
from tests.cpp.test_server import GENERATIONS, Start
from tests.serve.serving import WAIT, Running, until

WORK = json.dumps({"prompt": "1", "n": 8, "num_inference_steps": 1000}).encode()  # a second, or less
BUSY = ("--skip-verify", "--deadline", "5", "--max-steps", "1000")  # three seconds of work ahead are too much


def head(length: int) -> bytes:
    kind = f"Content-Type: application/json\r\nContent-Length: {length}\r\n"
    return f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n".encode()


def fill(server: Running, clients: contextlib.ExitStack, full: Callable[[], object]) -> None:
    """Let clients ask for images, and wait for them, until the server is full."""

    def asked() -> object:
        clients.enter_context(server.connect()).sendall(head(len(WORK)) + WORK)
        return full()

    until(asked)


def answer_to_a_head(server: Running) -> bytes:
    """Return what the server says to a request whose body does not come; nothing where it waits for that."""
    with server.connect() as client:
        client.sendall(head(2))
        client.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            return client.recv(4096)
        return b""


@pytest.mark.slow
def test_a_full_server_refuses_before_it_reads(start: Start, tiny: Path) -> None:
    """Its measure is the seconds of the queue; other paths are answered."""
    shared = ("--batch", "2", "--allow-batch-variance")
    with start(f"demo={tiny}", *BUSY, *shared) as (_, server, _), contextlib.ExitStack() as clients:
        answers = []
        fill(server, clients, lambda: answers.append(answer_to_a_head(server)) or answers[-1])
        for part in (b"HTTP/1.1 429", b"\r\nRetry-After: ", b"\r\nX-Request-Id: ", b"too busy to finish in time"):
            assert part in answers[-1]
        assert server.ask("POST", "/v1/jobs", {}).status == 400  # whose deadline is 600 s
        scraped = server.ask("GET", "/metrics").body.decode()
    for name in ('requests_total{model="demo",code="429"}', 'refused_requests_total{model="demo"}'):
        assert float(re.search(rf"dit_{re.escape(name)} (\S+)", scraped)[1]) >= 1


def test_of_several_models_one_is_full(start: Start, tiny: Path) -> None:
    """The body says which, and what it asks for is not looked at; the other one draws."""
    bundles = f"one={tiny}", f"other={tiny}"
    with start(*bundles, *BUSY) as (_, server, _), contextlib.ExitStack() as clients:
        fill(server, clients, lambda: server.draw("no class").status == 429)  # else 400
        assert answer_to_a_head(server) == b""
        assert server.draw("no class", model="other").status == 400
        assert server.draw(model="other", num_inference_steps=2).status == 200


def test_so_many_requests_wait(start: Start, tiny: Path) -> None:
    """More connections than that are left for jobs and others."""
    with start(f"demo={tiny}", "--skip-verify") as (_, server, _), contextlib.ExitStack() as clients:
        for _ in range(400):
            clients.enter_context(server.connect()).sendall(head(2))
        until(lambda: answer_to_a_head(server))
        refused = server.draw(num_inference_steps=2)
        assert refused.status == 429 and refused.headers["retry-after"] == "1"
        assert "400 requests wait" in refused.json["error"]["message"]
        assert server.ask("POST", "/v1/jobs", {}).status == 400 and server.ask("GET", "/healthz").status == 200
        clients.close()
        until(lambda: server.draw(num_inference_steps=2).status == 200)


def test_quiet(build: Path, tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [build / "programs/dit-server", f"demo={tiny}", "--port", str(port), "--skip-verify", "--threads", "1"]
    server = Running(Service({}, Settings()), port)

    def draws() -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            return server.draw(num_inference_steps=2).status == 200
        return False

    with subprocess.Popen([*command, "--quiet"], stderr=subprocess.PIPE, text=True) as quiet:
        try:
            until(draws)
            quiet.terminate()
            assert quiet.wait(WAIT) == 0 and quiet.stderr.read() == ""
        finally:
            quiet.kill()


@pytest.mark.parametrize("words", [["BUNDLE", "--port", "x"], ["nowhere"]])
def test_an_error_as_json(build: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """In the form of `dit-serve`."""
    done = subprocess.run([build / "programs/dit-server", *words, "--json"], capture_output=True, text=True)
    error = json.loads(done.stdout)["error"]
    assert done.returncode == error["exit_code"] == 2 and error["kind"] == "refused"
    assert done.stderr == f"dit-server: error: {error['message']}\n"
    assert dit_serve.cli.main([*words, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"].keys() == error.keys()

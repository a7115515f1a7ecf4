"""The example of a service: overload, slow clients, and its socket."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


class Service:
    def __init__(self, program: Path, bundle: Path, path: Path) -> None:
        self.path = path
        self.process = subprocess.Popen([program, bundle, path, "2"], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr.readline().startswith("ready"), self.process.stderr.read()

    def ask(self, said: str) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(60)
        client.connect(str(self.path))
        client.sendall(said.encode())
        return client

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


def hear(client: socket.socket) -> bytes:
    with client, client.makefile("rb") as file:
        return file.read()


@pytest.fixture
def program(build) -> Path:
    return build / "examples/example-service"


@pytest.fixture
def path() -> Iterator[Path]:
    place = Path(f"/tmp/dit-service-{os.getpid()}-{time.monotonic_ns()}")  # a Unix socket's may have 107 bytes
    yield place
    place.unlink(missing_ok=True)


def test_the_service(program, tiny, path):
    service = Service(program, tiny, path)
    try:
        answers = [hear(service.ask(line + "\n")) for line in ("1 7 4", "1 7 4", "9 7 4", "hello")]
        assert answers[0].startswith(b"ok 32 32\n") and len(answers[0]) == 9 + 32 * 32 * 3
        assert answers[1] == answers[0]
        assert b"error label 9 is out of range" in answers[2] and answers[3].startswith(b"error expected")
        # One is drawn for long and two wait: the others hear it at once, and all who wait hear the end.
        waiting = [service.ask("1 7 1000\n") for _ in range(12)]
        time.sleep(0.3)
    finally:
        code, said = service.stop()
    heard = [hear(client) for client in waiting]
    assert heard.count(b"busy\n") >= 6
    assert all(text == b"busy\n" or text.startswith((b"ok", b"error")) for text in heard)
    assert code == 0 and said == "stopped\n" and not path.exists()


def test_a_slow_client_has_a_second_in_all(program, tiny, path):
    service = Service(program, tiny, path)
    try:
        slow = service.ask("1")
        for _ in range(100):  # never silent for long
            if select.select([slow], [], [], 0.1)[0]:
                break
            slow.send(b"1")
        else:
            pytest.fail("it is still listened to")
        assert slow.recv(100) == b"error expected LABEL SEED STEPS\n"
        slow.close()
    finally:
        service.stop()


def test_a_place_that_is_taken(program, tiny, path):
    """A service that was killed leaves its socket, and the next takes its place; what is somebody's stays."""

    def refused(*arguments: str) -> str:
        done = subprocess.run([program, tiny, path, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        return done.stderr

    for wrong in ("abc", "-1", ""):
        assert refused(wrong) == f"QUEUE is '{wrong}'; expected a number\n" and not path.exists()
    path.write_text("mine")
    assert "Address already in use" in refused() and path.read_text() == "mine"
    path.unlink()

    first = Service(program, tiny, path)
    assert "Address already in use" in refused()
    assert hear(first.ask("1 7 4\n")).startswith(b"ok")
    first.process.kill()
    first.process.communicate()
    assert path.exists()
    second = Service(program, tiny, path)
    assert hear(second.ask("1 7 4\n")).startswith(b"ok")
    assert second.stop()[0] == 0

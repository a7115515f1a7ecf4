"""A server on the loopback interface, in a thread of this process or in one of its own, and a plain client."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import uvicorn
from PIL import Image

from dit_serve.app import Service, Settings
from dit_serve.models import Model, Opening, open_models
from dit_serve.protocol import Protocol

WAIT = 60  # seconds for what takes a fraction of one
SERVE = (sys.executable, "-m", "dit_serve.cli")


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Running(NamedTuple):
    service: Service
    port: int

    @property
    def model(self) -> Model:
        return next(iter(self.service.models.values()))

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send a request on a connection of its own; a body that is no string is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        content = body if body is None or isinstance(body, str | bytes) else json.dumps(body)
        sent = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(
            method, path, content, sent | {name.replace("_", "-"): text for name, text in headers.items()}
        )
        response = connection.getresponse()
        answer = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        connection.close()
        return answer

    def draw(self, prompt: str = "1", **fields: Any) -> Answer:
        return self.ask("POST", "/v1/images/generations", {"prompt": prompt, **fields})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT)


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def start(server: Running, **fields: Any) -> str:
    """Start a job and return its id."""
    answer = server.ask("POST", "/v1/jobs", {"prompt": "1", **fields})
    assert (answer.status, answer.headers["location"]) == (202, f"/v1/jobs/{answer.json['id']}")
    return answer.json["id"]


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


def until(condition, seconds: float = WAIT) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@contextmanager
def running(
    folder: Path, settings: Settings | None = None, protocol: type = Protocol, **opening: Any
) -> Iterator[Running]:
    """Serve a bundle as "demo"; stop in order at the end."""
    models = open_models(
        {"demo": folder}, Opening(**{"threads": 1, "verify": False, "variance": True} | opening), lambda _: None
    )
    service = Service(models, settings or Settings(grace=5))
    config = uvicorn.Config(
        service.app(),
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield Running(service, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(WAIT)
            assert not thread.is_alive()


@contextmanager
def process(
    *arguments: str, program: Sequence[str] = SERVE
) -> Iterator[tuple[subprocess.Popen[str], Running, list[dict]]]:
    """`dit-serve` as a process of its own, and the lines of its log."""
    command = [*program, *arguments, "--port", "0", "--threads", "1"]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines: list[dict] = []

    def read() -> None:
        assert started.stderr is not None
        for line in started.stderr:
            lines.append(json.loads(line))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        until(lambda: any(line["event"] == "listening" for line in lines) or started.poll() is not None)
        (url,) = [line["url"] for line in lines if line["event"] == "listening"]
        port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", url).group(1))
        yield started, Running(Service({}, Settings()), port), lines
    finally:
        if started.poll() is None:
            started.kill()
        started.wait(WAIT)
        reader.join(WAIT)
        started.stderr.close()


def resident(pid: int) -> int:
    """Return the process's memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int:
    return len([*Path(f"/proc/{pid}/fd").iterdir()])

"""`/v1/images/edits` of `dit-server`: the answers of `dit-serve`, whose cases it borrows, from PNG files alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from dit_runtime import Pipeline
from dit_runtime.images import png
from dit_serve.body import Limits
from tests.cpp.test_pictures import REFUSED
from tests.cpp.test_server import Start, active
from tests.serve.serving import Running, resident, until
from tests.serve.test_edits import BAD_FORMS, DAMAGED_FORMS, KIND, MASK, PATH, PICTURE, file, form, pixels, send

PROMPT = ("prompt", b"1")


@pytest.fixture(scope="module")
def pictured(handmade) -> Path:
    return handmade("pictured")


@pytest.fixture(scope="module")
def started(start: Start, pictured: Path) -> Iterator[tuple[Any, Running]]:
    with start(f"demo={pictured}", "--skip-verify", "--batch", "2", "--allow-batch-variance") as run:
        yield run[:2]


@pytest.fixture(scope="module")
def server(started: tuple[Any, Running]) -> Running:
    return started[1]


def test_openais_client_edits(server: Running, pictured: Path) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    extra = {"seed": 7, "num_inference_steps": 4, "guidance_scale": 3.0, "solver": "ddim", "strength": 0.5}
    options: dict[str, Any] = {"model": "demo", "prompt": "bee", "n": 2, "size": "32x32", "extra_body": extra}
    holes = np.concatenate([PICTURE, 255 - MASK[..., None]], axis=2)
    asked = {"seed": [7, 8], "steps": 4, "guidance": 3.0, "solver": "ddim", "strength": 0.5, "image": PICTURE}
    with Pipeline.load(pictured, threads=1) as pipe:
        expected = pipe.sample(["bee"] * 2, mask=MASK, **asked).astype(int)
        whole = pipe.sample(["bee"] * 2, **asked).astype(int)
    for mask in (MASK, holes):
        answer = client.images.edit(image=file(PICTURE), mask=file(mask), **options)
        for image, picture in zip(answer.data, expected, strict=True):
            assert np.abs(pixels(image.b64_json) - picture).max() <= 1
    answer = client.images.edit(image=[file(PICTURE)], **options)
    assert np.abs(pixels(answer.data[1].b64_json) - whole[1]).max() <= 1 < np.abs(expected - whole).max()
    assert client.models.list().data[0].edits is True


def test_bad_forms_are_400(server: Running) -> None:
    for parts, words, param in BAD_FORMS:
        answer = send(server, form(*parts))
        assert answer.status == 400 and words in answer.json["error"]["message"], (parts, answer.json)
        assert param is None or answer.json["error"]["param"] == param
    for content, kind in DAMAGED_FORMS:
        assert send(server, content, kind).status == 400, (content, kind)


def test_what_a_form_may_be(server: Running) -> None:
    """Quoted boundaries, other parameters, names of files with quotes of their own."""
    field = b'--xYz\r\ncontent-disposition: form-data; filename="a; name=\'n\'.png"; name="image[]"\r\nX: y\r\n\r\n'
    whole = field + png(PICTURE) + b"\r\n" + form(PROMPT, ("num_inference_steps", b"02"), ("strength", b"0.50"))
    for kind in ('multipart/form-data; charset=utf-8; boundary="xYz"', "Multipart/Form-Data;boundary=xYz; a=b"):
        assert send(server, whole, kind).status == 200
    assert send(server, whole, "multipart/form-data; boundary=" + "x" * 71).status == 400


@pytest.mark.parametrize("kind", REFUSED)
def test_hostile_pictures(started: tuple[Any, Running], kind: str) -> None:
    """Damaged, animated, of another size, or of 2 billion pixels in 100 bytes: 400 in one line, and no memory."""
    process, server = started
    content, words = REFUSED[kind]
    before = resident(process.pid)
    for name, parts in (("image", []), ("mask", [("image", png(PICTURE))])):
        answer = send(server, form(*parts, (name, content), PROMPT))
        error = answer.json["error"]
        assert (answer.status, error["param"]) == (400, name) and f"{name}: {words}" in error["message"]
    assert resident(process.pid) - before < 50e6


def test_limits(server: Running, started: tuple[Any, Running]) -> None:
    """A body as large as one may be is read, and its memory given back; a larger one is refused by its head."""
    most, head = Limits().form, f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {KIND}\r\n"
    rest = len(form(("image", b""), PROMPT))
    before = resident(started[0].pid)
    for _ in range(3):
        answer = send(server, form(("image", b"x" * (most - rest)), PROMPT))
        assert answer.status == 400 and "not a picture" in answer.json["error"]["message"]
    assert resident(started[0].pid) - before < 50e6
    with server.connect() as client:
        client.sendall(f"{head}Content-Length: {most + 1}\r\n\r\n".encode())
        assert client.recv(4096).startswith(b"HTTP/1.1 413")
    assert server.ask("POST", PATH, {"prompt": "1"}).status == 415
    assert server.ask("GET", PATH).status == 405
    assert server.draw(strength=0.5).status == server.draw(image="x").status == 400

    held = [server.connect() for _ in range(4)]  # that send no body
    for client in held:
        client.sendall(f"{head}Content-Length: {most}\r\n\r\nx".encode())
    until(lambda: send(server, form(("image", png(PICTURE)), PROMPT)).status == 429)
    refused = send(server, form(("image", png(PICTURE)), PROMPT))
    assert "with pictures" in refused.json["error"]["message"] and refused.headers["retry-after"] == "1"
    assert server.draw(num_inference_steps=2).status == 200
    for client in held:
        client.close()
    until(lambda: send(server, form(("image", png(PICTURE)), PROMPT)).status == 200)
    assert active(server) == "0.00.0"


def test_a_bundle_without_an_encoder(start: Start, tiny: Path) -> None:
    with start(f"demo={tiny}", "--skip-verify") as (_, plain, _):
        answer = send(plain, form(("image", png(PICTURE)), PROMPT))
        assert answer.status == 501 and "no encoder of images" in answer.json["error"]["message"]
        assert plain.ask("GET", "/v1/models").json["data"][0]["edits"] is False

"""`/v1/images/edits`: pictures in a form, from OpenAI's client and from hostile ones."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from dit_runtime import Pipeline
from dit_runtime.images import png
from dit_serve import app
from dit_serve.app import Settings
from dit_serve.body import Limits
from dit_serve.faults import Fault
from dit_serve.form import MOST_PARTS, Part, parse_form
from tests.serve.serving import Answer, Running, running

PATH, KIND = "/v1/images/edits", "multipart/form-data; boundary=xYz"
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
MASK = np.zeros((32, 32), np.uint8)
MASK[:, :16] = 255


@pytest.fixture(scope="module")
def pictured(handmade) -> Path:
    return handmade("pictured")


@pytest.fixture(scope="module")
def server(pictured) -> Iterator[Running]:
    with running(pictured, Settings(grace=5, limits=Limits(form=100_000))) as started:
        yield started


def form(*parts: tuple[str, bytes], end: bytes = b"--xYz--\r\n") -> bytes:
    heads = [f'--xYz\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() for name, _ in parts]
    return b"".join(head + content + b"\r\n" for head, (_, content) in zip(heads, parts, strict=True)) + end


def send(server: Running, content: bytes, kind: str = KIND) -> Answer:
    return server.ask("POST", PATH, content, Content_Type=kind)


def file(array: np.ndarray) -> tuple[str, io.BytesIO, str]:
    content = io.BytesIO()
    Image.fromarray(array).save(content, "PNG")
    return "a picture.png", io.BytesIO(content.getvalue()), "image/png"


def pixels(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")).astype(int)


def test_openais_client_edits(server: Running, pictured: Path) -> None:
    """A mask is white there, or transparent as OpenAI's."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    extra = {"seed": 7, "num_inference_steps": 4, "guidance_scale": 3.0, "solver": "ddim", "strength": 0.5}
    options: dict[str, Any] = {"model": "demo", "prompt": "bee", "n": 2, "size": "32x32", "extra_body": extra}
    holes = np.concatenate([PICTURE, 255 - MASK[..., None]], axis=2)
    asked = {"seed": 7, "steps": 4, "guidance": 3.0, "solver": "ddim", "strength": 0.5, "image": PICTURE}
    with Pipeline.load(pictured, threads=1) as pipe:
        expected = pipe.sample("bee", mask=MASK, **asked)[0].astype(int)
        whole = pipe.sample("bee", **asked)[0].astype(int)
    for mask in (MASK, holes):
        answer = client.images.edit(image=file(PICTURE), mask=file(mask), **options)
        assert np.abs(pixels(answer.data[0].b64_json) - expected).max() <= 1
        assert [image.seed for image in answer.data] == [7, 8]
    answer = client.images.edit(image=[file(PICTURE)], **options)
    assert np.abs(pixels(answer.data[0].b64_json) - whole).max() <= 1 < np.abs(expected - whole).max()
    assert client.models.list().data[0].edits is True


BAD_FORMS = [
    ([("prompt", b"1")], "image is missing", "image"),
    ([("image", png(PICTURE))], "prompt is missing", "prompt"),
    ([("image", png(PICTURE)[:-30]), ("prompt", b"1")], "image: cannot be read as a picture", "image"),
    ([("image", png(PICTURE)), ("mask", b"?"), ("prompt", b"1")], "mask: not a picture in PNG", "mask"),
    (
        [("image", png(PICTURE)), ("image[]", png(PICTURE)), ("prompt", b"1")],
        "image stands in the body twice",
        "image",
    ),
    ([("image", png(PICTURE)), ("prompt", b"1"), ("n", b"1e9")], "n must be an integer", "n"),
    ([("image", png(PICTURE)), ("prompt", b"1"), ("n", b"9" * 4000)], "n must be an integer", "n"),
    ([("image", png(PICTURE)), ("prompt", b"1"), ("strength", b"0")], "strength must be a number", "strength"),
    ([("image", png(PICTURE)), ("prompt", b"1"), ("strength", b"nan")], "strength must be a number", "strength"),
    ([("image", png(PICTURE)), ("prompt", b"1"), ("colour", b"red")], "a field that is not known", None),
    ([("image", png(PICTURE)), ("prompt", b"1"), ("start", b"{}")], "a field that is not known", None),
    ([("image", png(PICTURE)), ("prompt", b"1"), ("previews", b"2")], "an edit has no previews", "previews"),
    ([("image", png(PICTURE)), ("prompt", b"\xff\xfe")], "is not known", None),
    ([("x", b"")] * (MOST_PARTS + 1), f"more than {MOST_PARTS} parts", None),
    ([('im"age', b"")], "no name that is known", None),
]


@pytest.mark.parametrize(("parts", "words", "param"), BAD_FORMS)
def test_bad_forms_are_400(server: Running, parts: list[tuple[str, bytes]], words: str, param: str | None) -> None:
    answer = send(server, form(*parts))
    assert answer.status == 400 and words in answer.json["error"]["message"]
    assert param is None or answer.json["error"]["param"] == param


DAMAGED_FORMS = [
    (b"", KIND),
    (form(("prompt", b"1"), end=b""), KIND),
    (form(("prompt", b"1"))[:-9], KIND),
    (b"before\r\n" + form(("prompt", b"1")), KIND),
    (b"--xYz\r\n\r\n1\r\n--xYz--\r\n", KIND),
    (b'--xYz\r\nContent-Disposition: form-data; name="prompt"\r\n--xYz--\r\n', KIND),
    (b"--xYz\r\n" + b"A: b\r\n" * 1000 + b'Content-Disposition: form-data; name="n"\r\n\r\n1\r\n--xYz--\r\n', KIND),
    (form(("prompt", b"1")), "multipart/form-data"),
    (form(("prompt", b"1")), "multipart/form-data; boundary="),
]


@pytest.mark.parametrize(("content", "kind"), DAMAGED_FORMS)
def test_damaged_forms_are_400(server: Running, content: bytes, kind: str) -> None:
    with pytest.raises(Fault) as error:
        parse_form(kind, content)
    answer = send(server, content, kind)
    assert answer.status == error.value.status == 400 and answer.json["error"]["message"] == error.value.message


def test_what_a_form_may_be() -> None:
    """Quoted boundaries, other parameters, names of files with quotes of their own; bytes stay as they are."""
    content = b"\r\n--xY\x00\xff\r\n\r\n"
    head = b'--xYz\r\ncontent-disposition: form-data; filename="a; name=\'n\'.png"; name="image[]"\r\nX: y\r\n\r\n'
    whole = head + content + b"\r\n--xYz--"
    for kind in ('multipart/form-data; charset=utf-8; boundary="xYz"', "Multipart/Form-Data;boundary=xYz; a=b"):
        assert parse_form(kind, whole) == [Part("image", content)]
    with pytest.raises(Fault, match="no boundary"):
        parse_form("multipart/form-data; boundary=" + "x" * 71, whole)


def test_other_refusals(server: Running, monkeypatch) -> None:
    assert server.ask("POST", PATH, {"prompt": "1"}).status == 415
    assert send(server, form(("image", b"x" * 100_000))).status == 413
    assert server.draw(strength=0.5).status == server.draw(start={}).status == 400
    monkeypatch.setattr(app, "EDITING", 0)
    answer = send(server, form(("image", png(PICTURE)), ("prompt", b"1")))
    assert answer.status == 429 and "with pictures" in answer.json["error"]["message"]
    assert server.draw(num_inference_steps=2).status == 200


def test_a_bundle_without_an_encoder(folder) -> None:
    with running(folder) as plain:
        answer = send(plain, form(("image", png(PICTURE)), ("prompt", b"1")))
        assert answer.status == 501 and "no encoder of images" in answer.json["error"]["message"]
        assert plain.ask("GET", "/v1/models").json["data"][0]["edits"] is False

"""`dit-serve` as its clients see it."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from dit_runtime import Pipeline, Request
from dit_runtime.bundle.manifest import Manifest, TensorSpec
from dit_runtime.errors import UsageError
from dit_runtime.serve.servable import require_servable
from dit_serve import cli, models
from dit_serve.app import Settings
from dit_serve.body import FILES, OF_FILES, Body, Limits
from tests import tamper
from tests.serve.serving import Running, pixels, running

SIZE = "32x32"


def test_openais_client_draws_the_runtimes_pictures(server: Running, folder: Path) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    extra = {"seed": 7, "num_inference_steps": 4, "guidance_scale": 3.0, "solver": "ddim"}
    answer = client.images.generate(model="demo", prompt="bee", n=2, size=SIZE, extra_body=extra)
    with Pipeline.load(folder, threads=1) as pipe:
        expected = pipe.sample(["bee", "bee"], seed=[7, 8], steps=4, guidance=3.0, solver="ddim")
    for image, picture in zip(answer.data, expected, strict=True):
        difference = np.abs(pixels(base64.b64decode(image.b64_json)).astype(int) - picture)
        assert difference.max() <= 1  # this bundle's sums depend on the batch; test_batched_pictures.py compares bits
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

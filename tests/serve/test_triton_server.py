"""A bundle in the real Triton Inference Server, asked by NVIDIA's own client and in plain HTTP."""

from __future__ import annotations

import json
import queue
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_export.cli import main
from dit_runtime import Pipeline
from tests.serve import tritonserver
from tests.serve.serving import running, until
from tests.serve.tritonserver import Triton

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(tritonserver.why_missing() is not None, reason=tritonserver.why_missing() or ""),
]
KINDS = {"uint8": "UINT8", "int32": "INT32", "uint64": "UINT64", "float32": "FP32"}
WAIT = 60


@pytest.fixture(scope="module")
def bundle(shared_embedders) -> Path:
    return shared_embedders.bundle


@pytest.fixture(scope="module")
def triton(bundle, tmp_path_factory) -> Iterator[Triton]:
    """Serve the bundle as "demo", and as "stream" with a response for each image."""
    work = tmp_path_factory.mktemp("triton")
    for name, options in (("demo", []), ("stream", ["--decoupled"])):
        command = ["triton", str(bundle), "-o", str(work / "repository"), "--name", name, "--threads", "1", *options]
        assert main(command) == 0
    with tritonserver.serving(work / "repository", work) as server:
        yield server


@pytest.fixture(scope="module")
def client(triton) -> Iterator[Any]:
    sys.path.append(str(tritonserver.PACKAGES))  # for this client alone: its versions are not the project's
    try:
        import tritonclient.grpc as grpc

        with grpc.InferenceServerClient(f"127.0.0.1:{triton.grpc}") as opened:
            yield opened
    finally:
        sys.path.remove(str(tritonserver.PACKAGES))


def inputs(prompt: str, seed: int, steps: int, guidance: float = 4.0, n: int = 1) -> list[Any]:
    import tritonclient.grpc as grpc

    fields = {
        "prompt": np.frombuffer(prompt.encode(), np.uint8),
        "seed": np.array([seed], np.uint64),
        "num_inference_steps": np.array([steps], np.int32),
        "guidance_scale": np.array([guidance], np.float32),
        "n": np.array([n], np.int32),
    }
    made = []
    for name, values in fields.items():
        tensor = grpc.InferInput(name, values.shape, KINDS[values.dtype.name])
        tensor.set_data_from_numpy(values)
        made.append(tensor)
    return made


def metric(triton: Triton, name: str, model: str = "demo") -> float:
    text = triton.get("/metrics", triton.metrics)[1]
    (line,) = [line for line in text.splitlines() if line.startswith(f'{name}{{model="{model}"}}')]
    return float(line.split()[-1])


def test_it_draws_the_servers_picture(triton, client, bundle) -> None:
    """The same bits by gRPC, by HTTP, from dit-serve and from the pipeline."""
    answer = client.infer("demo", inputs("golden retriever", 7, 5, n=2))
    with Pipeline.load(bundle, threads=1) as pipe:
        alone = pipe.sample([207, 207], seed=[7, 8], steps=5, guidance=4.0)
    assert np.array_equal(answer.as_numpy("images"), alone)
    assert answer.as_numpy("seeds").tolist() == [7, 8]
    body = {
        "inputs": [
            {"name": "prompt", "shape": [3], "datatype": "UINT8", "data": [*b"207"]},
            {"name": "seed", "shape": [1], "datatype": "UINT64", "data": [7]},
            {"name": "num_inference_steps", "shape": [1], "datatype": "INT32", "data": [5]},
            {"name": "guidance_scale", "shape": [1], "datatype": "FP32", "data": [4]},
        ]
    }
    url = f"http://127.0.0.1:{triton.http}/v2/models/demo/infer"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=WAIT) as response:
        outputs = {output["name"]: output for output in json.load(response)["outputs"]}
    images = np.array(outputs["images"]["data"], np.uint8).reshape(outputs["images"]["shape"])
    assert np.array_equal(images, alone[:1])
    with running(bundle) as server:
        fields = {"seed": 7, "num_inference_steps": 5, "guidance_scale": 4.0}
        drawn = server.draw("207", response_format="bytes", **fields)
    from io import BytesIO

    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(BytesIO(drawn.body))), alone[0])


def test_twelve_at_once(client, bundle) -> None:
    """They share calls, and each is drawn as if alone."""
    asked = [(number * 70, number, 5 + number, 1 + number / 2) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = [*pool.map(lambda one: client.infer("demo", inputs(str(one[0]), *one[1:])), asked)]
    with Pipeline.load(bundle, threads=1) as pipe:
        for (label, seed, steps, guidance), answer in zip(asked, answers, strict=True):
            alone = pipe.sample(label, seed=seed, steps=steps, guidance=guidance)
            assert np.array_equal(answer.as_numpy("images"), alone)


def test_a_stream_has_a_response_for_each_image(client, bundle) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    client.async_stream_infer("stream", inputs("207", 3, 4, n=3))
    results = [answers.get(timeout=WAIT) for _ in range(3)]
    client.stop_stream()
    assert [error for _, error in results] == [None] * 3
    with Pipeline.load(bundle, threads=1) as pipe:
        alone = pipe.sample([207] * 3, seed=[3, 4, 5], steps=4)
    assert np.array_equal(np.concatenate([result.as_numpy("images") for result, _ in results]), alone)


def test_a_client_that_leaves(triton, client) -> None:
    """Its images leave the batch; Triton counts them, and draws on."""
    before = metric(triton, "dit_cancelled_requests_total")
    answers: queue.Queue[Any] = queue.Queue()
    call = client.async_infer("demo", inputs("1", 0, 250, n=8), lambda result, error: answers.put(error))
    until(lambda: metric(triton, "dit_active_images") > 0)
    call.cancel()
    assert "CANCELLED" in str(answers.get(timeout=WAIT))
    until(lambda: metric(triton, "dit_active_images") == metric(triton, "dit_queued_images") == 0)
    assert metric(triton, "dit_cancelled_requests_total") == before + 8
    assert client.infer("demo", inputs("1", 0, 2)).as_numpy("images").shape[0] == 1


def test_what_is_refused(triton, client) -> None:
    """Bad requests, deadlines out of reach, and what clients must not do."""
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match="no such breed") as refused:
        client.infer("demo", inputs("no such breed", 0, 2))
    assert "INVALID_ARGUMENT" in refused.value.status()
    with pytest.raises(InferenceServerException, match="too busy") as busy:
        client.infer("demo", inputs("1", 0, 250, n=8), timeout=1000)  # µs
    assert "UNAVAILABLE" in busy.value.status()
    assert triton.get("/v2/repository/index")[0] == 403
    with pytest.raises(InferenceServerException, match="restricted"):
        client.unload_model("demo")
    assert triton.get("/v2/models/demo/ready")[0] == 200
    assert "Traceback" not in triton.log.read_text()

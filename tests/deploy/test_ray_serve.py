"""deploy/ray on a real Ray Serve: the pipeline's pictures, bounded queues, and clients that leave."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dit_runtime import Pipeline, images
from tests import isolated

MISSING = isolated.why_missing("ray", "ray") or isolated.why_missing("grpc_reflection", "ray")  # of ray[serve]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING or "here")]
FOLDER = Path(__file__).parents[2] / "deploy/ray"
SCRIPT = """
import json, sys, threading, time, urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor
import ray, yaml
from ray import serve

sys.path.insert(0, sys.argv[1])
import app

config = yaml.safe_load(open(sys.argv[1] + "/config.yaml"))
(application,), http = config["applications"], config["http_options"]
module, name = application["import_path"].split(":")
arguments = application["args"] | {"bundles": {"demo": sys.argv[2]}, "threads": 1, "deadline": 20.0}
ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
serve.start(http_options=http)
serve.run(getattr(sys.modules[module], name)(arguments), name="dit", route_prefix=application["route_prefix"])

def ask(path, timeout=60, **body):
    data, headers = (json.dumps(body).encode(), {"Content-Type": "application/json"}) if body else (None, {})
    request = urllib.request.Request(f"http://127.0.0.1:{http['port']}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, dict(answer.headers), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, {name.lower(): text for name, text in error.headers.items()}, error.read().decode()
    except TimeoutError:
        return 0, {}, ""

def draw(timeout=60, **fields):
    return ask("/v1/images/generations", timeout, prompt="1", **fields)

def metric(name):
    (line,) = [line for line in ask("/metrics")[2].splitlines() if line.startswith(name + "{")]
    return float(line.split()[-1])

result = {"drawn": draw(seed=7, n=2, num_inference_steps=5)[2]}
result["statuses"] = {path: ask(path)[0] for path in ("/", "/v1/jobs", "/readyz", "/v1/models")}
result["left"] = draw(timeout=0.2, n=8, num_inference_steps=250)[0]
end = time.monotonic() + 20
while metric("dit_active_images") + metric("dit_queued_images") and time.monotonic() < end:
    time.sleep(0.1)
result["cancelled"] = metric("dit_cancelled_requests_total")
with ThreadPoolExecutor(200) as pool:
    answers = [*pool.map(lambda number: draw(n=2, num_inference_steps=100, seed=1), range(200))]
result["overload"] = sorted({(status, "retry-after" in headers) for status, headers, _ in answers})
result["after"] = draw(seed=7, num_inference_steps=5)[0]
print(json.dumps(result), flush=True)
"""


def test_it_serves(handmade) -> None:
    bundle = handmade("labels")
    with isolated.starting() as start:
        process = start("-c", SCRIPT, str(FOLDER), str(bundle), stdout=subprocess.PIPE)
        output, _ = process.communicate(timeout=300)
    result = json.loads(output.splitlines()[-1])
    with Pipeline.load(bundle, threads=1) as pipe:
        alone = pipe.sample([1, 1], seed=[7, 8], steps=5)
    files = [base64.b64decode(image["b64_json"]) for image in json.loads(result["drawn"])["data"]]
    assert files == [images.png(picture) for picture in np.ascontiguousarray(alone)]
    assert result["statuses"] == {"/": 404, "/v1/jobs": 404, "/readyz": 200, "/v1/models": 200}
    assert result["left"] == 0 and result["cancelled"] > 0  # those of a client that left are not drawn to their end
    assert [200, False] in result["overload"] and [429, True] in result["overload"]
    assert all(retry == (status == 429) for status, retry in result["overload"])
    assert {status for status, _ in result["overload"]} <= {200, 429, 504}
    assert result["after"] == 200

"""Ask a running `dit-serve` or `dit-server` for pictures, with Python's standard library alone.

python examples/client.py http://127.0.0.1:8000 "red star" OUTPUT.png [KEY]
"""

from __future__ import annotations

import base64
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path


def draw(address: str, prompt: str, key: str = "none", **fields: object) -> list[bytes]:
    """Return PNG files; `fields` are those of docs/serving.md, such as `n`, `seed` and `num_inference_steps`."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    content = json.dumps({"prompt": prompt, **fields}).encode()
    request = urllib.request.Request(f"{address}/v1/images/generations", content, headers)
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:  # a busy server's 429 says in Retry-After when to try again
        raise SystemExit(f"{error.code}: {json.load(error)['error']['message']}") from None
    return [base64.b64decode(one["b64_json"]) for one in answer["data"]]


if __name__ == "__main__":
    Path(sys.argv[3]).write_bytes(draw(*sys.argv[1:3], *sys.argv[4:5])[0])

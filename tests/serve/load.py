"""Bounded load on a server of the loopback interface: `python -m tests.serve.load URL [SECONDS]` prints a table.

A closed loop measures what the server can do; an open loop, with Poisson arrivals, offers a multiple of that.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

STEPS = (10, 25, 50)


class Outcome(NamedTuple):
    status: int  # 0: no answer
    seconds: float
    retry_after: bool
    body: str = ""  # what was asked for
    picture: str = ""  # the sha256 of the first image's file


def body(choose: random.Random, classes: int = 5, steps: tuple[int, ...] = STEPS, seeds: int = 10**6) -> dict[str, Any]:
    return {
        "prompt": str(choose.randrange(classes)),
        "seed": choose.randrange(seeds),
        "num_inference_steps": choose.choice(steps),
        "guidance_scale": choose.choice([1.0, 2.0, 4.0]),
    }


async def ask(port: int, table: dict[str, Any], leave_after: float | None = None) -> Outcome:
    """Send a request on a connection of its own, and read the answer or leave."""
    began = time.monotonic()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        content = json.dumps(table).encode()
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        with suppress(TimeoutError):
            answer = await asyncio.wait_for(reader.read(), leave_after)
            status = int(answer[9:12] or 0)
            head, _, drawn = answer.partition(b"\r\n\r\n")
            picture = json.loads(drawn)["data"][0]["b64_json"].encode() if status == 200 else b""
            digest = hashlib.sha256(picture).hexdigest() if picture else ""
            return Outcome(status, time.monotonic() - began, b"retry-after" in head.lower(), content.decode(), digest)
        return Outcome(0, time.monotonic() - began, False)
    except OSError:
        return Outcome(0, time.monotonic() - began, False)
    finally:
        with suppress(UnboundLocalError):
            writer.close()


async def closed(port: int, clients: int, seconds: float, **options: Any) -> list[Outcome]:
    """Let each client ask again as soon as it has its answer."""
    outcomes: list[Outcome] = []
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        choose = random.Random(number)
        while time.monotonic() < end:
            outcomes.append(await ask(port, body(choose, **options)))
            if outcomes[-1].status == 429:  # as a client that means well
                await asyncio.sleep(1)

    await asyncio.gather(*map(client, range(clients)))
    return outcomes


async def opened(port: int, rate: float, seconds: float, leaving: float = 0.0, **options: Any) -> list[Outcome]:
    """Offer so many requests a second, whatever the server answers; a share of clients leaves within a second."""
    choose, tasks, at = random.Random(0), [], time.monotonic()
    end = at + seconds
    while (at := at + choose.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        leave = choose.random() if choose.random() < leaving else None
        tasks.append(asyncio.create_task(ask(port, body(choose, **options), leave)))
    return [*await asyncio.gather(*tasks)]


async def idle(port: int, count: int, reading: bool) -> list[asyncio.StreamWriter]:
    """Open connections that send nothing, or ask and read no answer."""
    writers = []
    for _ in range(count):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        if not reading:
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
        writers.append(writer)
    return writers


def percentiles(outcomes: list[Outcome], *statuses: int) -> tuple[float, float, float]:
    """Return p50, p95 and p99 in milliseconds."""
    seconds = [outcome.seconds for outcome in outcomes if outcome.status in statuses] or [float("nan")]
    p50, p95, p99 = 1e3 * np.percentile(seconds, [50, 95, 99])
    return float(p50), float(p95), float(p99)


def describe(name: str, outcomes: list[Outcome], seconds: float) -> str:
    codes = dict(sorted(Counter(outcome.status for outcome in outcomes).items()))
    drawn = "/".join(f"{value:.0f}" for value in percentiles(outcomes, 200))
    refused = "/".join(f"{value:.0f}" for value in percentiles(outcomes, 429))
    rate = codes.get(200, 0) / seconds
    return f"{name:24s} {rate:6.1f} images/s  {codes}  p50/95/99 drawn {drawn} ms, refused {refused} ms"


async def main(port: int, seconds: float, classes: int) -> None:
    await closed(port, 2, 2, classes=classes)
    outcomes = await closed(port, 8, seconds / 2, classes=classes)
    print(describe("closed, 8 clients", outcomes, seconds / 2), flush=True)
    capacity = sum(outcome.status == 200 for outcome in outcomes) / (seconds / 2)
    for factor in (0.7, 10):
        began = time.monotonic()
        outcomes = await opened(port, factor * capacity, seconds, classes=classes)
        print(describe(f"open, {factor} of capacity", outcomes, time.monotonic() - began), flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1].rstrip("/").rpartition(":")[2]), float((sys.argv[2:] or ["15"])[0]), 20))

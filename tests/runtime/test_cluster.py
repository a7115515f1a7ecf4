"""Shards drawn by Ray in a network of its own: workers, machines and whole runs are killed, and no picture is lost."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dit_runtime.cli import main
from tests import isolated
from tests.runtime.test_shards import read
from tests.serve.serving import until

MISSING = isolated.why_missing("ray", "ray")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=MISSING or "here")]


@pytest.fixture
def start() -> Iterator[isolated.Start]:
    with isolated.starting() as begin:
        yield begin


def command(bundle: Path, into: Path, count: int, size: int) -> list[str]:
    drawing = ["--count", str(count), "--shard-size", str(size), "--steps", "20", "--threads", "1"]
    return ["sample", str(bundle), "--shards", str(into), *drawing]


def drawn(into: Path) -> int:
    return len([*into.glob("shard-*.npz")])


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Return the pids of Ray's workers that draw for this process."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended

    def ours(pid: int) -> bool:
        return pid == process.pid or (pid in parents and ours(parents[pid]))

    return [pid for pid, title in titles.items() if title.startswith(b"ray::Worker.draw") and ours(pid)]


def test_two_thousand_pictures_and_a_killed_worker(handmade, tmp_path, start) -> None:
    bundle = handmade("labels")
    process = start("-m", "dit_runtime.cli", *command(bundle, tmp_path / "ray", 2000, 50), "--ray", "--workers", "2")
    for killed in (1, 2, 3):
        until(lambda killed=killed: drawn(tmp_path / "ray") > 5 * killed and workers(process), 240)
        os.kill(workers(process)[0], signal.SIGKILL)
    assert drawn(tmp_path / "ray") < 40  # they were killed before the end
    assert process.wait(240) == 0
    assert main(command(bundle, tmp_path / "plain", 2000, 50)) == 0
    assert read(tmp_path / "ray") == read(tmp_path / "plain") and len(read(tmp_path / "ray")) == 2000
    assert not [*(tmp_path / "ray").glob("*.partial-*")]


def test_a_killed_machine(handmade, tmp_path, start) -> None:
    """One of two machines of a cluster dies; then all of them do, and another run goes on."""
    bundle, into = handmade("labels"), tmp_path / "ray"
    words = command(bundle, into, 1000, 25)
    script = f"""
import os, sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from dit_runtime.cli import main
from tests import isolated
cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 1, "include_dashboard": False}})
machine = cluster.add_node(num_cpus=1)
def kill():
    while len([*Path({str(into)!r}).glob("shard-*.npz")]) < 6:
        time.sleep(0.01)
    cluster.remove_node(machine, allow_graceful=False)
    Path({str(tmp_path / "killed")!r}).touch()
threading.Thread(target=kill, daemon=True).start()
sys.exit(main([*{words!r}, "--ray", cluster.address, "--workers", "2"]))
"""
    process = start("-c", script)
    until(lambda: (tmp_path / "killed").exists(), 240)
    before = drawn(into)
    until(lambda: drawn(into) > before + 4, 240)  # the other machine goes on
    assert process.poll() is None and drawn(into) < 40
    process.kill()
    process.wait()
    left = 40 - drawn(into)
    assert left > 0 and main(words) == 0
    assert main(command(bundle, tmp_path / "plain", 1000, 25)) == 0
    assert read(into) == read(tmp_path / "plain")


def last_line(bundle: Path, into: Path, *options: str) -> str:
    """Return what a run with a mistake says; it is one line, and Ray's own lines may stand before it."""
    words = ["-m", "dit_runtime.cli", *command(bundle, into, 10, 5), *options]
    done = subprocess.run(isolated.python(words), capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


def test_mistakes_are_one_line(handmade, copied, tmp_path) -> None:
    """The driver's, and those that a worker finds."""
    bundle = handmade("labels")
    assert "class 'no such' is not known" in last_line(bundle, tmp_path / "a", "--labels", "no such", "--ray")
    assert "no cluster answers there" in last_line(bundle, tmp_path / "b", "--ray", "127.0.0.1:1")
    damaged = copied("labels")
    file = damaged / "denoiser.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "denoiser.onnx does not have the sha256" in last_line(damaged, tmp_path / "c", "--ray")

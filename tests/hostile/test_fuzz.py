"""Half a minute of coverage-guided fuzzing of the readers, from the files of sound bundles; FUZZ_SECONDS for more."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SECONDS = {"manifest": 10, "npz": 8, "graph": 6, "npy": 6}
SEEDS = {"manifest": "manifest.json", "npz": "reference.npz", "graph": "denoiser.onnx", "npy": None}


@pytest.mark.parametrize("target", SEEDS)
def test_a_reader(target, handmade, tmp_path) -> None:
    pytest.importorskip("atheris")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    if name := SEEDS[target]:
        for kind in ("labels", "wave", "prompted", "sizes"):
            shutil.copy(handmade(kind) / name, corpus / kind)
    else:
        file = io.BytesIO()
        np.save(file, np.arange(6).reshape(2, 3))
        (corpus / "array").write_bytes(file.getvalue())
    seconds = os.environ.get("FUZZ_SECONDS", SECONDS[target])
    limits = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=1024", "-max_len=65536", "-verbosity=0"]
    command = [
        sys.executable,
        "-m",
        "tests.hostile.fuzz",
        target,
        *limits,
        f"-artifact_prefix={tmp_path}/",
        str(corpus),
    ]
    # Of a shell's child: a direct one would begin with the peak of pytest's memory.
    shell = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    done = subprocess.run(shell, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]

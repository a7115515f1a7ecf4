"""Tests that each family's bundle must also pass: it draws on OpenVINO, without PyTorch, and in C++.

The test module of a family makes a subclass; the tests use the module's own fixture `case`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from dit_runtime import Pipeline
from tests.cpp.test_conditions import condition_flags
from tests.cpp.test_same_pictures import ENGINES, load, same_latents, same_pictures
from tests.families import tiny
from tests.families.tiny import GUIDANCE, OTHER, PROMPTS, SEED, STEPS, Case

# `dit-run` where importing what made the bundle fails.
DIT_RUN = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "diffusers", "dit_export", "onnx", "huggingface_hub"):
            raise ModuleNotFoundError(f"blocked: {name}")
sys.meta_path.insert(0, Blocker())
from dit_runtime.cli import main
sys.exit(main(sys.argv[1:]))
"""
SEEDS = [SEED + row for row in range(len(PROMPTS))]


class Elsewhere:
    @pytest.mark.slow
    def test_openvino_is_diffusers(self, case: Case, tmp_path: Path) -> None:
        tiny.accept(replace(case, bundle=tiny.on_backend("openvino", case.bundle, tmp_path / "bundle")))

    @pytest.mark.slow
    def test_without_pytorch_is_diffusers(self, case: Case, tmp_path: Path) -> None:
        """`dit-run sample` draws three prompts of different lengths where nothing that made the bundle is."""
        words = ["sample", str(case.bundle), "--prompt", *PROMPTS, "--threads", "1", "-o", str(tmp_path / "x.npy")]
        words += ["--steps", str(STEPS), "--guidance", str(GUIDANCE), "--seed", *map(str, SEEDS)]
        words += [] if case.negative is None else ["--negative", case.negative]
        done = subprocess.run([sys.executable, "-c", DIT_RUN, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with Pipeline.load(case.bundle, threads=1) as pipe:
            got = np.moveaxis(pipe.engines.decode(np.load(tmp_path / "x.npy")), 1, -1)
        expected = case.theirs(PROMPTS)
        assert min(tiny.distances(got, expected)) >= tiny.SAME
        assert max(tiny.distances(got[::-1], expected)[::2]) < tiny.ANOTHER  # each is that of its own prompt

    @pytest.mark.slow
    def test_cpp_draws_the_same(
        self, case: Case, dit_generate: Callable[..., CompletedProcess[str]], tmp_path: Path
    ) -> None:
        """C++ draws Python's latents from the ids of the words, on both engines, with guidance and without."""
        file = tmp_path / "x.npy"
        for engine in ENGINES:
            with load(case.bundle, engine) as pipe:
                away = pipe.engines.tokenizers([case.negative or ""], True) if pipe.manifest.mixes_guidance else None
                flags = condition_flags(tmp_path, pipe.engines.tokenizers([*PROMPTS], False), away)
                words = {"prompt": [*PROMPTS], "negative_prompt": case.negative, "steps": STEPS, "seed": SEEDS}
                for guidance in (GUIDANCE, 1.0):
                    options = ["--steps", STEPS, "--guidance", guidance, "--seed", *SEEDS, "--backend", engine]
                    done = dit_generate(case.bundle, *flags, *options, "-o", file)
                    assert done.returncode == 0, done.stderr
                    expected = pipe.sample(**words, guidance=guidance, output="latents")
                    assert same_latents(np.load(file), expected), (engine, guidance)
                pictures = pipe.sample(**words, guidance=1.0)
                done = dit_generate(case.bundle, *flags, *options, "-o", tmp_path / "x.npz")
                assert done.returncode == 0 and same_pictures(np.load(tmp_path / "x.npz")["arr_0"], pictures)
                changed = words | {"prompt": [OTHER, *PROMPTS[1:]]}
                assert not same_latents(np.load(file), pipe.sample(**changed, guidance=1.0, output="latents"))
        assert dit_generate(case.bundle, "--verify").returncode == 0

"""A network that the package has never seen, in C++: PyTorch's states, and PyTorch's reference replayed."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cpp.test_conditions import condition_flags
from tests.cpp.test_same_pictures import ENGINES
from tests.test_custom_network import bundle, condition, error, expected  # noqa: F401 (bundle is a fixture)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_samples_as_pytorch(bundle, dit_generate, tmp_path, engine) -> None:  # noqa: F811
    flags = condition_flags(tmp_path, condition(3), condition(1, seed=9))
    options = ["--steps", 10, "--guidance", 2.5, "--seed", 4, "--solver", "ddim", "--backend", engine]
    done = dit_generate(bundle, *flags, *options, "-o", tmp_path / "x.npy")
    assert done.returncode == 0, done.stderr
    wanted = expected(3, 10, 2.5, 4)
    assert error(np.load(tmp_path / "x.npy"), wanted) <= 1e-4  # fp32 sums in another order, ten steps long
    assert error(expected(3, 10, 2.5, 5), wanted) > 1e-2


def test_its_reference_is_replayed(bundle, dit_generate) -> None:  # noqa: F811
    done = dit_generate(bundle, "--verify")
    assert done.returncode == 0, done.stdout + done.stderr

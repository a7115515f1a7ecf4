import numpy as np
import pytest
import torch

from dit_runtime.errors import UsageError
from dit_runtime.sampling.noise import Noise, draw

SEEDS = [0, 42, 2**63 - 1, 2**64 - 1, -1, -(2**63)]
# Values reach 5.8 in float32 (24-bit uniforms), where an ulp is 4.8e-7, and PyTorch's vector log, sin and cos are
# within about an ulp of ours.
ATOL = 1e-6


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def generator(seed):
    return torch.Generator("cpu").manual_seed(seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_integer_stream_is_torchs(seed):
    pairs = torch.empty(1000, dtype=torch.int64).random_(-(2**63), None, generator=generator(seed))
    # Over the whole range random_ takes two 32-bit integers, the high half first.
    expected = pairs.numpy().view(np.uint64)
    high, low = Noise(seed).bits(2000).astype(np.uint64).reshape(1000, 2).T
    np.testing.assert_array_equal(high << np.uint64(32) | low, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_consecutive_draws_are_torch_randn(seed):
    """Latents, a size that is no multiple of 16, and small sizes whose odd value waits for a later draw."""
    shapes = [(2, 4, 32, 32), (1, 4, 64, 64), (3, 7), (5,), (2, 4, 32, 32), (1, 1, 3), (16,), (1,), (17,), (0,), (31,)]
    ours, theirs = Noise(seed), generator(seed)
    for shape in shapes:
        values = ours.normal(shape)
        assert values.dtype == np.float32 and values.shape == shape
        np.testing.assert_allclose(values, torch.randn(shape, generator=theirs).numpy(), rtol=0, atol=ATOL)


def test_every_kind_of_value_over_a_million_draws():
    values = Noise(7).normal((1 << 20,))
    expected = torch.randn(1 << 20, generator=generator(7)).numpy()
    np.testing.assert_allclose(values, expected, rtol=0, atol=ATOL)
    assert (values == expected).mean() > 0.8  # 83 % measured; a formula off by an ulp throughout has far fewer


def test_one_seed_draws_the_batch_from_one_stream():
    shape = (3, 4, 8, 8)
    noise, theirs = draw(5, 3), generator(5)
    for _ in range(2):
        np.testing.assert_allclose(noise(shape), torch.randn(shape, generator=theirs).numpy(), rtol=0, atol=ATOL)


def test_a_list_of_seeds_makes_a_sample_independent_of_its_batch():
    batch, alone = draw([3, 11, 2**40], 3), draw([11], 1)
    for _ in range(2):
        values = batch((3, 4, 8, 8))
        np.testing.assert_array_equal(values[1:2], alone((1, 4, 8, 8)))
        assert not np.array_equal(values[0], values[1])


@pytest.mark.parametrize("seed", [1.0, "1", None, True, -(2**63) - 1, 2**64])
def test_what_torch_refuses_as_a_seed_is_refused(seed):
    with pytest.raises(UsageError, match=r"expected an integer from -2\*\*63"):
        draw(seed, 1)
    with pytest.raises(UsageError, match="expected an integer"):
        draw([seed], 1)


def test_seeds_must_match_the_batch():
    with pytest.raises(UsageError, match="2 seeds for 3 samples"):
        draw([1, 2], 3)

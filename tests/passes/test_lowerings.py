"""Every form of a denoiser is the same function, and forms share their weights."""

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from dit_export.graph import onnxfile
from dit_export.networks.dit import DiT
from dit_export.networks.spec import expected_counts
from dit_export.passes import LOWERINGS
from dit_export.passes.attention import plain_attention
from tests.passes.conftest import Run, fuse_dit
from tests.passes.graphs import normal


def test_every_form_of_a_denoiser_is_the_same_function(plain: gs.Graph, small_dit: DiT, run: Run) -> None:
    denoiser = fuse_dit(plain, small_dit.spec).denoiser
    inputs = {
        "latents": normal(2, 4, 8, 8),
        "conditioning": normal(2, 2, small_dit.spec.num_vectors, small_dit.spec.hidden),
        "guidance": np.array([1, 4], np.float32),
    }
    expected = run(denoiser.copy(), inputs)
    for backend, passes in LOWERINGS.items():
        form = denoiser.copy()
        counts = {rewrite.__name__: rewrite(form) for rewrite in passes}
        assert counts.items() <= expected_counts(small_dit.spec).items(), backend
        for got, want in zip(run(form, inputs), expected, strict=True):
            assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max(), backend  # as the fused pair's tolerance


@pytest.mark.parametrize("place", ["absolute", "relative", "link"])
def test_forms_share_their_weights(plain: gs.Graph, small_dit: DiT, tmp_path, monkeypatch, place: str) -> None:
    if place == "relative":
        monkeypatch.chdir(tmp_path)
        tmp_path = Path()
    elif place == "link":
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        tmp_path = tmp_path / "link"
    denoiser = fuse_dit(plain, small_dit.spec).denoiser
    assert onnxfile.save(denoiser, tmp_path / "a.onnx") == ("a.onnx", "a.onnx.data")
    form = denoiser.copy()
    plain_attention(form)
    assert onnxfile.save(form, tmp_path / "b.onnx") == ("b.onnx", "a.onnx.data")
    changed = denoiser.copy()
    weight = next(tensor for tensor in onnxfile.constants(changed) if tensor.values.nbytes > 10_000)
    weight.values = weight.values * 2
    first, *rest = onnxfile.save(changed, tmp_path / "c.onnx")
    assert first == "c.onnx" and sorted(rest) == ["a.onnx.data", "c.onnx.data"]
    again = {tensor.name: tensor.values for tensor in onnxfile.constants(onnxfile.load(tmp_path / "c.onnx"))}
    np.testing.assert_array_equal(again[weight.name], weight.values)
